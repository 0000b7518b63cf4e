"""Compiling a job for TPUs that are not there, and what the compiled program needs and costs.

The compiler runs in a process of its own: it must be told about the machine before jax starts, it talks a lot on
stderr, and an input that it cannot handle may end the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import jax
from jax.sharding import Mesh

from v4_jax.config import Config
from v4_jax.on_mesh import UNIT
from v4_jax.placement import bytes_per_device
from v4_jax.planning import kernels
from v4_jax.planning.cycles import estimate
from v4_jax.planning.expectations import OnMean
from v4_jax.planning.hlo import Instruction, Program
from v4_jax.planning.hlo_collectives import collectives
from v4_jax.planning.hlo_costs import costs
from v4_jax.planning.job import Job, JobProgram, program_of
from v4_jax.planning.kernels import ENVIRONMENT
from v4_jax.planning.links import Links
from v4_jax.sharding.axes import resolve
from v4_jax.sharding.chips import GIB, Topology
from v4_jax.sharding.mesh import make_mesh
from v4_jax.sharding.split import Split


class PlanError(Exception):
    """A program that cannot be compiled. The message is a sentence for the user."""


class MissingCompiler(PlanError):
    """libtpu is not installed."""


class OutOfMemory(PlanError):
    """The program needs more memory than a device has.

    Attributes:
      required: bytes that the compiler found no room for, or None where it does not say.
      available: bytes that it had for them.
    """

    def __init__(self, message: str, required: float | None = None, available: float | None = None):
        super().__init__(message)
        self.required, self.available = required, available


@dataclasses.dataclass(frozen=True)
class Workload(Job):
    """A program to compile for TPUs.

    Attributes:
      topology: the chips.
    """

    topology: Topology

    @classmethod
    def of(cls, job: Job, topology: Topology) -> Workload:
        """A job, on TPUs that are wired so."""
        fields = {field.name: getattr(job, field.name) for field in dataclasses.fields(Job)}
        return cls(**fields, topology=topology)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"config": self.config.to_hf(), "topology": str(self.topology)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Workload:
        """Inverse of `to_json`."""
        parsed = {"config": Config.from_hf(values["config"]), "topology": Topology.parse(values["topology"])}
        return cls(**values | parsed)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """All collectives of one kind in a call of the program, on one device.

    Attributes:
      kind: see `v4_jax.planning.hlo.KINDS`.
      runs: how many, loops multiplied out.
      nbytes: bytes of their results.
      sent: bytes that the device sends, by the pattern that sends the least.
    """

    kind: str
    runs: float
    nbytes: float
    sent: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a workload; all numbers are of one device and one call.

    Attributes:
      weights: bytes.
      cache: bytes.
      arguments: bytes of all arguments as they lie in memory, padding included.
      temporaries: bytes.
      peak: bytes of arguments, temporaries, and results that do not replace an argument.
      live: the most bytes of those that are in use at one time, by the compiler's count.
      flops: FLOPs of matrix products, loops multiplied out.
      hbm: bytes read from and written to memory, loops multiplied out.
      collectives: by kind.
      heaviest: the instructions that move most bytes: (bytes, runs, opcode, result, op_name).
      estimate_s: seconds of a call by the compiler's estimate, see `v4_jax.planning.cycles`.
      operations: how many it runs, loops multiplied out.
      parts: seconds of that estimate by named scope, the longest first.
      bounded: Pallas kernels in it that count as FLOPs and bytes alone.
      compiler_flops: FLOPs by the compiler's own count, in which a loop's body counts once.
      compiler_hbm: bytes likewise.
      seconds: time that the compiler took.
    """

    weights: int
    cache: int
    arguments: int
    temporaries: int
    peak: int
    live: int
    flops: float
    hbm: float
    collectives: tuple[Collectives, ...]
    heaviest: tuple[tuple[float, float, str, str, str], ...]
    estimate_s: float
    operations: float
    parts: dict[str, float]
    bounded: tuple[str, ...]
    compiler_flops: float
    compiler_hbm: float
    seconds: float

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(kind.sent for kind in self.collectives)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Compiled:
        """Inverse of `dataclasses.asdict`."""
        kinds = tuple(Collectives(**kind) for kind in values["collectives"])
        tuples = {"heaviest": tuple(map(tuple, values["heaviest"])), "bounded": tuple(values["bounded"])}
        return cls(**values | {"collectives": kinds} | tuples)


# ---- in this process -------------------------------------------------------------------------------------------------


def compile_here(workload: Workload) -> Compiled:
    """Compiles a workload in this process, which was started with `ENVIRONMENT`."""
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name=str(workload.topology))
    mesh = make_mesh(workload.mesh, list(described.devices))
    program = program_of(workload, mesh)
    traced = program.function.trace(*program.arguments)
    # First, since it takes gigabytes, too, and this process gives none of the compiler's back.
    in_kernels = kernels.cycles(traced.jaxpr, str(workload.topology), mesh)
    lowered = traced.lower()
    start = time.monotonic()
    compiled = lowered.compile()
    return examine(workload, mesh, program, in_kernels, compiled, time.monotonic() - start)


def examine(
    workload: Workload,
    mesh: Mesh,
    program: JobProgram,
    in_kernels: dict[kernels.Likeness, kernels.Cycles],
    compiled: Any,
    seconds: float,
) -> Compiled:
    """What a compiled program needs and costs.

    Args:
      workload: what it computes.
      mesh: its devices.
      program: its program.
      in_kernels: cycles of its kernels.
      compiled: what the compiler made of it.
      seconds: time that the compiler took.
    """
    text = compiled.as_text()
    if path := os.environ.get("V4_JAX_KEEP_PROGRAM"):  # for whoever wants to read it
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    read, memory = Program(text), compiled.memory_analysis()
    expected = _expected(workload, mesh, read)
    spent = costs(read, expected)
    links = Links.between(list(mesh.devices.flat), workload.topology)
    timed = estimate(read, in_kernels, links, expected)
    kinds: dict[str, Collectives] = {}
    for one in collectives(read, expected):
        runs, so_far = one.runs or 0, kinds.get(one.kind, Collectives(one.kind, 0, 0, 0))
        sums = (so_far.runs + runs, so_far.nbytes + runs * one.nbytes, so_far.sent + runs * one.sent)
        kinds[one.kind] = Collectives(one.kind, *sums)
    analysis = compiled.cost_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        weights=bytes_per_device(program.weights),
        cache=bytes_per_device(program.cache),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes + memory.temp_size_in_bytes + results,
        live=memory.peak_memory_in_bytes,
        flops=sum(cost.flops for cost in spent),
        hbm=sum(cost.nbytes for cost in spent),
        collectives=tuple(kinds.values()),
        heaviest=tuple(
            (cost.nbytes, cost.runs, cost.instruction.opcode, _result(cost.instruction), cost.instruction.op_name)
            for cost in sorted(spent, key=lambda cost: -cost.nbytes)[:10]
        ),
        estimate_s=timed.seconds,
        operations=timed.operations,
        parts=timed.parts,
        bounded=timed.bounded,
        compiler_flops=float(analysis.get("flops", 0)),
        compiler_hbm=float(analysis.get("bytes accessed", 0)),
        seconds=seconds,
    )


def _expected(workload: Workload, mesh: Mesh, program: Program) -> OnMean:
    split = Split.on(mesh, resolve(workload.preset), workload.chunk, UNIT)
    rows = max(1, workload.batch // split.count(split.axes("batch")))
    return OnMean(program, workload.config, workload.tokens, rows, workload.task == "decode", split)


def _result(instruction: Instruction) -> str:
    return ", ".join(f"{shape.dtype}[{','.join(map(str, shape.dimensions))}]" for shape in instruction.shapes[:2])


# ---- the compiler's process ------------------------------------------------------------------------------------------


def compile_for_tpu(workload: Workload) -> Compiled:
    """Compiles a workload.

    Raises:
      MissingCompiler: libtpu is not installed.
      OutOfMemory: the program does not fit.
      PlanError: the compiler cannot compile it.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise MissingCompiler("the TPU compiler is not installed; it comes with pip install 'v4-jax[tpu]'")
    run = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(workload.to_json()),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    with contextlib.suppress(ValueError, IndexError):
        reply = json.loads(run.stdout.splitlines()[-1])
        if "error" in reply:
            raise _refusal(reply["error"])
        return Compiled.from_json(reply)
    raise PlanError(_crash(run.returncode, run.stderr))


def _refusal(message: str) -> PlanError:
    """The compiler's error as one of ours."""
    if "RESOURCE_EXHAUSTED" not in message:
        return PlanError(f"the compiler refuses the program: {_first(message)}")
    sizes = re.search(r"\(?([\d.]+)([KMGT])\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMGT])", message)
    if not sizes:
        return OutOfMemory(_first(message))
    unit = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    required, available = float(sizes[1]) * unit[sizes[2]], float(sizes[3]) * unit[sizes[4]]
    return OutOfMemory(_first(message), required, available)


def _crash(code: int, stderr: str) -> str:
    """A sentence about a compiler that ended without an answer."""
    if check := re.search(r"Check failed: (.*)", stderr):
        where = re.search(r'op_name="([^"]*)"', check[1])
        place = f" at {where[1]}" if where else ""
        return f"the compiler crashed{place}: {check[1].split(', metadata=')[0]}"
    if code < 0:
        return f"the compiler was ended by {signal.Signals(-code).name}, as when the machine runs out of memory"
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    said = (errors or lines or ["it said nothing"])[-1]
    return f"the compiler ended with code {code}: {said}"


def _first(message: str) -> str:
    """The first sentence of a long message."""
    return message.strip().splitlines()[0].rstrip(".")[:500]


def main() -> None:
    """Reads a workload from stdin and writes what became of it as the last line of stdout."""
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries that print do not get in the way
    workload = Workload.from_json(json.load(sys.stdin))
    try:
        reply = dataclasses.asdict(compile_here(workload))
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        if os.environ.get("V4_JAX_DEBUG"):
            raise
        reply = {"error": str(error)}
    answer.write("\n" + json.dumps(reply) + "\n")
    answer.flush()


if __name__ == "__main__":
    main()
