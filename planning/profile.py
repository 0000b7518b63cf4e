"""Where a program's time goes on its devices: a trace of jax's profiler, read by the parts that plans have."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from v4_jax.planning.cycles import UNNAMED, part_of
from v4_jax.planning.hlo import KINDS, Instruction, Program

_DEVICE = re.compile(r"/device:[A-Z]+:(\d+)$")
_OPERATIONS = "XLA Ops"  # of the lines of a TPU's plane, the one with an event for each operation


@dataclasses.dataclass(frozen=True)
class Parts:
    """Time of a call by part, on the mean of the devices that were traced.

    An operation's time is its own: what runs inside a loop is not the loop's. Operations that run beside each other, as
    on the threads of a processor, count each, so that their sum can be more than a call takes.

    Attributes:
      seconds: by part, the longest first; the names are those of `v4_jax.planning.cycles.Estimated.parts`.
      devices: how many were traced.
      call: seconds of a call while it was traced, on the mean.
    """

    seconds: dict[str, float]
    devices: int
    call: float

    @property
    def busy(self) -> float:
        """Seconds of all parts together."""
        return sum(self.seconds.values())


def parts_of(folder: Path, compiled: Any, times: Sequence[float]) -> Parts:
    """Reads what was recorded.

    Args:
      folder: where to; the newest trace in it is read.
      compiled: the program that was running.
      times: seconds of each call.

    Raises:
      ValueError: there is no trace, or none of its events is an operation of the program.
    """
    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise ValueError(f"{folder} holds no trace of the profiler")
    text = compiled.as_text()
    parts = _parts_by_name(Program(text))
    module = (re.match(r"HloModule ([\w.\-]+)", text) or ["", ""])[1]
    seconds: defaultdict[str, float] = defaultdict(float)
    devices = set()
    for device, events in _lines(jax.profiler.ProfileData.from_file(str(traces[-1])), module):
        for operation, stats, own in _own_times(events):
            seconds[parts.get(operation) or part_of(str(stats.get("tf_op", "")))] += own
            devices.add(stats.get("device_ordinal", device))
    if not seconds:
        raise ValueError("the profiler recorded no operation of the program")
    share = len(times) * len(devices)
    ordered = sorted(seconds.items(), key=lambda part: -part[1])
    by_part = {name: time / share for name, time in ordered if time > 0}
    return Parts(by_part, len(devices), sum(times) / len(times))


def _parts_by_name(program: Program) -> dict[str, str]:
    """The part of every instruction; of one that the compiler made up, such as a conversion, that of its neighbours."""
    found = {}
    for computation in program.computations.values():
        named = {name: _named(one, program) for name, one in computation.instructions.items()}
        for name, instruction in computation.instructions.items():
            for operand in instruction.operands:
                if not named.get(operand, "-"):
                    named[operand] = named[name]
        for name, instruction in computation.instructions.items():
            around = (named[name], *(named.get(operand, "") for operand in instruction.operands))
            found[name] = next(filter(None, around), UNNAMED)
    return found


def _named(instruction: Instruction, program: Program) -> str:
    """The part that an instruction is of by its own name, or by the names of what the compiler put together in it."""
    kind = re.sub("-(start|done)$", "", instruction.opcode)
    if kind in KINDS:
        return "collectives"
    names = [instruction.op_name]
    if instruction.opcode == "fusion" and not instruction.op_name:
        inner = program.computations[instruction.called("calls")[0]]
        names = [one.op_name for one in reversed(inner.instructions.values())]
    parts = (part_of(name) for name in names if name)
    return next((part for part in parts if part != UNNAMED), "")


_Event = tuple[str, float, float, dict[str, Any]]  # operation, start and end in seconds, what else is known


def _lines(profile: Any, module: str) -> Iterator[tuple[int, list[_Event]]]:
    """(device, operations of the program one after another or inside one another) of each line of a trace."""
    planes = {found[1]: plane for plane in profile.planes if (found := _DEVICE.match(plane.name))}
    if planes:
        for device, plane in planes.items():
            lines = list(plane.lines)
            named = [line for line in lines if line.name == _OPERATIONS]
            for line in named or lines:
                yield int(device), list(_events(line, module, bool(named)))
        return
    for plane in profile.planes:  # a processor's threads
        for line in plane.lines:
            yield 0, list(_events(line, module, False))


def _events(line: Any, module: str, operations_only: bool) -> Iterable[_Event]:
    for event in line.events:
        stats = dict(event.stats)
        if stats.get("hlo_module", module) != module or not (operations_only or "hlo_op" in stats):
            continue
        name = str(stats.get("hlo_op") or event.name).lstrip("%").split(" ", 1)[0]
        yield name, event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9, stats


def _own_times(events: list[_Event]) -> Iterator[tuple[str, dict[str, Any], float]]:
    """(operation, what is known, seconds without those of what runs inside it) of each event of a line."""
    around: list[list[Any]] = []  # those that an event is inside of, each with its own seconds so far
    for name, start, end, stats in sorted(events, key=lambda event: (event[1], -event[2])):
        while around and around[-1][2] <= start:
            done = around.pop()
            yield done[0], done[3], done[4]
        if around:
            end = min(end, around[-1][2])
            around[-1][4] -= end - start
        around.append([name, start, end, stats, end - start])
    for one in reversed(around):
        yield one[0], one[3], one[4]
