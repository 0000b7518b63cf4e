"""What one sample may say next, as far as the host has a say in it.

A constraint's next mask follows from the token before it, but the engine starts a step before it has read the last
one's tokens. Constrained samples therefore sit out a step while their last token is being read. While they reason
freely before it they do not: such a step names the token that would end the reasoning, and the devices themselves
leave the sample alone if that was its newest one.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from infer.grammar import Matcher

NO_TOKEN = -1


class Move(NamedTuple):
    """What holds for a sample's next token.

    Attributes:
      unless: the sample takes no step if this is its newest token; -1 for none.
      mask: the legal tokens, [ceil(V / 32)] uint32; None if all are.
    """

    unless: int = NO_TOKEN
    mask: np.ndarray | None = None


class Guide:
    """Leads one sample.

    Args:
      matcher: its way through a grammar.
      end: tokens that end the reasoning before the grammar holds; empty if there is no reasoning.
    """

    def __init__(self, matcher: Matcher, end: Sequence[int] = ()) -> None:
        self._matcher = matcher
        self._end = tuple(end)
        self._last: collections.deque[int] = collections.deque(maxlen=len(end))
        self.constrained = not end

    def next(self, unread: bool) -> Move | None:
        """What holds for the next token; None if that depends on the last one, which is yet `unread`."""
        if not self.constrained:
            return Move(unless=self._end[-1] if unread else NO_TOKEN)
        return None if unread else Move(mask=self._matcher.mask())

    def read(self, token: int) -> bool:
        """Takes note of a token that did not end the sample. Returns whether the sample is complete with it."""
        if self.constrained:
            self._matcher.accept(token)
            return self._matcher.finished
        self._last.append(token)
        self.constrained = tuple(self._last) == self._end
        return False
