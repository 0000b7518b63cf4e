"""A reply as it is shown: reasoning told apart from the answer, in style on a terminal, by headings elsewhere."""

from __future__ import annotations

import itertools
import operator
from typing import TextIO

from rich.console import Console

from v4_jax.commands.shared.console import printable
from v4_jax.infer.text import Piece

_HEADINGS = {"reasoning": "Reasoning:", "content": "Answer:", "tool_calls": "Tool calls:"}
_STYLES = {"reasoning": "dim", "tool_calls": "cyan"}


class Writer:
    """Writes pieces as they come.

    Args:
      file: where to.
      show_reasoning: whether reasoning is shown at all.
      headings: whether kinds are told apart by headings; on a terminal they are by style.
      safe: whether control characters are replaced; always on a terminal.
    """

    def __init__(self, file: TextIO, *, show_reasoning: bool, headings: bool, safe: bool = False) -> None:
        self._console = Console(file=file, highlight=False, soft_wrap=True)
        self._file, self._show, self._headings, self._safe = file, show_reasoning, headings, safe
        self._kind = self._last = ""

    def write(self, pieces: list[Piece]) -> None:
        """Writes and flushes."""
        written = [(kind, text) for kind, text in pieces if text]
        for kind, run in itertools.groupby(written, operator.itemgetter(0)):
            if kind == "reasoning" and not self._show:
                continue
            text = "".join(text for _, text in run)
            if kind != self._kind:
                if self._kind:
                    self._put("\n\n")
                if self._headings and not self._console.is_terminal:
                    self._put(_HEADINGS[kind] + "\n")
                self._kind = kind
            self._put(text)
        self._file.flush()

    def finish(self) -> None:
        """Ends the last line."""
        if self._last and not self._last.endswith("\n"):
            self._put("\n")
        self._file.flush()

    def _put(self, text: str) -> None:
        self._last = text or self._last
        if self._console.is_terminal:
            self._console.out(printable(text), style=_STYLES.get(self._kind), end="", highlight=False)
        else:
            self._file.write(printable(text) if self._safe else text)
