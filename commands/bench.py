"""`v4-jax bench`: runs what `plan` compiles, on the devices that are there, and measures it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from v4_jax.commands import bench_report as card
from v4_jax.commands.info import config_of, holds_weights
from v4_jax.commands.shared import devices as here
from v4_jax.commands.shared.console import CommandError, bad_input, check_output, say, show, working
from v4_jax.commands.shared.jobs import job_of
from v4_jax.commands.shared.models import ModelDirectory
from v4_jax.commands.shared.options import Count, Flag, OptionalCount, OptionalFile, OptionalSize, OptionalText, Text
from v4_jax.commands.shared.profiling import check_profile
from v4_jax.commands.shared.sizes import bytes_text
from v4_jax.placement import Place
from v4_jax.planning import kernels
from v4_jax.planning.compile import Compiled, Workload, examine
from v4_jax.planning.estimates import candidates, presets_of
from v4_jax.planning.job import Job, Task
from v4_jax.planning.kernel_comparison import Comparison, comparisons
from v4_jax.planning.measure import Executable, Run, TooLarge, peak_bytes
from v4_jax.planning.profile import Parts, parts_of
from v4_jax.profiler import recorded
from v4_jax.sharding.axes import ShardingError
from v4_jax.sharding.chips import Topology, topology_of
from v4_jax.sharding.mesh import format_mesh, make_mesh

TRACED = 3  # calls that are traced for the parts


def bench(
    *,
    model: Text,
    task: Literal["decode", "prefill", "train"],
    layers: OptionalCount = None,
    context: OptionalSize = None,
    batch: Count = 1,
    mesh: OptionalText = None,
    preset: OptionalText = None,
    chunk: OptionalSize = None,
    dtype: Literal["native", "bfloat16"] = "native",
    steps: Count = 10,
    warm_up: Count = 2,
    profile: OptionalFile = None,
    json_file: card.JsonFile = None,
    kernels: Literal["auto", "yes", "no"] = "auto",
    distributed: Flag = False,
) -> None:
    """Measures the program that `v4-jax plan` estimates, on the devices that are there.

    Weights are those of the directory, if it has any, or random: with --layers and in training always.
    Prints the time of a call with its spread, tokens per second, memory, where the time goes by part, and on TPUs the
    plan's estimate and floor beside them, and each kernel against its reference. docs/bench.md says how to read the
    numbers, and how to send them in.

    Examples:
      v4-jax bench --model flash --task decode --context 1M --mesh tensor=8
      v4-jax bench --model flash --layers 4 --task prefill --context 32K
      v4-jax bench --model tiny --task train --context 1K --batch 2 --json results.json

    Args:
      model: A directory with a config.json, or flash, pro, flash-0731, pro-0813 or tiny.
      task: decode: one token of each row; prefill: a chunk of each row; train: a step of whole rows, MTP included.
      layers: Keep only the first layers of the model. Default: all.
      context: Tokens of each row after a call, such as 128K or 1M. Default: 1M, or 16K in training, or the model's
        most if that is less.
      batch: Rows.
      mesh: Sizes of the mesh axes data, seq, expert and tensor over all devices, such as seq=4,tensor=2. Default: the
        one that plan ranks first on TPUs, one device elsewhere.
      preset: Which mesh axes split what: decode, prefill, long-context or train. Default: what suits the task.
      chunk: Tokens of each row that one prefill call takes. Default: 8K, or 128 per device if that is more.
      dtype: native: weights in the released formats, computing with its rounding; bfloat16: both in that. Training
        keeps float32 masters and computes in bfloat16.
      steps: Calls that are timed, each waited for.
      warm_up: Calls before them.
      profile: A directory to keep the profiler's trace in. Default: it is read and removed.
      json_file: Write everything as one JSON object to a file, or to stdout for -, in place of the tables.
      kernels: Compare each kernel with its reference on the devices, which takes another compilation; auto: on TPUs.
      distributed: Join the other processes of the job, each with devices of its own.
    """
    if json_file is not None and str(json_file) != "-":
        check_output(json_file)
    check_profile(profile)
    whole = config_of(model)
    layers_of_model = whole.num_hidden_layers
    if layers is not None:
        with bad_input("--layers: "):
            whole = whole.first_layers(layers)
    here.enough_threads()
    here.join(distributed)
    job = job_of(
        whole,
        task,
        devices=jax.device_count() if mesh else 1,
        context=context,
        batch=batch,
        chunk=chunk,
        preset=preset,
        dtype=dtype,
    )
    job, made, topology = _placed(job, mesh, preset)
    executable = _compiled(job, made)
    weights = None if layers is not None or job.trains else _loaded(Path(model), executable)
    source = "random" if weights is None else "checkpoint"
    times, run = _timed(executable, weights, warm_up, steps)
    peak, finite, parts = peak_bytes(made), run.finite(), _parts(run, profile)
    del run, weights  # what follows has the devices to itself
    result = card.Result(
        model=model,
        layers_of_model=layers_of_model,
        job=job,
        mesh=made,
        topology=topology,
        executable=executable,
        weights=source,
        warm_up=warm_up,
        times=times,
        peak=peak,
        finite=finite,
        parts=parts,
        kernels=_kernels(job, made, kernels),
        plan=_planned(executable, topology),
    )
    if json_file is None or str(json_file) != "-":
        show(card.render(result))
    if json_file is not None and not jax.process_index():
        text = json.dumps(card.as_json(result), indent=2)
        if str(json_file) == "-":
            print(text)
        else:
            with bad_input():
                json_file.write_text(text + "\n")
            say(f"written: {json_file}")


def _placed(job: Job, mesh: str | None, preset: str | None) -> tuple[Job, Mesh, Topology | None]:
    """The job on a mesh: the one asked for, on TPUs otherwise the one that `plan` ranks first, or one device.

    Returns:
      the job, its devices, and how they are wired, where they are TPUs that `plan` knows.
    """
    every = jax.devices()
    topology = topology_of(every)
    if mesh is None and topology is not None and len(every) > 1:
        presets = (job.preset,) if preset else presets_of(job.task, job.config, len(every))
        found = candidates(Workload.of(job, topology), presets)
        if not found:
            raise CommandError(f"no mesh of {len(every)} devices splits {job.batch} rows of {job.chunk} tokens evenly")
        best = found[0].workload
        say(f"note: --mesh {format_mesh(best.mesh)}, which plan ranks first")
        job = dataclasses.replace(job, mesh=best.mesh, preset=best.preset)
        return job, make_mesh(job.mesh), topology
    made = here.place(job.config, mesh, job.preset, batch=job.batch, length=job.chunk, dtype=job.dtype).mesh  # type: ignore[arg-type]
    made = make_mesh(job.mesh, every[:1]) if made is None else made
    job = dataclasses.replace(job, mesh=dict(made.shape))
    return job, made, topology_of(list(made.devices.flat))


def _compiled(job: Job, mesh: Mesh) -> Executable:
    try:
        with working(f"compiling {job.task} on {format_mesh(job.mesh)}"):
            return Executable(job, mesh)
    except ShardingError as error:
        raise CommandError(str(error)) from None
    except TooLarge as error:
        raise CommandError(_no_room(job, error)) from None


def _no_room(job: Job, error: TooLarge) -> str:
    what = "masters and moments" if job.trains else "weights and cache"
    needs = f"its {what} take {bytes_text(error.held)}"
    if error.needed is not None and error.needed > error.held:
        needs = f"it needs {bytes_text(error.needed)}, of which {bytes_text(error.held)} are {what}"
    has = "more than there is" if error.free is None else f"and {bytes_text(error.free)} are free"
    return (
        f"the {_call(job.task)} has no room on each device: {needs}, {has}; expected fewer --layers, a smaller "
        "--context or --batch, or a --mesh of more devices"
    )


def _call(task: Task) -> str:
    return {"decode": "decode step", "prefill": "prefill chunk", "train": "training step"}[task]


def _loaded(path: Path, executable: Executable) -> Any:
    """The weights of a checkpoint; None where there is none, as for a model that is known by name alone."""
    if not holds_weights(path):
        return None
    job = executable.job
    loaded = ModelDirectory.open(path).load(job.dtype, Place(executable.mesh, job.preset))
    return {name: loaded[name] for name in executable.program.weights}  # what drafts is left out


def _timed(executable: Executable, weights: Any, warm_up: int, steps: int) -> tuple[list[float], Run]:
    """Seconds of the calls that count."""
    with working("making random numbers"):
        run = Run(executable, weights)
    with working("running"):
        for _ in range(warm_up):
            run.step()
        return [run.step() for _ in range(steps)], run


def _parts(run: Run, keep: Path | None) -> Parts | str:
    """Where the time of some more calls goes, or why that is not known."""
    with working("tracing"), _folder(keep) as folder:
        with recorded(folder):
            times = [run.step() for _ in range(TRACED)]
        try:
            return parts_of(folder, run.executable.compiled, times)
        except ValueError as error:
            return str(error)


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _kernels(job: Job, mesh: Mesh, wanted: Literal["auto", "yes", "no"]) -> list[Comparison] | str:
    """How each kernel compares with its reference, or why that is not known."""
    platform = mesh.devices.flat[0].platform
    if wanted == "no":
        return "--kernels no leaves them out"
    if wanted == "auto" and platform != "tpu":
        return f"Pallas kernels are for TPUs; --kernels yes compares other forms that are chosen on {platform}"
    if jax.process_count() > 1:
        return "they are compared on the devices of one process alone"
    try:
        with working("comparing kernels with their references"):
            return comparisons(job, mesh) or f"none is chosen for this program on {platform}"
    except TooLarge as error:
        return _no_room(job, error)


def _planned(executable: Executable, topology: Topology | None) -> tuple[Workload, Compiled] | None:
    """What `plan` says of the very program that was measured; None for devices that it does not know."""
    if topology is None:
        return None
    workload = Workload.of(executable.job, topology)
    with working("estimating"):
        return workload, examine(
            workload,
            executable.mesh,
            executable.program,
            kernels.cycles(executable.traced.jaxpr, str(topology), executable.mesh),
            executable.compiled,
            executable.seconds,
        )
