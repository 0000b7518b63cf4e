"""Compiling the model for TPUs that are not there: the program, its arguments' shapes and places, and its cost.

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
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v4_jax.cache.cache import CacheDtype, cache_shapes
from v4_jax.config import Config
from v4_jax.number_formats import BlockScaled, layout, scale_shape
from v4_jax.on_mesh import UNIT
from v4_jax.outputs import Output
from v4_jax.parameter_tree import declarations, placements
from v4_jax.parameters import Parameter, is_parameter
from v4_jax.placement import Place, bytes_per_device
from v4_jax.planning import kernels
from v4_jax.planning.cycles import estimate
from v4_jax.planning.expectations import OnMean
from v4_jax.planning.hlo import Instruction, Program, collectives
from v4_jax.planning.hlo_costs import costs
from v4_jax.sharding.axes import resolve
from v4_jax.sharding.chips import GIB, Topology
from v4_jax.sharding.mesh import make_mesh
from v4_jax.sharding.split import Split

Task = Literal["prefill", "decode", "train"]
WeightFormat = Literal["native", "bfloat16"]

# What libtpu must find when it is loaded on a machine without TPUs; the rest keeps it quiet.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


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
class Workload:
    """A program to compile.

    Attributes:
      config: the architecture; an MTP block is trained, and left out otherwise (`without_mtp`).
      task: "decode" one token per row, or "prefill" a chunk of each, or "train", a step of whole rows.
      context: tokens of a row when the call is over, which is what its cache has room for.
      batch: rows.
      chunk: tokens per row and call; all of `context` in training.
      topology: the chips.
      mesh: sizes of the mesh axes.
      preset: the sharding preset.
      dtype: "native": weights in the released formats; "bfloat16": in that. The cache is bfloat16 in either case.
        Training computes in bfloat16, and keeps masters and moments in float32.
    """

    config: Config
    task: Task
    context: int
    batch: int
    chunk: int
    topology: Topology
    mesh: dict[str, int]
    preset: str
    dtype: WeightFormat

    @property
    def cache_dtype(self) -> CacheDtype:
        """Format of the cache: bfloat16, which holds what the release's rounding leaves exactly.

        Its own formats take 8-bit rows, and the TPU compiler copies a stack of those from one tiling to another around
        every write in the loop over layers (seen: 18 GB a token for Flash at a million); 16-bit rows stay in place.
        """
        return "bfloat16"

    @property
    def policy(self) -> str:
        """Precision of the computation."""
        return "released" if self.dtype == "native" else "bfloat16"

    @property
    def trains(self) -> bool:
        """Whether it is a training step."""
        return self.task == "train"

    @property
    def tokens(self) -> int:
        """Tokens of a call."""
        return self.batch * self.chunk

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


# ---- the program and its arguments -----------------------------------------------------------------------------------


def without_mtp(config: Config) -> Config:
    """The trunk alone."""
    return config.trunk()


def abstract_params(config: Config, mesh: Mesh | AbstractMesh, rules: Any, dtype: WeightFormat) -> Any:
    """Every parameter's shape, dtype and place: a tree of `jax.ShapeDtypeStruct`, and `BlockScaled` of such.

    Raises:
      ShardingError: a parameter that does not split evenly.
    """

    def arrays(parameter: Parameter, place: NamedSharding) -> Any:
        def array(shape: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, kind, sharding=place)

        shape, storage = parameter.shape, parameter.storage
        if storage in ("i64", "f32"):
            return array(shape, jnp.int32 if storage == "i64" else jnp.float32)
        held = None if dtype == "bfloat16" else layout(storage, config.expert_dtype)
        if held is None:
            return array(shape, jnp.bfloat16)
        return BlockScaled(array(shape, held.codes), array(scale_shape(shape, held.block), held.scales), held.block)

    return jax.tree.map(arrays, declarations(config), placements(config, mesh, rules), is_leaf=is_parameter)


def abstract_cache(workload: Workload, mesh: Mesh | AbstractMesh) -> Any:
    """The cache's shapes, dtypes and places."""
    return cache_shapes(
        workload.config, workload.batch, workload.context, dtype=workload.cache_dtype, mesh=mesh, rules=workload.preset
    )


def training(workload: Workload, mesh: Any) -> tuple[Any, Any]:
    """A training step, `(state, batch) -> (state, metrics)`, and its state's shapes and places.

    Args:
      workload: the workload.
      mesh: devices, or an abstract mesh where only the state is wanted.

    Raises:
      ShardingError: the model does not split evenly over the mesh.
    """
    from v4_jax.layers.stages import Stage
    from v4_jax.train.objectives.pretraining import Weights
    from v4_jax.train.optimizer import optimizer
    from v4_jax.train.step import abstract_state, make_step
    from v4_jax.transformer import Transformer

    transform = optimizer(workload.config, 2.7e-4, mesh=mesh, rules=workload.preset)
    state = abstract_state(workload.config, transform, Place(mesh, workload.preset))
    stage = Stage(dense=False, indexer_loss=True)
    model = Transformer(
        workload.config, policy=workload.policy, mesh=mesh, rules=workload.preset, stage=stage, remat="layers"
    )
    return make_step(model, transform, lambda step: Weights(indexer=1.0)), state


def trace(workload: Workload, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The workload's program for a mesh of TPU devices, traced; its weights, or training state; its cache, if any.

    Raises:
      ShardingError: the workload does not split evenly over the mesh.
    """
    from v4_jax.transformer import Transformer

    everywhere = NamedSharding(mesh, P())
    tokens = jax.ShapeDtypeStruct((workload.batch, workload.chunk), jnp.int32, sharding=everywhere)
    if workload.trains:
        from v4_jax.train.batch import Batch
        from v4_jax.train.step import jit_step

        step, state = training(workload, mesh)
        rows = jax.ShapeDtypeStruct((1, *tokens.shape), tokens.dtype, sharding=everywhere)
        return jit_step(step, state, Place(mesh, workload.preset)).trace(state, Batch(rows, rows)), state, None

    model = Transformer(workload.config, policy=workload.policy, mesh=mesh, rules=workload.preset)
    weights, cache = (
        abstract_params(workload.config, mesh, workload.preset, workload.dtype),
        abstract_cache(workload, mesh),
    )

    def call(params: Any, tokens: Any, cache: Any) -> Any:
        output = cast(Output, model.apply({"params": params}, tokens, cache=cache, logits="last"))
        return output.logits, output.cache

    return jax.jit(call, donate_argnums=2).trace(weights, tokens, cache), weights, cache


def compile_here(workload: Workload) -> Compiled:
    """Compiles a workload in this process, which was started with `ENVIRONMENT`."""
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name=str(workload.topology))
    mesh = make_mesh(workload.mesh, list(described.devices))
    traced, weights, cache = trace(workload, mesh)
    lowered = traced.lower()
    start = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - start

    text = compiled.as_text()
    if path := os.environ.get("V4_JAX_KEEP_PROGRAM"):  # for whoever wants to read it
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    program, memory = Program(text), compiled.memory_analysis()
    expected = _expected(workload, mesh, program)
    spent = costs(program, expected)
    in_kernels = kernels.cycles(traced.jaxpr, str(workload.topology), mesh)
    timed = estimate(program, in_kernels, workload.topology.chip.per_device(), expected)
    kinds: dict[str, Collectives] = {}
    for one in collectives(program, expected):
        runs, so_far = one.runs or 0, kinds.get(one.kind, Collectives(one.kind, 0, 0, 0))
        sums = (so_far.runs + runs, so_far.nbytes + runs * one.nbytes, so_far.sent + runs * one.sent)
        kinds[one.kind] = Collectives(one.kind, *sums)
    analysis = compiled.cost_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        weights=bytes_per_device(weights),
        cache=bytes_per_device(cache),
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
    last = [line for line in stderr.splitlines() if line.strip()][-1:]
    return f"the compiler ended with code {code}: {last[0] if last else 'it said nothing'}"


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
