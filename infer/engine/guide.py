"""What one sample may say next, as far as the host has a say in it: a constraint, an end to reasoning, an opening.

Both follow from the tokens before, but the engine starts a step before it has read the last one's tokens. Constrained
samples therefore sit out a step while their last token is being read; so does a sample that is about to be told to end
its reasoning, once. While it reasons freely before something else it does not: such a step names the token that would
end the reasoning, and the devices themselves leave the sample alone if that was its newest one.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from v4_jax.infer.engine.grammar import Matcher

NO_TOKEN = -1


class Instruction(NamedTuple):
    """What holds for a sample's next token.

    Attributes:
      unless: the sample takes no step if this is its newest token; -1 for none.
      forced: the token that it says; -1 if it is sampled.
      mask: the legal tokens, [ceil(V / 32)] uint32; None if all are.
    """

    unless: int = NO_TOKEN
    forced: int = NO_TOKEN
    mask: np.ndarray | None = None


class Guide:
    """Leads one sample.

    Args:
      matcher: its way through a grammar, if it has one.
      end: tokens that end the reasoning; empty if there is no reasoning. The grammar holds only after them.
      budget: tokens after which reasoning that has not ended by itself is made to: `end`, or what is missing of it,
        is put into the sample's mouth; None for any number.
      opening: tokens that the answer begins with, after any reasoning; not for one with a grammar.
      going_on: the legal tokens of reasoning that a grammar or an opening comes after, [ceil(V / 32)] uint32: all but
        those that would end the sample before it has said what it must; None for every token.
    """

    def __init__(
        self,
        matcher: Matcher | None = None,
        end: Sequence[int] = (),
        budget: int | None = None,
        opening: Sequence[int] = (),
        going_on: np.ndarray | None = None,
    ) -> None:
        self._matcher, self._end, self._budget, self._opening = matcher, tuple(end), budget, opening
        self._going_on = going_on
        self._reasoning = bool(end)
        self._tokens = 0  # of the reasoning
        self._last: collections.deque[int] = collections.deque(maxlen=len(end))
        self._forced: collections.deque[int] = collections.deque(() if end else opening)
        self._unread = len(self._forced)  # tokens of the opening that are yet to be read

    @property
    def spent(self) -> bool:
        """Whether the sample is on its own from here on."""
        pending = self._opening or self._budget is not None
        return self._matcher is None and not self._forced and not self._unread and not (self._reasoning and pending)

    @property
    def opens(self) -> bool:
        """Whether the next token that is read belongs to the opening, which no token of it ends."""
        return self._unread > 0

    @property
    def constrained(self) -> bool:
        """Whether a grammar decides about the next token."""
        return self._matcher is not None and not self._reasoning

    def next(self, unread: bool) -> Instruction | None:
        """What holds for the next token; None if that depends on the last one, which is yet `unread`."""
        if self._matcher is not None and not self._reasoning:
            return None if unread else Instruction(mask=self._matcher.mask())
        if self._reasoning and self._tokens + unread == self._budget:
            if unread:
                return None
            self._forced.extend(self._end[self._begun() :])
            self._budget = None
        if self._forced:
            return Instruction(forced=self._forced.popleft())
        if self._reasoning and (self._matcher is not None or self._opening):
            return Instruction(unless=self._end[-1] if unread else NO_TOKEN, mask=self._going_on)
        return Instruction()

    def read(self, token: int) -> bool:
        """Takes note of a token that did not end the sample. Returns whether the sample is complete with it."""
        if self._reasoning:
            self._tokens += 1
            self._last.append(token)
            self._reasoning = tuple(self._last) != self._end
            if not self._reasoning:
                self._forced.extend(self._opening)
                self._unread = len(self._opening)
        elif self._unread:
            self._unread -= 1
        elif self._matcher is not None:
            self._matcher.accept(token)
            return self._matcher.finished
        return False

    def _begun(self) -> int:
        """How many tokens of the end have been said; with the rest of them it is complete, and not before."""
        last = tuple(self._last)
        return next(count for count in range(len(last), -1, -1) if last[len(last) - count :] == self._end[:count])
