"""What `v4-jax train --show-rows N` prints: the first rows as text, with what is trained marked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from v4_jax.commands.shared.console import printable
from v4_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from v4_jax.train.batch import Batch

# Around what is trained where there are no colours, and between the documents of a row where there are.
_OPEN, _CLOSE, _BETWEEN = "⟦", "⟧", "\n--\n"
_TRAINED, _READ = "bold green", "dim"


def print_rows(batch: Batch, tokenizer: Tokenizer) -> None:
    """Prints rows [B, S] to stdout: what is trained green on a terminal, in brackets elsewhere."""
    console = Console(file=sys.stdout, highlight=False)
    for number, text in enumerate(_rows(batch, tokenizer, marked=not console.is_terminal)):
        if console.is_terminal:
            console.print(text[0], style="bold")
            console.print(text[1], soft_wrap=True)
        else:
            print(("\n" if number else "") + text[0] + "\n" + text[1].plain)


def _rows(batch: Batch, tokenizer: Tokenizer, *, marked: bool) -> list[tuple[str, Text]]:
    """A heading and a text for each row."""
    found = []
    trained = np.ones_like(batch.tokens, bool) if batch.trained is None else batch.trained
    for number, (tokens, segments, learnt) in enumerate(zip(batch.tokens, batch.segment_ids, trained, strict=True), 1):
        used = int((segments > 0).sum())
        text = Text()
        # Runs of tokens of one document of which all are trained, or none.
        ends = [*(np.flatnonzero(np.diff(segments[:used]) | np.diff(learnt[:used])) + 1).tolist(), used]
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            if begin and segments[begin] != segments[begin - 1]:
                text.append(_BETWEEN)
            run = printable(tokenizer.decode(tokens[begin:end].tolist()))
            if learnt[begin]:
                text.append(f"{_OPEN}{run}{_CLOSE}" if marked else run, _TRAINED)
            else:
                text.append(run, _READ)
        documents = int(segments.max())
        heading = (
            f"row {number}: {used:,} of {len(tokens):,} tokens in {documents:,} document{'' if documents == 1 else 's'}"
            f", {int(learnt[:used].sum()):,} trained"
        )
        found.append((heading, text))
    return found
