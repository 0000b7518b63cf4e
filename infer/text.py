"""A row's tokens as text, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from v4_jax.tokenizer import Tokenizer


class StoppingText:
    """Decodes one row's tokens and cuts the text at the first stop string, which is not part of it.

    Text that may be the beginning of a stop string waits until the next tokens decide, so that no piece ever shows
    part of one.

    Args:
      tokenizer: decodes the tokens.
      stops: strings that end the text; of several that occur, the one that begins first counts.

    Attributes:
      stopped: whether a stop string was met. What is pushed after it is ignored.

    Raises:
      ValueError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty; expected at least one character")
        self._stream, self._stops = tokenizer.stream(), tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Returns the text that `token` makes certain, often ""."""
        return "" if self.stopped else self._take(self._stream.push(token))

    def flush(self) -> str:
        """Returns what still waits: nothing follows."""
        if self.stopped:
            return ""
        piece = self._take(self._stream.flush())
        held, self._held = self._held, ""
        return piece + held

    def _take(self, piece: str) -> str:
        text, self._held = self._held + piece, ""
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                self._held = text[-length:]
                return text[:-length]
        return text
