"""Mixture of experts: hash or score routing, clamped SwiGLU experts, one shared expert.

Technical report, sections 2.1 and 4.2.3. The first layers route by a fixed table from token id to experts; the others
choose by affinity plus a load-balancing bias that never enters the weights. No token is dropped.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.architecture import Architecture, FeedForwardRole
from v4_jax.kernels.choose import best_experts
from v4_jax.kernels.router.reference import weights_of
from v4_jax.layers.expert_parallelism import dispatch
from v4_jax.layers.experts import Experts, shared_expert
from v4_jax.layers.linear import linear
from v4_jax.layers.stages import keep
from v4_jax.outputs import Decided, Routing, RoutingStatistics
from v4_jax.parameters import EXPERTS, Initializer, Module, gathered, normal
from v4_jax.policy import Policy
from v4_jax.sharding import collectives
from v4_jax.sharding.dispatch import count_each


class MixtureOfExperts(Module):
    """One feed-forward sublayer; `prefix` ends in `ffn.`."""

    config: Architecture
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
    ) -> tuple[Array, Decided]:
        """Routes and computes.

        Args:
          y: [B, S, D] normed, collapsed input.
          tokens: [B, S] int32 token ids, for hash routing; out-of-range ids read the nearest row of the table.
          valid: [B, S] bool; padding visits no expert.
          stacked: the expert weights of all layers of a scan and this layer's number among them, read in place of this
            module's own (which are the same values), so that no layer's experts are copied out of the stack.
          chosen: [B, S, top] expert ids to use instead of the router's choice, or None.

        Returns:
          Output [B, S, D], and the decisions.
        """
        c = self.config
        own = self._declare_experts()
        shared = self._declare_shared()
        with jax.named_scope("experts.route"):
            affinities, chosen, weights = self._route(y, tokens, chosen)

        flat = y.reshape(-1, c.hidden_size)
        experts, layer = (own, None) if stacked is None else stacked
        assigned = jnp.where(valid[..., None], chosen, c.n_routed_experts).reshape(flat.shape[0], -1)
        weights = weights.reshape(assigned.shape)
        with jax.named_scope("experts.shared"):
            everyone = shared_expert(flat, shared, c.swiglu_limit, self.policy.compute_dtype)
        summed = self.split.shared("mlp")
        beside = everyone if summed == self.split.shared("experts") else None
        output = dispatch(flat, assigned, weights, experts, layer, c, self.policy.compute_dtype, self.split, beside)
        if beside is None:
            output += collectives.psum(everyone, summed)
        load = count_each(assigned, c.n_routed_experts)
        load = collectives.psum(load, self.split.tokens)
        output = keep(output.astype(y.dtype).reshape(y.shape), "feed_forward")
        balance = jnp.zeros(y.shape[0]) if self.role == "hash" else self._balance(affinities, chosen, valid)
        statistics = RoutingStatistics(affinities=affinities, load=load, balance=balance)
        return output, Decided(Routing(experts=chosen), statistics)

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

    def _route(self, y: Array, tokens: Array, replayed: Array | None) -> tuple[Array, Array, Array]:
        """Affinities [B, S, E] float32, the experts chosen [B, S, top], and their weights."""
        c = self.config
        gate = self.declare(
            "gate",
            (c.n_routed_experts, c.hidden_size),
            (None, "embed"),
            released="gate.weight",
            storage="bf16",
            group="muon",
            init=normal(c),
            family="router",
        )
        logits = linear(y, gate, jnp.float32)
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
            chosen = jnp.take(table, tokens, axis=0, mode="clip") if replayed is None else replayed
            return affinities, chosen, weights_of(affinities, chosen, c.routed_scaling_factor)
        bias = self.declare(
            "bias",
            (c.n_routed_experts,),
            (None,),
            released="gate.bias",
            storage="f32",
            group="bias",
            init=nn.initializers.zeros,
        )
        if replayed is not None:
            return affinities, replayed, weights_of(affinities, replayed, c.routed_scaling_factor)
        scores = jax.lax.stop_gradient(affinities + bias)
        return affinities, *best_experts(affinities, scores, c.num_experts_per_tok, c.routed_scaling_factor)

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
                family="experts",
            )
            return gathered(self.split, value, (None, *axes))

        d, hidden = c.hidden_size, c.moe_intermediate_size
        return Experts(
            expert("w1", hidden, d, ("expert_hidden", "expert_embed")),
            expert("w2", d, hidden, ("expert_embed", "expert_hidden")),
            expert("w3", hidden, d, ("expert_hidden", "expert_embed")),
        )

    def _declare_shared(self) -> Experts:
        c, d, hidden = self.config, self.config.hidden_size, self.config.moe_intermediate_size

        def shared(name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Any:
            released = "shared_experts." + name
            return self.linear("shared_" + name, shape, axes, config=c, family="shared", released=released)

        return Experts(
            shared("w1", (hidden, d), ("mlp", "embed")),
            shared("w2", (d, hidden), ("embed", "mlp")),
            shared("w3", (hidden, d), ("mlp", "embed")),
        )


@functools.cache  # declarations compare initialisers by identity
def hash_table(config: Architecture) -> Initializer:
    """Initialiser of a fresh table [V, top]: distinct experts per token id, all experts equally often.

    The release ships its tables and not the rule behind them; this one spreads ids evenly.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        del key
        ids = jnp.arange(shape[0])[:, None] * shape[1] + jnp.arange(shape[1])
        return (ids % config.n_routed_experts).astype(dtype)

    return init
