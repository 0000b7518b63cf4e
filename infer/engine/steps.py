"""A step: who takes part in it, what the host says about it, and what is in flight while the next one is made ready."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from v4_jax.infer.engine.guide import NO_TOKEN, Instruction
from v4_jax.infer.engine.programs import AT_REST, DRAFTED, NEWEST, StepInputs
from v4_jax.infer.engine.sequences import SequenceState
from v4_jax.infer.engine.speculative import StepOutput
from v4_jax.placement import Place

Instructions = dict[SequenceState, Instruction]

_T = TypeVar("_T")


class InFlightStep(NamedTuple):
    """A step that was started, and whose tokens were not read yet.

    Attributes:
      instructions: who takes part, and what holds for it.
      drafted: those of them that took drafts.
      output: what they get, on the devices.
    """

    instructions: Instructions
    drafted: list[SequenceState]
    output: StepOutput


def next_instructions(generating: Iterable[SequenceState], in_flight: InFlightStep | None) -> Instructions:
    """Who takes the next step, and what holds for it.

    Constrained samples, which sit out every other step, all sit out the same one: without others, it is not taken.

    Args:
      generating: all that have read their prompts and not ended.
      in_flight: the step before, whose tokens the host has not read; None if there is none.
    """
    running = {} if in_flight is None else in_flight.instructions
    others_turn = any(sequence.constrained for sequence in running)
    instructions = {}
    for sequence in generating:
        unread = sequence in running
        if sequence.tokens_left <= unread:  # the last token is on its way
            continue
        instruction: Instruction | None = Instruction()
        if sequence.constrained and others_turn:
            instruction = None
        elif sequence.guide is not None:
            instruction = sequence.guide.next(unread)
        if instruction is not None:
            instructions[sequence] = instruction
    return instructions


def step_inputs(instructions: Instructions, slots: int) -> StepInputs:
    """What the host says about a step, as numpy arrays.

    Prompts' last tokens are taken out of the sequences: no other step takes them.

    Args:
      instructions: who takes part.
      slots: of the engine.
    """
    # Any: numpy's arrays, where the fields are the devices'.
    tokens: Any = np.full(slots, AT_REST, np.int32)
    unless: Any = np.full(slots, NO_TOKEN, np.int32)
    forced: Any = np.full(slots, NO_TOKEN, np.int32)
    for sequence, instruction in instructions.items():
        slot = sequence.slot
        if sequence.last_prompt_token is not None:
            tokens[slot] = sequence.last_prompt_token
            sequence.last_prompt_token = None
        else:
            tokens[slot] = DRAFTED if sequence.takes_drafts else NEWEST
        unless[slot], forced[slot] = instruction.unless, instruction.forced
    wants_alternatives: Any = np.bool_(any(sequence.top_logprobs for sequence in instructions))
    return StepInputs(tokens, unless, forced, wants_alternatives)


def allowed_tokens(instructions: Instructions, all_allowed: np.ndarray) -> np.ndarray | None:
    """The legal tokens of all rows, [B, ceil(V / 32)] uint32; None if nobody restricts them.

    Args:
      instructions: who takes part.
      all_allowed: masks of the same shape that allow every token.
    """
    masks: np.ndarray | None = None
    for sequence, instruction in instructions.items():
        if instruction.mask is not None:
            masks = all_allowed.copy() if masks is None else masks
            masks[sequence.slot] = instruction.mask
    return masks


class LastSent(Generic[_T]):
    """Arrays of the host that are sent to the devices again only when they have changed.

    Args:
      place: the devices.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._key: object = None
        self._sent: _T

    def put(self, key: object, make: Callable[[], _T]) -> _T:
        """What `make` returns, on the devices: made and sent only if `key` is another one than at the last call."""
        if self._key is None or self._key != key:
            self._key, self._sent = key, self._place.put(make())
        return self._sent
