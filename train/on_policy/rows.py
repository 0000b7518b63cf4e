"""On-policy rows: the student's own answers to a round's prompts, packed into rows that train the answers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from v4_jax.outputs import Routing
from v4_jax.train.batch import Batch
from v4_jax.train.objectives.objective import Decisions
from v4_jax.train.on_policy.prompts import Prompts
from v4_jax.train.on_policy.rollouts import Prompt, Rollouts, RolloutSettings, Sample
from v4_jax.train.teachers.rows import Part


class Answer(NamedTuple):
    """A prompt and one of its answers, as they are learnt.

    Attributes:
      prompt: what was asked.
      sample: what was said.
      given: numbers that the objective wants of each token of the answer, by name.
    """

    prompt: Prompt
    sample: Sample
    given: dict[str, float]

    @property
    def size(self) -> int:
        """Tokens of both."""
        return len(self.prompt.tokens) + len(self.sample.tokens)


# Of some prompts' samples: numbers for each token of each sample, and metrics.
Judge = Callable[[Sequence[Prompt], Sequence[Sequence[Sample]]], tuple[list[list[dict[str, float]]], dict[str, float]]]


def unjudged(
    prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]]
) -> tuple[list[list[dict[str, float]]], dict[str, float]]:
    """Nothing is said of any sample: each is learnt as it is."""
    del prompts
    return [[{} for _ in group] for group in samples], {}


class OnPolicy:
    """A round's rows from its prompts.

    Args:
      prompts: the data.
      rollouts: what answers them.
      settings: how many prompts and answers a step has.
      shape: of a step's parts: rows of each, tokens of a row. A step has as many parts as its answers fill.
      entry_ratio: tokens of a compressed entry, by which replayed entries are numbered.
      judge: what is made of the answers.
    """

    def __init__(
        self,
        prompts: Prompts,
        rollouts: Rollouts,
        settings: RolloutSettings,
        shape: Callable[[int], tuple[int, int]],
        entry_ratio: int,
        judge: Judge = unjudged,
    ) -> None:
        self._prompts, self._rollouts, self._settings, self._shape = prompts, rollouts, settings, shape
        self._ratio, self._judge = entry_ratio, judge

    def restore(self, state: dict[str, Any]) -> None:
        """As for `Supply`."""
        self._prompts.restore(state)

    def steps(
        self, first: int, count: int, params: Any
    ) -> Iterator[tuple[list[Part], dict[str, Any], dict[str, float]]]:
        """As for `Supply`: all answers of the round are generated together."""
        asked, states = [], []
        for step in range(first, first + count):
            asked.append(self._prompts.next(self._settings.prompts, self._shape(step)[1], step))
            states.append(self._prompts.state())
        every = [prompt for prompts in asked for prompt in prompts]
        answered = iter(self._rollouts.sample(params, every, self._settings.samples))
        for step, prompts, state in zip(range(first, first + count), asked, states, strict=True):
            samples = [next(answered) for _ in prompts]
            given, metrics = self._judge(prompts, samples)
            answers = [
                Answer(prompt, sample, numbers)
                for prompt, group, of_group in zip(prompts, samples, given, strict=True)
                for sample, numbers in zip(group, of_group, strict=True)
            ]
            said = [answer.sample for answer in answers]
            metrics = metrics | {
                "answer_tokens": float(np.mean([len(sample.tokens) for sample in said])),
                "answers_cut": float(np.mean([not sample.ended for sample in said])),
            }
            parts = []
            for teacher in sorted({prompt.teacher for prompt in prompts}):
                own = [answer for answer in answers if answer.prompt.teacher == teacher]
                found = pack(own, *self._shape(step), self._ratio)
                parts += [Part(batch, teacher, decisions) for batch, decisions in found]
            yield parts, state, metrics


def pack(answers: Sequence[Answer], rows: int, length: int, ratio: int) -> list[tuple[Batch, Decisions | None]]:
    """Packs answers into rows, and rows into parts, of which the last may end in empty rows.

    Args:
      answers: none of them longer than a row, and at least one.
      rows: of a part.
      length: tokens of a row.
      ratio: tokens of a compressed entry.

    Returns:
      Of each part the rows, whose `given` has the "logprobs" of tokens of answers and what the answers are given, and
      the decisions to replay, if every answer has them.
    """
    packed: list[list[Answer]] = []
    for answer in sorted(answers, key=lambda answer: -answer.size):  # the longest first: less padding
        fits = (row for row in packed if sum(one.size for one in row) + answer.size <= length)
        row = next(fits, None)
        if row is None:
            packed.append([answer])
        else:
            row.append(answer)
    return [_part(packed[begin : begin + rows], rows, length, ratio) for begin in range(0, len(packed), rows)]


def _part(packed: Sequence[Sequence[Answer]], rows: int, length: int, ratio: int) -> tuple[Batch, Decisions | None]:
    tokens, segment_ids = np.zeros((2, rows, length), np.int32)
    trained = np.zeros((rows, length), bool)
    given = {name: np.zeros((rows, length), np.float32) for name in ("logprobs", *packed[0][0].given)}
    routing = _nothing_routed(packed, rows, length)
    for row, answers in enumerate(packed):
        end = entries = 0
        for segment, answer in enumerate(answers, 1):
            begin, said, end = end, end + len(answer.prompt.tokens), end + answer.size
            tokens[row, begin:said], tokens[row, said:end] = answer.prompt.tokens, answer.sample.tokens
            segment_ids[row, begin:end], trained[row, said:end] = segment, True
            given["logprobs"][row, said:end] = answer.sample.logprobs
            for name, value in answer.given.items():
                given[name][row, said:end] = value
            if routing is not None:
                _route(routing, answer, row, begin, end, entries)
            entries += answer.size // ratio
    return Batch(tokens, segment_ids, trained, given), None if routing is None else Decisions(routing, None)


def _nothing_routed(packed: Sequence[Sequence[Answer]], rows: int, length: int) -> Routing | None:
    """Decisions of rows without any tokens; None if not all answers have decisions to fill in."""
    found = [answer.sample.routing for answers in packed for answer in answers]
    first = found[0]
    if first is None or any(one is None for one in found):
        return None

    def empty(x: Any, fill: np.ndarray) -> np.ndarray:
        return np.broadcast_to(fill, (x.shape[0], rows, length, x.shape[-1])).astype(np.int32)

    experts = None if first.experts is None else empty(first.experts, np.arange(first.experts.shape[-1]))
    entries = None if first.entries is None else empty(first.entries, np.asarray(-1))
    empty_routing: Any = Routing(experts, entries)  # type: ignore[arg-type]  # numpy's arrays
    return jax.tree.map(np.array, empty_routing)


def _route(routing: Any, answer: Answer, row: int, begin: int, end: int, entries: int) -> None:
    """Fills in the decisions of an answer, whose last token was not read: it takes those of the one before."""
    own: Any = answer.sample.routing
    last = end - 1
    for name, numbered in (("experts", 0), ("entries", entries)):
        into, found = getattr(routing, name), getattr(own, name)
        if into is not None:
            moved = np.where(found >= 0, found + numbered, found)
            into[:, row, begin:last], into[:, row, last] = moved, moved[:, -1]
