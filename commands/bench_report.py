"""The report of a benchmark: measured time, memory and parts, and what the plan says of them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from v4_jax import __version__
from v4_jax.commands.info_report import make_table
from v4_jax.commands.shared.options import OptionalFile
from v4_jax.commands.shared.sizes import bytes_text, format_size, seconds_text, share_text
from v4_jax.planning.compile import Compiled, Workload
from v4_jax.planning.estimates import floor_of
from v4_jax.planning.job import Job
from v4_jax.planning.kernel_comparison import Comparison
from v4_jax.planning.measure import Executable
from v4_jax.planning.profile import Parts
from v4_jax.sharding.chips import Topology
from v4_jax.sharding.mesh import format_mesh

FORMAT = 1  # of the JSON: another number when a key changes its meaning
PARTS = 15  # shown; the JSON has all

JsonFile = Annotated[OptionalFile, tyro.conf.arg(name="json", metavar="FILE|-", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class Result:
    """A benchmark.

    Attributes:
      model: as it was named.
      layers_of_model: how many it has when it is whole.
      job: what ran.
      mesh: on which devices.
      topology: how they are wired; None where they are no TPUs that plan knows.
      executable: the program.
      weights: "random", or "checkpoint".
      warm_up: calls before those that count.
      times: seconds of each call that counts.
      peak: the most bytes of a device in use; None where devices do not say.
      finite: whether the last call's results were numbers.
      parts: where time went, or a sentence why that is not known.
      kernels: each against its reference, or a sentence why they were not compared.
      plan: what the plan says of the same program.
    """

    model: str
    layers_of_model: int
    job: Job
    mesh: Mesh
    topology: Topology | None
    executable: Executable
    weights: str
    warm_up: int
    times: list[float]
    peak: int | None
    finite: bool
    parts: Parts | str
    kernels: list[Comparison] | str
    plan: tuple[Workload, Compiled] | None

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.times)

    @property
    def kind(self) -> str:
        """What the devices are."""
        return self.mesh.devices.flat[0].device_kind

    @property
    def unplanned(self) -> str:
        """Why there is no estimate."""
        return f"there is no estimate for {self.kind}: plan knows TPUs alone"


# ---- for programs ----------------------------------------------------------------------------------------------------


def as_json(result: Result) -> dict[str, Any]:
    """A benchmark as plain values: bytes and seconds of one device and one call. docs/bench.md explains the keys."""
    job, executable = result.job, result.executable
    return {
        "format": FORMAT,
        "versions": _versions(),
        "devices": {
            "platform": result.mesh.devices.flat[0].platform,
            "kind": result.kind,
            "count": result.mesh.size,
            "processes": jax.process_count(),
            "topology": None if result.topology is None else str(result.topology),
            "host_cores": os.cpu_count(),
        },
        "settings": {
            "model": Path(result.model).name,
            "layers": job.config.num_hidden_layers,
            "layers_of_model": result.layers_of_model,
            **{name: getattr(job, name) for name in ("task", "context", "batch", "chunk", "dtype", "preset")},
            "mesh": format_mesh(job.mesh),
            "weights": result.weights,
        },
        "compile_s": executable.seconds,
        "memory": {**dataclasses.asdict(executable.memory), "peak_in_use": result.peak},
        "warm_up": result.warm_up,
        "times_s": result.times,
        "median_s": result.median,
        "tokens_per_second": job.tokens / result.median,
        "finite": result.finite,
        "parts": None if isinstance(result.parts, str) else _parts_json(result.parts),
        "kernels": None if isinstance(result.kernels, str) else [dataclasses.asdict(one) for one in result.kernels],
        "plan": None if result.plan is None else _plan_json(*result.plan),
    }


def _parts_json(parts: Parts) -> dict[str, Any]:
    return {"devices": parts.devices, "call_s": parts.call, "busy_s": parts.busy, "seconds": parts.seconds}


def _plan_json(workload: Workload, compiled: Compiled) -> dict[str, Any]:
    floor = floor_of(workload, compiled)
    return {
        "estimate_s": compiled.estimate_s,
        "floor_s": floor.seconds,
        "bound": floor.bound,
        "parts": compiled.parts,
        "bounded": list(compiled.bounded),
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"v4_jax": __version__}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


# ---- for people ------------------------------------------------------------------------------------------------------


def render(result: Result) -> RenderableType:
    """A benchmark as tables; see `as_json`."""
    return Group(*_blocks(result))


def _blocks(result: Result) -> Iterator[RenderableType]:
    yield Text(_title(result))
    yield _time_table(result)
    if result.plan is None:
        yield Text(result.unplanned)
    if isinstance(result.parts, str):
        yield Text(f"where time goes is not known: {result.parts}")
    else:
        yield _parts_table(result, result.parts)
    yield _memory_table(result)
    if isinstance(result.kernels, str):
        yield Text(f"kernels were not compared with their references: {result.kernels}")
    else:
        yield _kernel_table(result.kernels)
    if not result.finite:
        yield Text("the results were not all numbers: this was no computation to compare times of")


def _title(result: Result) -> str:
    job = result.job
    count = f"{result.mesh.size} device{'s' if result.mesh.size > 1 else ''}"
    layers = job.config.num_hidden_layers
    some = "" if layers == result.layers_of_model else f", the first {layers} of {result.layers_of_model} layers"
    rows = f"{job.batch} row{'s' if job.batch > 1 else ''}"
    weights = f"{_WEIGHTS[result.weights]} ({'float32 masters' if job.trains else job.dtype})"
    taken = {"decode": "one token", "prefill": f"the last {format_size(job.chunk)} tokens", "train": "a step"}
    return (
        f"{job.task}: {taken[job.task]} of {rows} at {format_size(job.context)} tokens of {Path(result.model).name}"
        f"{some}, {weights}, on {count} ({result.kind}) as "
        f"--mesh {format_mesh(job.mesh)} --preset {job.preset}"
    )


_WEIGHTS = {"random": "random weights", "checkpoint": "its own weights"}


def _time_table(result: Result) -> Table:
    shown = make_table(
        f"Time of a call, {len(result.times)} measured after {result.warm_up} to warm up",
        *("", "time", "tokens/s", "measured / this"),
    )
    rows = {"median": result.median, "fastest": min(result.times), "slowest": max(result.times)}
    if result.plan is not None:
        rows["plan's estimate"] = result.plan[1].estimate_s
        rows["plan's floor"] = floor_of(*result.plan).seconds
    for name, seconds in rows.items():
        ratio = f"{result.median / seconds:.2f}" if name.startswith("plan") else ""
        rate = f"{result.job.tokens / seconds:,.2f}"
        shown.add_row(name, seconds_text(seconds), rate, ratio, end_section=name == "slowest")
    return shown


def _parts_table(result: Result, parts: Parts) -> Table:
    planned = {} if result.plan is None else result.plan[1].parts
    columns = ("part", "time", "share", *(("plan's estimate",) if planned else ()))
    shown = make_table(
        "Where time goes, by the profiler",
        *columns,
        caption=f"of a device, {parts.devices} traced; operations that run beside each other count each",
    )

    def add(name: str, seconds: float, estimate: float) -> None:
        estimated = (seconds_text(estimate) if estimate else "",) if planned else ()
        shown.add_row(name, seconds_text(seconds), f"{seconds / parts.busy:.1%}", *estimated)

    first = dict(list(parts.seconds.items())[:PARTS])
    for name, seconds in first.items():
        add(name, seconds, planned.get(name, 0.0))
    if len(first) < len(parts.seconds):
        estimate = sum(time for name, time in planned.items() if name not in first)
        add("everything else", parts.busy - sum(first.values()), estimate)
    shown.add_section()
    add("together", parts.busy, sum(planned.values()))
    return shown


def _memory_table(result: Result) -> Table:
    memory = result.executable.memory
    shown = make_table("Memory of a device", "", "bytes")
    shown.add_row("arguments", bytes_text(memory.arguments))
    shown.add_row("temporaries", bytes_text(memory.temporaries))
    shown.add_row("together, by the compiler", bytes_text(memory.together))
    shown.add_row("most in use", "not told" if result.peak is None else bytes_text(result.peak))
    return shown


def _kernel_table(kernels: list[Comparison]) -> Table:
    shown = make_table(
        "Kernels against their references, alone and on the same operands",
        *("kernel", "of", "time", "reference", "reference / kernel", "difference", "unequal"),
        caption="largest difference of numbers, relative to the largest number; largest share of picks that differ",
    )
    for one in kernels:
        if one.seconds is None or one.reference_seconds is None:
            shown.add_row(one.name, one.shapes[0], one.error)
            continue
        times = seconds_text(one.seconds), seconds_text(one.reference_seconds)
        apart = one.error or ("" if one.difference is None else f"{one.difference:.1e}")
        unequal = "" if one.unequal is None else share_text(one.unequal)
        shown.add_row(one.name, one.shapes[0], *times, f"{one.reference_seconds / one.seconds:.2f}", apart, unequal)
    return shown
