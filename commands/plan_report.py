"""The report of a plan: what fits, what it costs, how far that is from the least, for people and for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from v4_jax.commands.info_report import make_table
from v4_jax.commands.shared.sizes import bytes_text, format_size, operations_text, seconds_text
from v4_jax.planning.compile import Compiled, OutOfMemory, PlanError, Workload
from v4_jax.planning.estimates import Estimate, Floor, Least, estimate, floor_of, least_work
from v4_jax.sharding.mesh import format_mesh

PARTS = 12  # parts of the estimate
SHOWN = 5  # heaviest instructions, and estimates that were not compiled

_STATE = {"train": "masters and moments", "sft": "weights and adapters", "dspark": "weights and stages"}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A workload that went to the compiler, and what it said.

    Attributes:
      workload: the workload.
      outcome: what was compiled, or why not.
    """

    workload: Workload
    outcome: Compiled | PlanError

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return isinstance(self.outcome, Compiled)

    @property
    def name(self) -> str:
        """Mesh and preset, and in training what is computed again."""
        remat = f" --remat {self.workload.remat}" if self.workload.trains else ""
        return f"--mesh {format_mesh(self.workload.mesh)} --preset {self.workload.preset}{remat}"

    def sentence(self) -> str:
        """Whether it fits, by how much, and why not."""
        if isinstance(self.outcome, Compiled):
            hbm = self.workload.topology.chip.per_device().hbm_bytes
            return f"fits: {bytes_text(self.outcome.live)} of {bytes_text(hbm)} {device(self.workload)}"
        return f"does not fit: {refusal(self.workload, self.outcome)}"


def device(workload: Workload) -> str:
    """What the numbers are of."""
    return "a chip" if workload.topology.chip.devices == 1 else "a device (half a chip)"


def refusal(workload: Workload, error: PlanError) -> str:
    """Why a workload cannot run, by how much, and what takes the room."""
    if not isinstance(error, OutOfMemory):
        return str(error)
    if error.required is None or error.available is None:
        return str(error)
    held = estimate(workload)
    arguments = f"weights take {bytes_text(held.weights)} and the cache {bytes_text(held.cache)} of the same memory"
    if workload.trains:
        arguments = f"{_STATE[workload.task]} take {bytes_text(held.weights)} of the same memory"
    what = "temporaries" if "temporaries" in str(error) else "the program"
    over = error.required - error.available
    return (
        f"{what} need {bytes_text(error.required)} of the {bytes_text(error.available)} that {device(workload)} has, "
        f"{bytes_text(over)} too much; {arguments}"
    )


# ---- for programs ----------------------------------------------------------------------------------------------------


def as_json(attempts: Sequence[Attempt], estimates: Sequence[Estimate]) -> dict[str, Any]:
    """A plan as plain numbers: bytes, FLOPs and seconds, each of one device and one call.

    Args:
      attempts: what was compiled, the last one being the recommendation if it fits.
      estimates: what else was considered, the most promising first.
    """
    workload, last = attempts[-1].workload, attempts[-1]
    described = workload.to_json()
    return {
        **{key: described[key] for key in ("task", "context", "batch", "chunk", "topology", "dtype")},
        "devices": workload.topology.devices,
        "chip": dataclasses.asdict(workload.topology.chip),
        "recommended": _choice(workload) if last.fits else None,
        "attempts": [_attempt_json(attempt) for attempt in attempts],
        "estimates": [
            {
                **{"mesh": format_mesh(one.workload.mesh), "preset": one.workload.preset, "weights": one.weights},
                **{"cache": one.cache, "fits": one.fits, "floor": dataclasses.asdict(one.floor)},
            }
            for one in estimates
        ],
    }


def _choice(workload: Workload) -> dict[str, Any]:
    """What a plan chooses, by the names of its options."""
    choice = {"mesh": format_mesh(workload.mesh), "preset": workload.preset}
    of_training = {"remat": workload.remat, "momentum_dtype": workload.momentum_dtype}
    return choice | of_training if workload.trains else choice


def _attempt_json(attempt: Attempt) -> dict[str, Any]:
    workload, outcome = attempt.workload, attempt.outcome
    card: dict[str, Any] = {**_choice(workload), "fits": attempt.fits}
    if isinstance(outcome, PlanError):
        sizes = (
            {"required": outcome.required, "available": outcome.available} if isinstance(outcome, OutOfMemory) else {}
        )
        return {**card, "error": refusal(workload, outcome), **sizes}
    floor, least = floor_of(workload, outcome), least_work(workload)
    return {
        **card,
        **dataclasses.asdict(outcome),
        "hbm_capacity": workload.topology.chip.per_device().hbm_bytes,
        "floor_s": floor.seconds,
        "floor": {**dataclasses.asdict(floor), "seconds": floor.seconds, "bound": floor.bound},
        "tokens_per_second": workload.tokens / outcome.estimate_s,
        "tokens_per_second_at_most": workload.tokens / floor.seconds,
        "least": {key: value / workload.topology.devices for key, value in dataclasses.asdict(least).items()},
    }


# ---- for people ------------------------------------------------------------------------------------------------------


def render(attempts: Sequence[Attempt], estimates: Sequence[Estimate]) -> RenderableType:
    """A plan as tables; see `as_json`."""
    last = attempts[-1]
    parts: list[RenderableType] = [Text(_title(last.workload))]
    if len(estimates) > 1:
        parts.append(_estimate_table(estimates, attempts))
    parts += [Text(f"{attempt.name} {attempt.sentence()}") for attempt in attempts]
    if isinstance(last.outcome, Compiled):
        parts += _tables(last.workload, last.outcome)
    return Group(*parts)


def _title(workload: Workload) -> str:
    count = f"{workload.topology.chips} chips" + (
        f", {workload.topology.devices} devices" if workload.topology.chip.devices > 1 else ""
    )
    rows = f"{workload.batch} row{'s' if workload.batch > 1 else ''}"
    taken = {"decode": "one token", "prefill": f"the last {format_size(workload.chunk)} tokens"}
    formats = f"{workload.dtype} weights"
    if workload.trains:
        beside = {"sft": "adapters", "dspark": "stages"}.get(workload.task)
        formats = f"{formats} and float32 {beside}" if beside else "float32 masters"
        formats += ", momentum in bfloat16" if workload.momentum_dtype == "bfloat16" else ""
        formats += ", computing in bfloat16"
    call = f"{taken.get(workload.task, 'a step')} of {rows} at {format_size(workload.context)} tokens"
    return f"{workload.task}: {call}, {formats}, on {workload.topology} ({count})"


def _tables(workload: Workload, compiled: Compiled) -> Iterator[RenderableType]:
    floor, least = floor_of(workload, compiled), least_work(workload)
    yield _memory_table(workload, compiled)
    yield _work_table(workload, compiled, floor, least)
    if compiled.collectives:
        yield _collective_table(compiled)
    yield _heaviest_table(compiled)
    yield _parts_table(compiled)
    yield Text(
        f"The compiler's estimate of a call is {seconds_text(compiled.estimate_s)}, "
        f"{workload.tokens / compiled.estimate_s:,.0f} tokens/s. None is faster than {seconds_text(floor.seconds)} "
        f"(bound by {_BOUNDS[floor.bound]}): at most {workload.tokens / floor.seconds:,.0f} tokens/s. "
        f"Compiled in {compiled.seconds:.0f} s; nothing was run."
    )


_BOUNDS = {"flops": "FLOPs", "hbm": "memory traffic", "ici": "the interconnect"}


def _estimate_table(estimates: Sequence[Estimate], attempts: Sequence[Attempt]) -> Table:
    shown = make_table(
        f"{len(estimates)} legal meshes, by estimate",
        *("mesh, preset", "weights", "cache", "FLOPs", "HBM", "ICI"),
        caption="times are floors of a call; estimated, not compiled",
    )
    tried = [(attempt.workload.mesh, attempt.workload.preset) for attempt in attempts]
    for one in estimates[: max(SHOWN, len(tried))]:
        mark = " *" if (one.workload.mesh, one.workload.preset) in tried else ""
        times = (seconds_text(getattr(one.floor, name)) for name in ("flops", "hbm", "ici"))
        name = f"{format_mesh(one.workload.mesh)} {one.workload.preset}{mark}"
        shown.add_row(name, bytes_text(one.weights), bytes_text(one.cache), *times)
    return shown


def _memory_table(workload: Workload, compiled: Compiled) -> Table:
    hbm = workload.topology.chip.per_device().hbm_bytes
    shown = make_table(f"Memory of {device(workload)}", "", "bytes", "share")
    rows = {
        _STATE.get(workload.task, "weights"): compiled.weights,
        "cache": compiled.cache,
        "padding, other arguments": compiled.arguments - compiled.weights - compiled.cache,
        "temporaries": compiled.temporaries,
        "together": compiled.peak,
        "in use at one time": compiled.live,
    }
    if workload.trains:
        del rows["cache"]
    for name, size in rows.items():
        shown.add_row(name, bytes_text(size), f"{size / hbm:.1%}", end_section=name == "temporaries")
    shown.add_row(f"{workload.topology.chip.name} has", bytes_text(hbm), "")
    return shown


def _work_table(workload: Workload, compiled: Compiled, floor: Floor, least: Least) -> Table:
    chip, devices = workload.topology.chip.per_device(), workload.topology.devices
    shown = make_table(
        f"Work of {device(workload)} per call",
        *("", "program", "least", "program / least", "at best", "floor"),
        caption="least: the algorithm's, evenly split; at best: vendor's figures; loops multiplied out",
    )
    moved = (least.weights + least.cache) / devices
    shown.add_row(
        "FLOPs",
        operations_text(compiled.flops),
        operations_text(least.flops / devices),
        f"{compiled.flops * devices / least.flops:,.2f}",
        f"{chip.flops / 1e12:,.0f} TFLOP/s",
        seconds_text(floor.flops),
    )
    shown.add_row(
        "memory traffic",
        bytes_text(compiled.hbm),
        bytes_text(moved),
        f"{compiled.hbm / moved:,.2f}",
        f"{chip.hbm_bandwidth / 1e9:,.0f} GB/s",
        seconds_text(floor.hbm),
    )
    sent = bytes_text(compiled.sent)
    shown.add_row("sent to others", sent, "", "", f"{chip.ici_bandwidth / 1e9:,.0f} GB/s", seconds_text(floor.ici))
    return shown


def _collective_table(compiled: Compiled) -> Table:
    shown = make_table("Collectives", "kind", "runs", "results", "sent")
    for kind in sorted(compiled.collectives, key=lambda kind: -kind.sent):
        shown.add_row(kind.kind, f"{kind.runs:,.0f}", bytes_text(kind.nbytes), bytes_text(kind.sent))
    return shown


def _heaviest_table(compiled: Compiled) -> Table:
    shown = make_table("Where memory traffic goes", "instruction", "runs", "traffic", "in")
    for nbytes, runs, opcode, result, op_name in compiled.heaviest[:SHOWN]:
        place = "/".join(op_name.rsplit("/", 4)[1:]) or "(the compiler's own)"
        shown.add_row(f"{opcode} {result}", f"{runs:,.0f}", bytes_text(nbytes), place)
    return shown


def _parts_table(compiled: Compiled) -> Table:
    shown = make_table(
        "Where time goes, by the compiler's estimate",
        *("part", "time", "share"),
        caption=f"{compiled.operations:,.0f} operations a call; "
        "collectives take 3 us and the time of their busiest link, less work beside"
        + (f", {', '.join(compiled.bounded)} as FLOPs and bytes alone" if compiled.bounded else ""),
    )
    first = list(compiled.parts.items())[:PARTS]
    rest = compiled.estimate_s - sum(seconds for _, seconds in first)
    rows = first if len(first) == len(compiled.parts) else [*first, ("everything else", rest)]
    for part, seconds in rows:
        shown.add_row(part, seconds_text(seconds), f"{seconds / compiled.estimate_s:.1%}")
    return shown
