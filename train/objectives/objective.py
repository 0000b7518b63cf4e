"""What every objective shares: one pass over the rows, and the losses of the MTP block, the experts and the indexer.

Objectives differ in what the trunk is to make of the next tokens (`Objective.loss`). Technical report, section 4.2.2.
Documents packed into a row are told apart by segment ids: no target crosses from one into the next. Where a batch says
which tokens are trained, only those are targets; all are read, and count for the experts and the indexer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.layer_stack import by_layer
from v4_jax.outputs import Output, Routing
from v4_jax.train.batch import Batch
from v4_jax.train.teachers.settings import TeacherSettings
from v4_jax.transformer import Transformer

# Values of layers by the path of their parameters in the tree.
Arranged = list[tuple[tuple[str, ...], Any]]


class Weights(NamedTuple):
    """How much each loss counts; the next token's counts 1.

    Attributes:
      model: 0 where only the indexer learns, else 1.
      mtp: the token after the next.
      balance: sequence-wise balance of the experts.
      indexer: the indexer's divergence.
    """

    model: Any = 1.0
    mtp: Any = 0.3
    balance: Any = 1e-4
    indexer: Any = 0.0


class Decisions(struct.PyTreeNode):
    """Decisions to replay of a whole model.

    Attributes:
      trunk: of the trunk's layers.
      mtp: of the MTP block; None without one.
    """

    trunk: Routing
    mtp: Routing | None


class Sums(struct.PyTreeNode):
    """What is added up over the microbatches of a step.

    Attributes:
      loss: what the objective makes of the next tokens.
      mtp: negative log-probability of the tokens after them.
      balance: over rows and layers that choose their experts; None where it is no part of the loss.
      indexer: divergence over tokens and CSA layers; likewise.
      load: [layers, E] tokens of each expert, the MTP block's as the last layer; of DSpark's stages, theirs.
      statistics: of the objective, by name: over next tokens.
    """

    loss: Array
    mtp: Array
    balance: Array | None
    indexer: Array | None
    load: Array
    statistics: dict[str, Array]


class Counts(NamedTuple):
    """What the sums of a step are divided by, all microbatches together: at least 1 each.

    Attributes:
      loss: next tokens; of DSpark's stages, what all drafts count.
      mtp: tokens after the next; of DSpark's stages, blocks.
      rows: rows.
      tokens: tokens that are not padding.
    """

    loss: Array
    mtp: Array
    rows: int
    tokens: Array

    @classmethod
    def of(cls, batch: Batch) -> Counts:
        """The counts of a whole step's rows [..., B, S]."""
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch._replace(given=None))
        segments = rows.segment_ids
        following, after = (jnp.maximum(jnp.sum(targets(rows, n)), 1) for n in (1, 2))
        return cls(following, after, segments.shape[0], jnp.maximum(jnp.sum(segments > 0), 1))


class Objective(Protocol):
    """What is made of the next tokens. Its instances are settings, too: see `v4_jax.train.objectives.table`.

    Attributes:
      imitates: whether the model is to say what the data says. Where it is not, the MTP block learns to foresee it, and
        nothing else learns from that.
    """

    imitates: ClassVar[bool]

    @property
    def readers(self) -> Mapping[str, TeacherSettings]:
        """The models that read what is learnt, by name."""

    def loss(
        self, model: Transformer, params: Any, streams: Array, batch: Batch, shared: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of some rows [B, S], and what a person wants to know about it.

        A pure function, differentiable in `params` and `streams`.

        Args:
          model: the model.
          params: its parameters.
          streams: [B, S, hc, D] the trunk's `Output.streams`.
          batch: the rows, whose `targets(batch, 1)` count.
          shared: what all rows have in common, where the objective wants anything; else None.

        Returns:
          A float32 sum over the targets, and float32 sums of other numbers over them, by name.
        """


class Losses(Protocol):
    """What a step minimises."""

    def begin(self, config: Architecture, batch: Batch, step: Array) -> tuple[Batch, Counts]:
        """A step's rows [microbatches, B, S] with what is drawn for them in `given`, and its counts."""

    def total(
        self,
        model: Transformer,
        params: Any,
        batch: Batch,
        counts: Counts,
        weights: Weights,
        decisions: Decisions | None = None,
        shared: Any = None,
    ) -> tuple[Array, Sums]:
        """The loss of some rows of a step, as their share of the step's mean; see `total_loss`."""

    def arranged(self, config: Architecture, values: Array) -> Arranged:
        """Values of all layers that `Sums.load` has, as `v4_jax.layer_stack.by_layer` arranges them."""


@dataclasses.dataclass(frozen=True)
class OfNextTokens:
    """The losses of a model by an objective of next tokens. Arguments are as for `Losses`."""

    objective: Objective

    def begin(self, config: Architecture, batch: Batch, step: Array) -> tuple[Batch, Counts]:
        """Nothing is drawn."""
        del config, step
        return batch, Counts.of(batch)

    def total(self, *arguments: Any) -> tuple[Array, Sums]:
        """`total_loss`."""
        return total_loss(self.objective, *arguments)

    def arranged(self, config: Architecture, values: Array) -> Arranged:
        """The trunk's layers, and the MTP block's."""
        return by_layer(config, values)


def same_document(segment_ids: Array, ahead: int) -> Array:
    """[B, S] whether the token `ahead` further belongs to the same document."""
    return (segment_ids > 0) & (shift(segment_ids, ahead) == segment_ids)


def targets(batch: Batch, ahead: int) -> Array:
    """[B, S] whether the token `ahead` further is one to predict from here."""
    inside = same_document(batch.segment_ids, ahead)
    return inside if batch.trained is None else inside & shift(batch.trained, ahead)


def shift(x: Array, ahead: int) -> Array:
    """[B, S]: at each position the value `ahead` further, 0 beyond the end."""
    return jnp.pad(x[:, ahead:], [(0, 0), (0, ahead)])


def cross_entropy(model: Transformer, params: Any, streams: Array, batch: Batch, *, ahead: int) -> Array:
    """Negative log-probability of the targets so many tokens ahead: 1 of the trunk's streams, 2 of the MTP block's."""
    tokens, counted = shift(batch.tokens, ahead), targets(batch, ahead).astype(jnp.float32)
    found = model.apply({"params": params}, streams, tokens, counted, mtp=ahead == 2, method="cross_entropy")
    return cast(Array, found)


def total_loss(
    objective: Objective,
    model: Transformer,
    params: Any,
    batch: Batch,
    counts: Counts,
    weights: Weights,
    decisions: Decisions | None = None,
    shared: Any = None,
) -> tuple[Array, Sums]:
    """The loss of some rows of a step, as their share of the step's mean.

    Args:
      objective: what is made of the next tokens.
      model: a model whose stage computes the indexer's loss if that has a weight.
      params: its parameters.
      batch: the rows [B, S].
      counts: of the whole step.
      weights: of the losses.
      decisions: decisions to replay; by default the model takes them.
      shared: for the objective.

    Returns:
      The weighted loss, float32, and its parts as sums.
    """
    c = model.config
    trunk, mtp_block = _passes(model, params, batch)
    output = trunk(None if decisions is None else decisions.trunk)

    statistics, mtp = output.statistics, jnp.zeros(())
    loss, found = objective.loss(model, params, output.streams, batch, shared)
    balance, load = jnp.sum(statistics.balance), statistics.load
    if c.num_nextn_predict_layers:
        streams, own = output.streams, params
        if not objective.imitates:
            streams, own = jax.lax.stop_gradient(streams), jax.lax.stop_gradient(params) | {"mtp": params["mtp"]}
            mtp_block = _passes(model, own, batch)[1]
        drafted = mtp_block(streams, None if decisions is None else decisions.mtp)
        mtp = cross_entropy(model, own, drafted.streams, batch, ahead=2)
        balance = balance + jnp.sum(drafted.statistics.balance)
        load = jnp.concatenate([load, drafted.statistics.load])
    valid = batch.segment_ids > 0
    divergence = statistics.indexer_loss
    indexer = jnp.zeros(()) if divergence is None else jnp.sum(jnp.where(valid, divergence, 0))
    total = weights.model * (
        loss / counts.loss + weights.mtp * mtp / counts.mtp + weights.balance * balance / counts.rows
    )
    total = total + weights.indexer * indexer / counts.tokens
    return total, Sums(loss, mtp, balance, indexer, load, found)


def decide(model: Transformer, params: Any, batch: Batch) -> Decisions:
    """The experts that these parameters choose for some rows [B, S]."""
    trunk, mtp_block = _passes(model, params, batch)
    output = trunk(None)

    def experts(output: Output) -> Routing:
        return Routing(experts=cast(Routing, output.routing).experts)

    if not model.config.num_nextn_predict_layers:
        return Decisions(experts(output), None)
    return Decisions(experts(output), experts(mtp_block(output.streams, None)))


def _passes(model: Transformer, params: Any, batch: Batch) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The trunk, `(decisions) -> Output`, and the MTP block, `(streams, decisions) -> Output`, on some rows."""
    call: Any = functools.partial(
        model.apply, {"params": params}, segment_ids=batch.segment_ids, logits="none", return_routing=True
    )

    def trunk(decisions: Routing | None) -> Any:
        return call(batch.tokens, routing=decisions)

    def mtp_block(streams: Array, decisions: Routing | None) -> Any:
        return call(streams, shift(batch.tokens, 1), routing=decisions, method="mtp")

    return trunk, mtp_block


def balanced_layers(config: Architecture) -> int:
    """Layers that choose their experts, the MTP block's included: those that the balance is summed over."""
    layers = [*config.layers, *([config.draft_layer] if config.num_nextn_predict_layers else [])]
    return sum(layer.feed_forward == "routed" for layer in layers)


def value_and_grad(function: Any, params: Any) -> tuple[Any, Any]:
    """`jax.value_and_grad` with auxiliary output, of a tree with integer leaves, whose gradients are zeros."""
    leaves, tree = jax.tree.flatten(params)
    chosen = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def rejoined(floats: list[Array], others: list[Array]) -> Any:
        a, b = iter(floats), iter(others)
        return jax.tree.unflatten(tree, [next(a) if yes else next(b) for yes in chosen])

    floats = [leaf for leaf, yes in zip(leaves, chosen, strict=True) if yes]
    fixed = [leaf for leaf, yes in zip(leaves, chosen, strict=True) if not yes]
    value, grads = jax.value_and_grad(lambda floats: function(rejoined(floats, fixed)), has_aux=True)(floats)
    return value, rejoined(grads, [jnp.zeros_like(leaf) for leaf in fixed])
