"""The program that a plan compiles and a benchmark runs: what it computes, its arguments' shapes and places."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v4_jax import costs
from v4_jax.adapters import Adapters
from v4_jax.cache.cache import CacheDtype, cache_shapes
from v4_jax.config import Config
from v4_jax.draft_stages import DraftStages
from v4_jax.kernels.compiler_options import compiler_options
from v4_jax.layers.stages import Remat
from v4_jax.number_formats import BlockScaled, layout, scale_shape
from v4_jax.outputs import Output
from v4_jax.parameter_tree import declarations, placements
from v4_jax.parameters import Parameter, is_parameter
from v4_jax.placement import Place

Task = Literal["prefill", "decode", "train", "sft", "dspark"]
WeightFormat = Literal["native", "bfloat16"]
MomentumFormat = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a program computes, and how a mesh splits it, on devices of any kind.

    Attributes:
      config: the architecture; an MTP block is trained, and left out otherwise (`without_mtp`).
      task: "decode" one token per row, or "prefill" a chunk of each, or "train", a step of whole rows, or
        "sft", a step that trains adapters beside weights that stay as they are, or "dspark", one that trains DSpark's
        stages on a trunk that does.
      context: tokens of a row when the call is over, which is what its cache has room for.
      batch: rows.
      chunk: tokens per row and call; all of `context` in training.
      mesh: sizes of the mesh axes.
      preset: the sharding preset.
      dtype: "native": weights in the released formats; "bfloat16": in that. The cache is bfloat16 in either case.
        Training computes in bfloat16, and keeps masters and moments in float32: of an addition, where it trains one.
      remat: what training's backward pass computes again, see `layers.stages`.
      momentum_dtype: in which training keeps Muon's momentum.
    """

    config: Config
    task: Task
    context: int
    batch: int
    chunk: int
    mesh: dict[str, int]
    preset: str
    dtype: WeightFormat
    remat: Remat = dataclasses.field(default="sublayers", kw_only=True)
    momentum_dtype: MomentumFormat = dataclasses.field(default="float32", kw_only=True)

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
        return "released" if self.dtype == "native" and not self.trains else "bfloat16"

    @property
    def trains(self) -> bool:
        """Whether it is a training step."""
        return self.task in ("train", "sft", "dspark")

    @property
    def addition(self) -> Adapters | DraftStages | None:
        """What a step trains beside weights that stay as they are: what training settings say by default."""
        from v4_jax.train.settings import LoraSettings

        if self.task == "dspark":
            return DraftStages()
        return LoraSettings().adapters if self.task == "sft" else None

    @property
    def training_flops(self) -> int:
        """FLOPs of a training step per token, see `v4_jax.costs`: with adapters without their own."""
        from v4_jax.train.objectives.dspark import DSpark

        if self.task == "dspark":
            return costs.stage_training_flops(self.config, self.context, DSpark().anchors)
        return costs.training_flops(self.config, self.context, frozen=self.task == "sft")

    @property
    def tokens(self) -> int:
        """Tokens of a call."""
        return self.batch * self.chunk


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


def abstract_cache(job: Job, mesh: Mesh | AbstractMesh) -> Any:
    """The cache's shapes, dtypes and places."""
    return cache_shapes(job.config, job.batch, job.context, dtype=job.cache_dtype, mesh=mesh, rules=job.preset)


class Training(NamedTuple):
    """A training step.

    Attributes:
      step: `(state, batch) -> (state, metrics)`.
      transform: the optimiser.
      state: shapes and places of weights and the optimiser's state.
      base: those of weights beside which an addition is trained; None where there are none.
    """

    step: Any
    transform: Any
    state: Any
    base: Any


def training(job: Job, mesh: Any) -> Training:
    """The training step of a job.

    Args:
      job: the job.
      mesh: devices, or an abstract mesh where only the state is wanted.

    Raises:
      ShardingError: the model does not split evenly over the mesh.
    """
    from v4_jax.layers.stages import SPARSE, Stage
    from v4_jax.train.objectives.dspark import DSpark
    from v4_jax.train.objectives.objective import Weights
    from v4_jax.train.objectives.pretraining import Pretraining
    from v4_jax.train.optimizer import optimizer
    from v4_jax.train.step import abstract_state, make_step
    from v4_jax.transformer import Transformer

    addition, base, declared, drafts = job.addition, None, None, job.task == "dspark"
    if addition is not None:
        base = abstract_params(job.config.trunk() if drafts else job.config, mesh, job.preset, job.dtype)
        declared = addition.declarations(job.config)
    options: dict[str, Any] = dict(mesh=mesh, rules=job.preset, declared=declared)
    transform = optimizer(job.config, 2.7e-4, momentum_dtype=jnp.dtype(job.momentum_dtype), **options)
    state = abstract_state(job.config, transform, Place(mesh, job.preset), declared)
    stage = SPARSE if drafts else Stage(dense=False, indexer_loss=True)
    model = Transformer(job.config, policy=job.policy, mesh=mesh, rules=job.preset, stage=stage, remat=job.remat)
    objective = DSpark() if drafts else Pretraining()
    step = make_step(model, transform, lambda step: Weights(indexer=1.0), objective, addition=addition)
    return Training(step, transform, state, base)


class JobProgram(NamedTuple):
    """A job's program before it is traced.

    Attributes:
      function: `(weights, tokens, cache) -> (logits, cache)`, or `(state, batch, None, base) -> (state, metrics)`,
        jitted.
      arguments: shapes, dtypes and places of its arguments.
    """

    function: Any
    arguments: tuple[Any, ...]

    @property
    def weights(self) -> Any:
        """Of its arguments, the weights, or the training state and the base of an addition, if there is one."""
        state, *_, base = self.arguments
        return (state, base) if len(self.arguments) == 4 and base is not None else state

    @property
    def cache(self) -> Any:
        """Of its arguments, the cache; None in training."""
        return self.arguments[2]


def program_of(job: Job, mesh: Mesh) -> JobProgram:
    """The job's program for a mesh.

    Raises:
      ShardingError: the job does not split evenly over the mesh.
    """
    from v4_jax.transformer import Transformer

    everywhere = NamedSharding(mesh, P())
    tokens = jax.ShapeDtypeStruct((job.batch, job.chunk), jnp.int32, sharding=everywhere)
    if job.trains:
        from v4_jax.train.batch import Batch
        from v4_jax.train.step import jit_step

        step, _, state, base = training(job, mesh)
        rows = jax.ShapeDtypeStruct((1, *tokens.shape), tokens.dtype, sharding=everywhere)
        return JobProgram(jit_step(step, state, Place(mesh, job.preset)), (state, Batch(rows, rows), None, base))

    model = Transformer(job.config, policy=job.policy, mesh=mesh, rules=job.preset)
    weights, cache = abstract_params(job.config, mesh, job.preset, job.dtype), abstract_cache(job, mesh)

    def call(params: Any, tokens: Any, cache: Any) -> Any:
        output = cast(Output, model.apply({"params": params}, tokens, cache=cache, logits="last"))
        return output.logits, output.cache

    options = compiler_options("decoding" if job.task == "decode" else "prefill", Place(mesh, job.preset).platform)
    return JobProgram(jax.jit(call, donate_argnums=2, compiler_options=options), (weights, tokens, cache))
