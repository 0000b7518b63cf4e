"""What a compiled program communicates: every collective, its bytes, and how often it runs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from v4_jax.planning.hlo import KINDS, UNKNOWN, Call, Computation, Expected, Instruction, Program, Shape


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that communicates.

    Attributes:
      kind: one of `KINDS`.
      shapes: its results on one device.
      groups: devices, by their numbers in the program, that take part together; of a permute, sources and targets.
      runs: how often a device runs it in one call of the program; None where that depends on the data.
      at_most: whether a conditional may leave it out.
      op_name: where in the JAX program it comes from.
      filled: of the bytes of its results, those that it fills.
    """

    kind: str
    shapes: tuple[Shape, ...]
    groups: tuple[tuple[int, ...], ...]
    runs: float | None
    at_most: bool
    op_name: str
    filled: float = 1.0

    @property
    def group(self) -> int:
        """How many devices take part together; of a permute, those on one chain of sources and targets."""
        return _chain(self.groups) if "permute" in self.kind else len(self.groups[0])

    @property
    def nbytes(self) -> float:
        """Bytes of its results on one device that it fills, each time it runs."""
        return self.filled * sum(shape.nbytes for shape in self.shapes)

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time it runs, in the pattern that sends the least (rings)."""
        away = (self.group - 1) / self.group
        if self.kind == "all-reduce":
            return 2 * away * self.nbytes
        if self.kind == "reduce-scatter":
            return (self.group - 1) * self.nbytes
        return self.nbytes if "permute" in self.kind or "broadcast" in self.kind else away * self.nbytes


def collectives(text: str | Program, expected: Expected = UNKNOWN) -> list[Collective]:
    """Every collective of a compiled program, in the order in which the program's text reaches them.

    One that runs beside others is one collective, however often it is written. Both branches of a conditional are
    listed.

    Args:
      text: `compiled.as_text()` of a program for CPU or TPU, or what was read from it.
      expected: see `Program.calls`.

    Raises:
      ValueError: the text is no compiled program.
    """
    program = text if isinstance(text, Program) else Program(text)
    calls = program.calls(expected)
    return [
        as_collective(call, program, expected)
        for call in calls
        if call.instruction.opcode.removesuffix("-start") in KINDS and stage_of(call) in ("whole", "start")
    ]


def chain_of(instruction: Instruction) -> str | None:
    """What the parts of a collective have in common that the compiler writes into the fusions beside which it runs."""
    found = re.search(r'chain_id="\d+"', instruction.attributes)
    return found and found[0]


def stage_of(call: Call) -> Literal["whole", "start", "middle", "end"]:
    """Which part of a collective an instruction is.

    One that runs beside others begins with "-start", and "-done" waits for it; or it is written into the fusion that
    starts it, those beside which it goes on, and the one that waits for it.
    """
    if call.instruction.opcode.endswith("-start"):
        return "start"
    if not call.fused or chain_of(call.instruction) is None:
        return "whole"
    attributes = [instruction.attributes for instruction in call.computation.instructions.values()]
    if any('custom_call_target="AsyncCollectiveStart"' in text for text in attributes):
        return "start"
    return "end" if any('custom_call_target="AsyncCollectiveDone"' in text for text in attributes) else "middle"


def holds_scatter(instruction: Instruction, program: Program) -> bool:
    """Whether it is a fusion of a sum over devices and the cut of what each keeps: how some TPUs reduce and scatter."""
    if instruction.opcode != "fusion":
        return False
    (callee,) = instruction.called("calls")
    return _scattered(program.computations[callee]) is not None


def _scattered(computation: Computation) -> Instruction | None:
    """The cut in such a fusion."""
    root = computation.instructions[computation.root]
    summed = computation.instructions.get(root.operands[0]) if root.opcode == "dynamic-slice" else None
    return root if summed is not None and summed.opcode == "all-reduce" else None


def as_collective(call: Call, program: Program, expected: Expected = UNKNOWN) -> Collective:
    """A call of an instruction that communicates."""
    instruction, computation, runs, at_most, _ = call
    kind, outcome = instruction.opcode.removesuffix("-start"), instruction
    if instruction.opcode != kind:  # its results are the buffers of the exchange, those of "-done" the outcome
        others = computation.instructions.values()
        outcome = next((i for i in others if i.operands[:1] == (instruction.name,)), instruction)
    if call.fused and kind == "all-reduce" and (cut := _scattered(computation)) is not None:
        kind, outcome = "reduce-scatter", cut
    filled = expected.filled(outcome) if kind == "ragged-all-to-all" else 1.0
    groups = tuple(map(tuple, groups_of(instruction)))
    return Collective(kind, outcome.shapes, groups, runs, at_most, instruction.op_name, filled)


def groups_of(instruction: Instruction) -> list[list[int]]:
    """Which devices, by their numbers in the program, take part together; of a permute, pairs of source and target.

    Raises:
      ValueError: they are not written in a known form.
    """
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),\s*(\d+)\}", pairs[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(*iota.groups()[1:]).reshape(_numbers(iota[1])).tolist()
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?[^{]*\{([^}]*)\}", text
    ):
        named = re.findall(r"('\w+')=(\d+)", mesh[1])
        sizes = [int(size) for _, size in named]
        devices = _iota(mesh[2] or str(math.prod(sizes)), mesh[3]).reshape(sizes)
        along = [n for n, (axis, _) in enumerate(named) if axis in re.findall(r"'\w+'", mesh[4])]
        others = [n for n in range(len(named)) if n not in along]
        return devices.transpose(others + along).reshape(-1, math.prod(sizes[n] for n in along)).tolist()
    if listed := re.search(r"replica_groups=\{(\{[\d,\s{}]*\})\}", text):
        return [_numbers(group) for group in re.findall(r"\{([\d,\s]+)\}", listed[1])]
    raise ValueError(f"the replica groups of {instruction.name} are not understood: {text[:200]}")


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Numbers from 0 on in a shape, whose axes then change places."""
    sizes = _numbers(shape)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _chain(pairs: Sequence[Sequence[int]]) -> int:
    """Devices of the longest chain (or ring) that pairs of source and target make."""
    owner = {device: device for device in itertools.chain(*pairs)}

    def find(device: int) -> int:
        while owner[device] != device:
            device = owner[device]
        return device

    for a, b in pairs:
        owner[find(a)] = find(b)
    ends = [find(device) for device in owner]
    return max(map(ends.count, ends), default=1)
