"""Mixture of experts: hash or score routing, clamped SwiGLU experts, one shared expert.

Technical report, sections 2.1 and 4.2.3. The first layers route by a fixed table from token id to experts; the others
choose by affinity plus a load-balancing bias that never enters the weights. No token is dropped.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.config import Config, FeedForwardRole
from v4_jax.kernels.grouped_matmul.reference import map_groups
from v4_jax.kernels.grouped_matmul.tpu import grouped_matmul, supports
from v4_jax.layers.linear import linear
from v4_jax.layers.stages import keep
from v4_jax.outputs import Routing
from v4_jax.parameters import EXPERTS, Initializer, Module, normal
from v4_jax.policy import Policy, einsum
from v4_jax.sharding import collectives
from v4_jax.sharding.dispatch import Choices, visit
from v4_jax.sharding.split import Split

FEW_TOKENS = 1024  # up to so many, every device sees all tokens and computes its experts' share of them


class Experts(NamedTuple):
    """Routed expert weights, [E, out, in] each or [layers, E, out, in] when shared by a scan over layers."""

    w1: Any
    w2: Any
    w3: Any


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def swiglu(gate: Array, up: Array, limit: float) -> Array:
    """silu(min(gate, limit)) * clip(up, -limit, limit) in float32; computed again backwards, as `rms_norm` is."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def expert_ffn(
    x: Array, weights: Experts, scale: Array | None, limit: float, dtype: Any, product: Any = linear
) -> Array:
    """One expert on rows [T, D]: [T, D] float32. `scale` [T] multiplies the hidden activation before its rounding.

    Or each row's own expert, when `product` (of rows, weights and dtype) is a grouped one.
    """
    hidden = swiglu(product(x, weights.w1, dtype), product(x, weights.w3, dtype), limit)
    if scale is not None:
        hidden = hidden * scale[:, None]
    return product(hidden.astype(dtype), weights.w2, dtype).astype(jnp.float32)


class MixtureOfExperts(Module):
    """One feed-forward sublayer; `prefix` ends in `ffn.`."""

    config: Config
    policy: Policy
    role: FeedForwardRole

    @nn.compact
    def __call__(
        self,
        y: Array,
        tokens: Array,
        valid: Array,
        stacked: tuple[Experts, Any] | None = None,
        chosen: Array | None = None,
    ) -> tuple[Array, Routing]:
        """Routes and computes.

        Args:
          y: [B, S, D] normed, collapsed input.
          tokens: [B, S] int32 token ids, for hash routing; out-of-range ids read the nearest row of the table.
          valid: [B, S] bool; padding visits no expert.
          stacked: the expert weights of all layers of a scan and this layer's number among them, read in place of this
            module's own (which are the same values), so that no layer's experts are copied out of the stack.
          chosen: [B, S, top] expert ids to use instead of the router's choice, or None.

        Returns:
          Output [B, S, D], and the decisions without a layer axis.
        """
        c = self.config
        own = self._declare_experts()
        shared = self._declare_shared()
        affinities, default = self._route(y, tokens)
        chosen = default if chosen is None else chosen
        weights = jnp.take_along_axis(affinities, chosen, axis=-1)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True) * c.routed_scaling_factor

        flat = y.reshape(-1, c.hidden_size)
        experts, layer = (own, None) if stacked is None else stacked
        assigned = jnp.where(valid[..., None], chosen, c.n_routed_experts).reshape(flat.shape[0], -1)
        weights = weights.reshape(assigned.shape)
        routed = dispatch(flat, assigned, weights, experts, layer, c, self.policy.compute_dtype, self.split)
        everyone = expert_ffn(flat, shared, None, c.swiglu_limit, self.policy.compute_dtype)
        output = routed + collectives.psum(everyone, self.split.shared("mlp"))
        load = jnp.bincount(assigned.reshape(-1), length=c.n_routed_experts).astype(jnp.int32)
        load = collectives.psum(load, self.split.tokens)
        output = keep(output.astype(y.dtype).reshape(y.shape), "feed_forward")
        balance = jnp.zeros(y.shape[0]) if self.role == "hash" else self._balance(affinities, chosen, valid)
        return output, Routing(experts=chosen, affinities=affinities, load=load, balance=balance)

    def _balance(self, affinities: Array, chosen: Array, valid: Array) -> Array:
        """The sequence-wise balance [B] (DeepSeek-V3 technical report, equations 17 to 20): over experts, the sum of E
        times the share of the row's choices that fell on the expert, times the row's mean affinity for it.
        """
        c, sequence = self.config, self.split.sequence
        tokens = jnp.maximum(collectives.psum(jnp.sum(valid, axis=1), sequence), 1)[:, None]
        shares = affinities / jnp.sum(affinities, axis=-1, keepdims=True)
        mean = collectives.psum(jnp.sum(jnp.where(valid[..., None], shares, 0), axis=1), sequence) / tokens
        rows = jnp.arange(valid.shape[0])[:, None, None]
        counts = jnp.zeros(mean.shape).at[rows, chosen].add(valid[..., None].astype(jnp.float32))
        frequency = collectives.psum(counts, sequence) * c.n_routed_experts / (c.num_experts_per_tok * tokens)
        return jnp.sum(frequency * mean, axis=-1)

    def _route(self, y: Array, tokens: Array) -> tuple[Array, Array]:
        """Affinities [B, S, E] float32 and the experts chosen [B, S, top]."""
        c = self.config
        gate = self.declare(
            "gate",
            (c.n_routed_experts, c.hidden_size),
            (None, "embed"),
            released="gate.weight",
            storage="bf16",
            group="muon",
            init=normal(c),
        )
        logits = einsum("bsd,ed->bse", y, gate, dtype=jnp.float32)
        # The smallest normal number keeps the root's slope and the weights' sum finite where softplus underflows.
        affinities = jnp.sqrt(jnp.maximum(jax.nn.softplus(logits), jnp.finfo(jnp.float32).tiny))
        if self.role == "hash":
            table = self.declare(
                "tid2eid",
                (c.vocab_size, c.num_experts_per_tok),
                ("ids", None),
                released="gate.tid2eid",
                storage="i64",
                group="frozen",
                init=hash_table(c),
                dtype=jnp.int32,
            )
            return affinities, jnp.take(table, tokens, axis=0, mode="clip")
        bias = self.declare(
            "bias",
            (c.n_routed_experts,),
            (None,),
            released="gate.bias",
            storage="f32",
            group="bias",
            init=nn.initializers.zeros,
        )
        scores = jax.lax.stop_gradient(affinities + bias)
        return affinities, jax.lax.top_k(scores, c.num_experts_per_tok)[1]

    def _declare_experts(self) -> Experts:
        c = self.config

        def expert(name: str, out: int, into: int, axes: tuple[str, str]) -> Any:
            value = self.declare(
                name,
                (c.n_routed_experts, out, into),
                (EXPERTS, *axes),
                released="experts.{expert}." + name + ".weight",
                storage="expert",
                group="muon",
                init=normal(c),
                gather=False,
            )
            return self.split.gather(value, (None, *axes))

        d, hidden = c.hidden_size, c.moe_intermediate_size
        return Experts(
            expert("w1", hidden, d, ("expert_hidden", "expert_embed")),
            expert("w2", d, hidden, ("expert_embed", "expert_hidden")),
            expert("w3", hidden, d, ("expert_hidden", "expert_embed")),
        )

    def _declare_shared(self) -> Experts:
        c, d, hidden = self.config, self.config.hidden_size, self.config.moe_intermediate_size
        name = "shared_experts."
        return Experts(
            self.linear("shared_w1", (hidden, d), ("mlp", "embed"), config=c, released=name + "w1"),
            self.linear("shared_w2", (d, hidden), ("embed", "mlp"), config=c, released=name + "w2"),
            self.linear("shared_w3", (hidden, d), ("mlp", "embed"), config=c, released=name + "w3"),
        )


def dispatch(
    x: Array,
    assigned: Array,
    weights: Array,
    experts: Experts,
    layer: Any,
    config: Config,
    dtype: Any,
    split: Split,
) -> Array:
    """Computes every token's experts wherever they are, and sums them.

    Experts lie on the devices along `split.axes("experts")`. Along those of these axes that also split the tokens, few
    tokens visit all devices and many go to their experts' devices only; along the others every device has the same
    tokens and adds its experts' share.

    Args:
      x: [T, D].
      assigned: [T, K] expert of each choice; `n_routed_experts` for none.
      weights: [T, K] float32 routing weights.
      experts: this device's; see `MixtureOfExperts.__call__`.
      layer: layer number in stacked weights, or None.
      config: the architecture.
      dtype: compute dtype.
      split: where experts and tokens are.

    Returns:
      [T, D] float32.
    """
    owners = split.axes("experts")
    same = split.shared("experts")
    away = tuple(axis for axis in owners if axis not in same)
    own = config.n_routed_experts // split.count(owners)
    local = functools.partial(local_experts, count=own, limit=config.swiglu_limit)

    if x.shape[0] * split.count(away) <= FEW_TOKENS or not away:
        first = collectives.index(owners) * own
        rows, assigned, weights = (
            collectives.all_gather(array, away, 0) for array in (x.astype(dtype), assigned, weights)
        )
        here = (assigned >= first) & (assigned < first + own)
        total = local(rows, jnp.where(here, assigned - first, own), weights, experts, layer)
        return collectives.psum(collectives.reduce_scatter(total, away, 0), same)

    def work(rows: Array, extra: tuple[Array, Array], weights: tuple[Experts, Any]) -> Array:
        number, weight = extra  # counted from 1, so that slots without a row have none
        return local(rows, jnp.where(number > 0, number - 1, own)[:, None], weight[:, None], *weights)

    places = dict(
        zip(owners, jnp.unravel_index(assigned // own, [split.count((axis,)) for axis in owners]), strict=True)
    )
    mine = assigned < config.n_routed_experts
    for axis in same:
        mine &= places[axis] == collectives.index((axis,))
    owner = jnp.zeros_like(assigned)
    for axis in away:
        owner = owner * split.count((axis,)) + places[axis]
    owner = jnp.where(mine, owner, split.count(away))
    choices = Choices(owner, (assigned % own + 1, weights))
    total = visit(work, x.shape[-1], away, split.everywhere, x.astype(dtype), choices, (experts, layer))
    return collectives.psum(total, same)


def local_experts(
    x: Array, assigned: Array, weights: Array, experts: Experts, layer: Any, *, count: int, limit: float
) -> Array:
    """Sorts tokens by expert, computes, and sums each token's experts back.

    Args:
      x: [T, D] in the compute dtype.
      assigned: [T, K] which of this device's experts each choice is; `count` for none of them.
      weights: [T, K] float32 routing weights.
      experts: their weights; see `MixtureOfExperts.__call__`.
      layer: layer number in stacked weights, or None.
      count: experts of this device.
      limit: bound of the experts' activations.

    Returns:
      [T, D] float32.
    """
    tokens, top = assigned.shape
    order = jnp.argsort(assigned.reshape(-1), stable=True)
    sizes = jnp.bincount(assigned.reshape(-1), length=count).astype(jnp.int32)

    def run(rows: tuple[Array, Array], group: Experts) -> Array:
        return expert_ffn(rows[0], group, rows[1], limit, x.dtype)

    def run_all(rows: tuple[Array, Array], experts: Experts, sizes: Array, layer: Any) -> Array:
        def product(x: Array, weight: Any, dtype: Any) -> Array:
            return grouped_matmul(x.astype(dtype), weight, sizes, layer=layer)

        return expert_ffn(rows[0], experts, rows[1], limit, x.dtype, product)

    rows = (x[order // top], weights.reshape(-1)[order])
    kernel = run_all if all(supports(weight, x.dtype) for weight in experts) else None
    out = map_groups(run, rows, experts, sizes, layer=layer, width=x.shape[-1], kernel=kernel)
    back = jnp.argsort(order)
    return jnp.sum(out[back].reshape(tokens, top, -1), axis=1)


@functools.cache  # declarations compare initialisers by identity
def hash_table(config: Config) -> Initializer:
    """Initialiser of a fresh table [V, top]: distinct experts per token id, all experts equally often.

    The release ships its tables and not the rule behind them; this one spreads ids evenly.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        del key
        ids = jnp.arange(shape[0])[:, None] * shape[1] + jnp.arange(shape[1])
        return (ids % config.n_routed_experts).astype(dtype)

    return init
