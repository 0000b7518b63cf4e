"""One training step: gradients over microbatches, one update, and what a person wants to know about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.kernels.compiler_options import compiler_options
from v4_jax.parameters import is_parameter, places
from v4_jax.placement import Place
from v4_jax.policy import Policy
from v4_jax.sharding.axes import resolve
from v4_jax.train.batch import Batch
from v4_jax.train.objectives.dspark import DSpark
from v4_jax.train.objectives.objective import (
    Arranged,
    Counts,
    Decisions,
    Objective,
    Sums,
    Weights,
    balanced_layers,
    decide,
    value_and_grad,
)
from v4_jax.train.objectives.pretraining import Pretraining
from v4_jax.train.objectives.table import losses_of
from v4_jax.train.optimizer import state_placements, whole
from v4_jax.train.precision import compute_copy
from v4_jax.transformer import Transformer

Metrics = dict[str, Array]

PRETRAINING = Pretraining()


class Addition(Protocol):
    """What is trained beside a base that stays as it is: `Adapters`, or `DraftStages`."""

    def declarations(self, config: Architecture) -> Any:
        """A tree of the declarations of what is trained."""

    def onto(self, base: Any, trained: Any) -> Any:
        """The model's parameters, of those of the base and of the tree of `declarations`, unboxed."""


class TrainState(struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
      step: int32 steps done.
      params: float32 master weights; of a run that trains an addition to the model, the addition alone.
      optimizer: the optimiser's state.
    """

    step: Array
    params: Any
    optimizer: Any


def abstract_state(
    config: Architecture, transform: optax.GradientTransformation, place: Place, declared: Any = None
) -> TrainState:
    """The state's shapes and places, as `jax.ShapeDtypeStruct`s: float32 masters, and what the optimiser keeps.

    Args:
      config: the architecture.
      transform: the optimiser.
      place: where both lie.
      declared: as for `v4_jax.train.optimizer.optimizer`.
    """
    declared = whole(config) if declared is None else declared
    params = jax.tree.map(lambda p: p.value, declared, is_leaf=is_parameter)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, params, jax.eval_shape(transform.init, params))
    mesh, rules = place.mesh, place.rules
    placed: Any
    if mesh is None:
        placed = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), state)
    else:
        everywhere: Any = place.replicated
        of_optimizer = state_placements(declared, transform, mesh, rules)
        placed = TrainState(everywhere, places(declared, mesh, resolve(rules)), of_optimizer)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, placed)


def make_step(
    model: Transformer,
    transform: optax.GradientTransformation,
    weights: Callable[[Array], Weights],
    objective: Objective | DSpark = PRETRAINING,
    *,
    fp4_experts: bool = False,
    addition: Addition | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A function of state, batch, experts to use, and the base of an addition, to be jitted.

    The batch is [microbatches, B, S]; gradients add up in float32. Where the loss or the gradient is not finite the
    state stays as it was, and the metrics say so.

    Args:
      model: the model, on a mesh or not.
      transform: see `v4_jax.train.optimizer.optimizer`.
      weights: of the losses, by step.
      objective: what is made of the next tokens.
      fp4_experts: see `v4_jax.train.precision.compute_copy`.
      addition: what is trained, beside a base that is not: any parameters, which the step is given; None trains the
        whole model.
    """
    losses = losses_of(objective)
    parts = make_partial_step(model, transform, weights, objective, fp4_experts=fp4_experts, addition=addition)

    def step(
        state: TrainState, batch: Batch, decisions: Decisions | None = None, base: Any = None
    ) -> tuple[TrainState, Metrics]:
        batch, counts = losses.begin(model.config, batch, state.step)

        def one(batch: Batch, decisions: Decisions | None) -> Any:
            return parts.gradient(state, batch, counts, decisions, None, base)

        if batch.tokens.shape[0] == 1:
            found = one(*jax.tree.map(lambda x: x[0], (batch, decisions)))
        else:
            found = _accumulated(one, batch, decisions)
        return parts.update(state, found, counts)

    return step


class PartialStep(NamedTuple):
    """A step in parts, of which the program that calls them adds up the gradients.

    Attributes:
      gradient: `(state, batch, counts, decisions=None, shared=None, base=None)` -> loss, sums and gradient of rows
        [B, S], whose share of the step's counts they are; `shared` is for the objective, `base` is that of an addition.
      update: `(state, what `gradient` returned, added up, counts)` -> state and metrics.
    """

    gradient: Callable[..., Any]
    update: Callable[..., tuple[TrainState, Metrics]]


def make_partial_step(
    model: Transformer,
    transform: optax.GradientTransformation,
    weights: Callable[[Array], Weights],
    objective: Objective | DSpark = PRETRAINING,
    *,
    fp4_experts: bool = False,
    addition: Addition | None = None,
) -> PartialStep:
    """The parts of `make_step`, whose arguments are the same."""
    config, policy = model.config, Policy.of(model.policy)
    declared = whole(config) if addition is None else addition.declarations(config)
    losses = losses_of(objective)

    def gradient(
        state: TrainState,
        batch: Batch,
        counts: Counts,
        decisions: Decisions | None = None,
        shared: Any = None,
        base: Any = None,
    ) -> Any:
        now = weights(state.step)

        def loss(trained: Any) -> tuple[Array, Sums]:
            params = trained if addition is None else addition.onto(base, trained)
            params = compute_copy(params, config, policy, fp4_experts=fp4_experts)
            return losses.total(model, params, batch, counts, now, decisions, shared)

        return value_and_grad(loss, state.params)

    @jax.named_scope("optimizer.update")
    def update(state: TrainState, found: Any, counts: Counts) -> tuple[TrainState, Metrics]:
        (total, sums), grads = found
        grads = _with_loads(declared, grads, losses.arranged(config, sums.load))
        updates, optimizer = transform.update(grads, state.optimizer, state.params)
        after = TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer)
        metrics = _metrics(config, counts, sums) | _sizes(declared, grads, updates) | {"total_loss": total}
        finite = jnp.isfinite(total) & jnp.isfinite(metrics["gradient_norm"])
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return after, metrics | {"finite": finite}

    return PartialStep(gradient, update)


class JittedParts:
    """A `PartialStep` as programs that a host calls one after another: for rows that share something only in groups.

    Args:
      step: the step.
      state: from `abstract_state`.
      place: where both lie.
    """

    def __init__(self, step: PartialStep, state: TrainState, place: Place) -> None:
        self._step, self._place = step, place
        self._places = jax.tree.map(lambda x: x.sharding, state)
        options = compiler_options("training", place.platform)
        found = ((place.replicated, place.replicated), self._places.params)

        def add(found: Any, *arguments: Any) -> Any:
            return jax.tree.map(jnp.add, found, step.gradient(*arguments))

        self._begin = jax.jit(self._zeros, out_shardings=found)
        self._add = jax.jit(add, donate_argnums=0, out_shardings=found, compiler_options=options)
        after = (self._places, place.replicated)
        self._update = jax.jit(step.update, donate_argnums=0, out_shardings=after, compiler_options=options)

    def _zeros(self, *arguments: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(self._step.gradient, *arguments))

    def __call__(
        self,
        state: TrainState,
        parts: Iterable[tuple[Batch, Decisions | None, Any]],
        counts: Counts,
        base: Any = None,
    ) -> tuple[TrainState, Metrics]:
        """Takes a step.

        Args:
          state: which the next one takes the place of.
          parts: rows [B, S], decisions to replay and what the rows share, of each part, all of one shape; drawn when
            they are needed.
          counts: of all of them together.
          base: that of an addition.
        """
        found = None
        for batch, decisions, shared in parts:
            arguments = state, batch, counts, decisions, shared, base
            found = self._add(self._begin(*arguments) if found is None else found, *arguments)
        return self._update(state, found, counts)


def jit_step(step: Any, state: TrainState, place: Place) -> Any:
    """What `make_step` returns, jitted: the state takes the place of the one before, its metrics are on every device.

    Args:
      step: the function.
      state: from `abstract_state`.
      place: where both lie.
    """
    placed = jax.tree.map(lambda x: x.sharding, state)
    options = compiler_options("training", place.platform)
    return jax.jit(step, donate_argnums=0, out_shardings=(placed, place.replicated), compiler_options=options)


def make_decide(
    model: Transformer, *, fp4_experts: bool = False, addition: Addition | None = None
) -> Callable[..., Decisions]:
    """A function of parameters, batch and the base of an addition that says which experts are chosen, to be jitted; as
    for `make_step`."""

    def run(trained: Any, batch: Batch, base: Any = None) -> Decisions:
        params = trained if addition is None else addition.onto(base, trained)
        params = compute_copy(params, model.config, Policy.of(model.policy), fp4_experts=fp4_experts)
        return jax.lax.map(lambda rows: decide(model, params, rows), batch)

    return run


def _accumulated(one: Callable[[Batch, Decisions | None], Any], batch: Batch, decisions: Decisions | None) -> Any:
    """Sum of `one` over microbatches."""
    first = jax.tree.map(lambda x: x[0], (batch, decisions))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, *first))

    def add(total: Any, x: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*x)), None

    return jax.lax.scan(add, zeros, (batch, decisions))[0]


def _with_loads(declared: Any, grads: Any, arranged: Arranged) -> Any:
    """The gradients, with each expert's tokens in place of the gradient of its router's bias."""

    def replace(path: Any, parameter: Any, grad: Array) -> Array:
        if parameter.group != "bias":
            return grad
        names = tuple(entry.key for entry in path)
        return next(value for prefix, value in arranged if names[: len(prefix)] == prefix).astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(replace, declared, grads, is_leaf=is_parameter)


def _metrics(config: Architecture, counts: Counts, sums: Sums) -> Metrics:
    """Losses as means, and how far the fullest expert is from the mean."""
    load = sums.load.astype(jnp.float32)
    excess = jnp.max(load, axis=1) / jnp.maximum(jnp.mean(load, axis=1), 1) - 1
    found = {
        "loss": sums.loss / counts.loss,
        "expert_load_excess": jnp.mean(excess),
        "expert_load_excess_max": jnp.max(excess),
        "expert_unused": jnp.mean(load == 0),
        "tokens": counts.tokens,
    } | {name: value / counts.loss for name, value in sums.statistics.items()}
    if sums.balance is not None:
        found["balance"] = sums.balance / (counts.rows * max(1, balanced_layers(config)))
    if config.num_nextn_predict_layers:
        found["mtp_loss"] = sums.mtp / counts.mtp
    indexers = sum(layer.attention == "csa" for layer in config.layers)
    if indexers and sums.indexer is not None:
        found["indexer_loss"] = sums.indexer / (counts.tokens * indexers)
    return found


def _sizes(declared: Any, grads: Any, updates: Any) -> Metrics:
    """Norm of the gradient, and root mean square of the updates, by optimiser group."""
    parameters = jax.tree.leaves(declared, is_leaf=is_parameter)
    found: Metrics = {}
    pairs = list(zip(parameters, *map(jax.tree.leaves, (grads, updates)), strict=True))
    trained = [(p, g, u) for p, g, u in pairs if p.group in ("muon", "adamw")]
    found["gradient_norm"] = optax.tree.norm([g for _, g, _ in trained])
    for group in ("muon", "adamw"):
        if of_group := [u for p, _, u in trained if p.group == group]:
            found[f"update_rms_{group}"] = optax.tree.norm(of_group) / sum(u.size for u in of_group) ** 0.5
    return found
