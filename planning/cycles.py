"""The compiler's own estimate of a program's time: the cycles of every operation, times how often it runs.

The TPU compiler writes an estimate beside most operations of a compiled program: the bundles of instructions of its
schedule, loops multiplied out. Of Pallas kernels it is asked apart (`v4_jax.planning.kernels`); they take at least
their FLOPs at peak and their bytes at full bandwidth. The compiler knows nothing of the interconnect; collectives take
`COLLECTIVE` and what their busiest link does (`v4_jax.planning.links`), share the links, and count as what the program
has to wait for them.
Copies that run beside other work cost nothing here. A sum of estimates is no measurement: it is there to compare
programs by, since it sees operations, which a floor of bytes and FLOPs does not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from v4_jax.planning.hlo import KINDS, Call, Expected, Program
from v4_jax.planning.hlo_collectives import as_collective, chain_of, holds_scatter, stage_of
from v4_jax.planning.hlo_costs import cost_of, is_free
from v4_jax.planning.kernels import Cycles, Likeness, likeness
from v4_jax.planning.links import Links
from v4_jax.sharding.chips import Chip

COLLECTIVE = 3e-6  # seconds until the first bytes of a collective have gone round: assumed, not the compiler's
NO_ESTIMATE = 1 << 50  # so many cycles mean none: the compiler writes the largest number of what SparseCores do
OPERATION = 2100  # cycles of an operation that the compiler gives no estimate of: what the smallest ones have

_ASYNC = frozenset(("copy-start", "slice-start", "dynamic-slice-start", "async-start", "call-start"))
UNNAMED = "the compiler's own"
_SCOPE = re.compile(r"[a-z_]+\.[a-z][a-z_]*")  # as layers name their parts: "attention.window"
_MODULE = re.compile(r"(?:^|/)(embed|head|compressor|indexer|hc_attn|hc_ffn|hc_head|attn|ffn|norm)(?=/|$)")


class Estimated(NamedTuple):
    """A program's time by the compiler's estimate, on one device.

    Attributes:
      seconds: of a call.
      operations: how many it runs, loops multiplied out: all but those that only hand on what is there.
      parts: seconds by named scope, and of waiting for collectives, the longest first.
      bounded: names of Pallas kernels that the compiler gives no estimate of, and that count as FLOPs and bytes alone.
    """

    seconds: float
    operations: float
    parts: dict[str, float]
    bounded: tuple[str, ...]


def estimate(program: Program, kernels: Mapping[Likeness, Cycles], links: Links, expected: Expected) -> Estimated:
    """A compiled program's time.

    Args:
      program: what was compiled.
      kernels: cycles of the Pallas kernels, see `v4_jax.planning.kernels.cycles`.
      links: its devices and the wires between them.
      expected: how often what depends on the data runs.
    """
    parts: defaultdict[str, float] = defaultdict(float)
    chip = links.device
    operations, bounded, interconnect = 0.0, set[str](), _Interconnect()
    for call in program.calls(expected):
        instruction = call.instruction
        runs = 1.0 if call.runs is None else float(call.runs)
        if instruction.opcode.removesuffix("-start") in KINDS:
            seconds = COLLECTIVE + links.seconds(as_collective(call, program, expected))
            parts["collectives"] += interconnect.send(call, runs * seconds)
            operations += runs if stage_of(call) in ("whole", "start") else 0
            continue
        if call.fused or is_free(instruction) or instruction.opcode.endswith("-update"):
            continue
        if instruction.opcode.endswith("-done"):
            parts["collectives"] += interconnect.wait_for(instruction.operands[0])
            continue
        if program.holds_kernel(instruction) or holds_scatter(instruction, program):
            continue  # what it holds counts
        operations += runs
        if instruction.is_kernel and any(cost_of(call, program, expected)):  # some do nothing
            known = likeness(call.computation, instruction)
            if known not in kernels:
                bounded.add(known[0])
        if instruction.opcode in _ASYNC:
            interconnect.leave_to(call, program)
        else:
            seconds = runs * _seconds(call, program, kernels, chip, expected)
            parts[part_of(instruction.op_name)] += seconds
            interconnect.go_on(seconds)
    longest_first = dict(sorted(((name, time) for name, time in parts.items() if time), key=lambda part: -part[1]))
    return Estimated(sum(parts.values()), operations, longest_first, tuple(sorted(bounded)))


class _Interconnect:
    """Collectives beside what the program computes until it needs what they bring.

    They share the links: what the program waits for goes first, and of others what will be there first.
    """

    def __init__(self) -> None:
        self._left: dict[str, float] = {}  # seconds
        self._within: dict[str, str] = {}

    def leave_to(self, call: Call, program: Program) -> None:
        """What a call starts goes on beside others until the call is done."""
        for callee in call.instruction.called("to_apply", "calls"):
            self._within |= dict.fromkeys(program.computations[callee].instructions, call.instruction.name)

    def send(self, call: Call, seconds: float) -> float:
        """Takes up a collective of so many seconds, and returns those that are waited for it here."""
        name, stage = call.instruction.name, stage_of(call)
        key = chain_of(call.instruction) or self._within.get(name, name)
        if stage == "whole" and key == name:
            return seconds
        if stage in ("whole", "start"):
            self._left[key] = seconds
        return self.wait_for(key) if stage == "end" else 0.0

    def go_on(self, seconds: float) -> None:
        """Collectives proceed while the program computes."""
        for key in sorted(self._left, key=self._left.__getitem__):
            done = min(seconds, self._left[key])
            self._left[key] -= done
            seconds -= done

    def wait_for(self, key: str) -> float:
        """Seconds until something is there, if it is on the way."""
        return self._left.pop(key, 0.0)


def part_of(op_name: str) -> str:
    """The part of the model that an operation belongs to: its innermost named scope, or else its module."""
    names = re.split(r"[/()]+", op_name)  # of a backward pass scopes stand in transpose(jvp(...))
    scopes = [name for name in names if _SCOPE.fullmatch(name)]
    if scopes:
        return scopes[-1]
    modules = _MODULE.findall(op_name)
    return modules[-1] if modules else UNNAMED


def _seconds(call: Call, program: Program, kernels: Mapping[Likeness, Cycles], chip: Chip, expected: Expected) -> float:
    """Of one run of an operation."""
    instruction, (flops, nbytes) = call.instruction, cost_of(call, program, expected)
    if instruction.is_kernel:
        share = expected.share(instruction)
        first, later = kernels.get(likeness(call.computation, instruction), (0, 0))
        cycles = share.cycles * (first * (1 - share.later) + later * share.later)
        return max(cycles / chip.clock, flops / chip.flops, nbytes / chip.hbm_bandwidth)
    written = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    if written and int(written[1]) < NO_ESTIMATE:
        return int(written[1]) / chip.clock
    if not any(shape.dimensions for shape in instruction.shapes):
        return 0.0  # the scalar unit's, a few cycles beside the others
    return max(OPERATION / chip.clock, nbytes / chip.hbm_bandwidth)
