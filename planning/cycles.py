"""The compiler's own estimate of a program's time: the cycles of every operation, times how often it runs.

The TPU compiler writes an estimate beside most operations of a compiled program: the bundles of instructions of its
schedule, loops multiplied out. Of Pallas kernels it is asked apart (`v4_jax.planning.kernels`); they take at least
their FLOPs at peak and their bytes at full bandwidth. The compiler knows nothing of the interconnect; a collective
counts as `COLLECTIVE` and its bytes at full bandwidth. Copies that run beside other work cost nothing here. A sum of
estimates is no measurement: it is there to compare programs by, since it sees operations, which a floor of bytes and
FLOPs does not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from v4_jax.planning.hlo import KINDS, Call, Expected, Program
from v4_jax.planning.hlo_collectives import as_collective
from v4_jax.planning.hlo_costs import cost_of, is_free
from v4_jax.planning.kernels import Cycles, Likeness, likeness
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
      parts: seconds by named scope, and of collectives, the longest first.
      bounded: names of Pallas kernels that the compiler gives no estimate of, and that count as FLOPs and bytes alone.
    """

    seconds: float
    operations: float
    parts: dict[str, float]
    bounded: tuple[str, ...]


def estimate(program: Program, kernels: Mapping[Likeness, Cycles], chip: Chip, expected: Expected) -> Estimated:
    """A compiled program's time.

    Args:
      program: what was compiled.
      kernels: cycles of the Pallas kernels, see `v4_jax.planning.kernels.cycles`.
      chip: one device's share of a chip.
      expected: how often what depends on the data runs.
    """
    parts: defaultdict[str, float] = defaultdict(float)
    operations, bounded = 0.0, set[str]()
    for call in program.calls(expected):
        instruction = call.instruction
        if call.fused or is_free(instruction) or instruction.opcode.endswith(("-done", "-update")):
            continue
        if program.holds_kernel(instruction):
            continue  # the kernel in it counts
        runs = 1.0 if call.runs is None else float(call.runs)
        operations += runs
        kind = instruction.opcode.removesuffix("-start")
        if instruction.is_kernel and (known := likeness(call.computation, instruction)) not in kernels:
            bounded.add(known[0])
        if kind in KINDS:
            parts["collectives"] += runs * (
                COLLECTIVE + as_collective(call, program, expected).sent / chip.ici_bandwidth
            )
        elif instruction.opcode not in _ASYNC:
            parts[part_of(instruction.op_name)] += runs * _seconds(call, program, kernels, chip, expected)
    longest_first = dict(sorted(((name, time) for name, time in parts.items() if time), key=lambda part: -part[1]))
    return Estimated(sum(parts.values()), operations, longest_first, tuple(sorted(bounded)))


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
