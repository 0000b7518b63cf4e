"""The lightning indexer: cheap multi-head scores over all compressed entries, of which each query keeps the best.

Technical report, section 2.3.1. Scoring goes by blocks of entries with a running top-k, so that neither a
[queries, entries] array nor work beyond the visible entries exists at any length.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.cache.cache import Entries, Ring
from v4_jax.cache.rows import Rows
from v4_jax.config import RATIO_OF_ROLE, Config
from v4_jax.kernels.attention.products import products
from v4_jax.layers.compressor import Compressor
from v4_jax.layers.linear import linear
from v4_jax.layers.rotary import rotate
from v4_jax.layout import Blocks, Layout
from v4_jax.number_formats import dequantise, fake_quant_index
from v4_jax.parameters import Module
from v4_jax.policy import Policy, einsum
from v4_jax.sharding.collectives import all_gather
from v4_jax.sharding.split import Split
from v4_jax.sharding.top_k import distributed_top_k

ENTRY_BLOCK = 2048  # entries scored at once

MASKED = -1e30  # finite, so that a query with nothing to see stays free of NaN


class LightningIndexer(Module):
    """Parameters of the indexer and its key compressor; `prefix` ends in `attn.indexer.`."""

    config: Config
    policy: Policy
    frequencies: Any

    @nn.compact
    def __call__(self, y: Array, layout: Layout, state: Ring | None) -> tuple[Array, Blocks, Rows | None, Array, Array]:
        """Prepares what the per-block selection needs.

        Args:
          y: [B, S, D] normed input of the layer, to which no gradient flows back.
          layout: where its tokens stand.
          state: the key compressor's open blocks, or None without a cache.

        Returns:
          Index keys [B, E, index_head_dim] of the blocks that end here, those blocks, the state's rows
          after the chunk, head weights [B, S, index_n_heads] float32, and the query projection.
        """
        c = self.config
        heads, size = c.index_n_heads, c.index_head_dim
        y = jax.lax.stop_gradient(y)
        wq_b = self.linear("wq_b", (heads * size, c.q_lora_rank), ("index_heads", "latent"), config=c)
        project = self.linear(
            "weights_proj", (heads, c.hidden_size), ("index_heads", "embed"), config=c, storage="bf16"
        )
        keys, blocks, after = Compressor(
            config=c,
            policy=self.policy,
            prefix=self.prefix + "compressor.",
            ratio=RATIO_OF_ROLE["csa"],
            width=size,
            frequencies=self.frequencies,
            index=True,
            split=self.split,
            part=self.part,
            name="compressor",
        )(y, layout, state)
        weights = einsum("bsd,hd->bsh", y, project, dtype=self.policy.compute_dtype).astype(jnp.float32)
        weights = all_gather(weights, self.split.shared("index_heads"), -1)
        return keys, blocks, after, weights * (size * heads) ** -0.5, dequantise(wq_b, self.policy.compute_dtype)


def index_queries(
    latent: Array, wq_b: Array, positions: Array, frequencies: Any, config: Config, policy: Policy, split: Split
) -> Array:
    """Index queries [B, Q, heads, index_head_dim] of a query block from its normed latent [B, Q, q_lora].

    No gradient flows back to the latent. Devices that share the heads' work each make some and join them: every entry
    is scored by all heads.
    """
    queries = linear(jax.lax.stop_gradient(latent), wq_b, policy.compute_dtype)
    queries = queries.reshape(*latent.shape[:2], -1, config.index_head_dim)
    queries = rotate(queries, positions, frequencies)
    queries = fake_quant_index(queries) if policy.fake_quant else queries
    return all_gather(queries, split.shared("index_heads"), 2)


def index_scores(queries: Array, weights: Array, keys: Array) -> Array:
    """Scores [B, Q, K]: sum over heads of relu(query . key) * weight, in float32.

    Args:
      queries: [B, Q, heads, C].
      weights: [B, Q, heads] float32.
      keys: [B, K, C] shared by the queries, or [B, Q, K, C] with each query's own.
    """
    per_head = products(queries, keys)
    # Head by head: XLA:CPU hands a product that ends in a sum over its axis to a kernel tens of times slower.
    heads = (jax.nn.relu(per_head[:, :, h]) * weights[:, :, h, None] for h in range(weights.shape[-1]))
    return functools.reduce(jnp.add, heads)


class Visible(NamedTuple):
    """Which entries queries see.

    Attributes:
      low: [B, Q] first visible entry.
      high: [B, Q] one past the last visible entry.
      least: the least `low` of all queries that are attended side by side, these among them.
      most: the greatest `high` of them: what lies beyond need not be looked at.
    """

    low: Array
    high: Array
    least: Array
    most: Array

    def here(self, entries: Entries) -> Visible:
        """The same in slots of the entries that lie on this device."""
        return Visible(*map(entries.below, self))

    def mask(self, first: Array, size: int, wanted: Array) -> Array:
        """[B, Q, size] which of the entries from `first` on are visible and not before `wanted`."""
        number = first + jnp.arange(size, dtype=jnp.int32)
        return (number >= wanted) & (number >= self.low[..., None]) & (number < self.high[..., None])

    def any(self, wanted: Array, size: int) -> Array:
        """Whether anybody may see any of the entries from `wanted` on."""
        return (self.most > wanted) & (self.least < wanted + size)


def select(queries: Array, weights: Array, keys: Entries, visible: Visible, top: int) -> Array:
    """The best-scoring visible entries of each query, wherever they lie.

    Args:
      queries: [B, Q, heads, C] index queries.
      weights: [B, Q, heads] float32 head weights.
      keys: index keys of every entry.
      visible: which of them the queries see.
      top: how many to keep.

    Returns:
      [B, Q, min(top, entries)] int32 entry numbers by falling score, -1 where fewer are visible. Equal scores keep the
      earlier entry.
    """
    scores, slots = _best_here(queries, weights, keys, visible.here(keys), min(top, keys.count))
    if not keys.axes:
        return slots
    return distributed_top_k(scores, keys.numbers(slots), top, keys.axes)


def divergence(scores: Array, mass: Array, visible: Array) -> Array:
    """KL divergence [B, Q] of the indexer's distribution over entries from the attention's; 0 where none is visible.

    Args:
      scores: [B, Q, K] index scores; their softmax is the indexer's distribution.
      mass: [B, Q, K] attention that each entry gets, heads added up; no gradient flows back to it.
      visible: [B, Q, K] which entries there are.
    """
    mass = jnp.where(visible, jax.lax.stop_gradient(mass), 0)
    share = mass / jnp.maximum(jnp.sum(mass, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    guess = jax.nn.log_softmax(jnp.where(visible, scores, MASKED), axis=-1)
    return jnp.sum(jnp.where(share > 0, share * (jnp.log(jnp.where(share > 0, share, 1)) - guess), 0), axis=-1)


def _best_here(queries: Array, weights: Array, keys: Entries, visible: Visible, top: int) -> tuple[Array, Array]:
    """Scores and slots [B, Q, top] of the best entries in the visible slots of this device."""
    size = min(ENTRY_BLOCK, keys.count)
    queries, weights = jax.lax.stop_gradient((queries, weights))
    shape = (*visible.low.shape, top)
    best = (jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32))

    def merge(best: tuple[Array, Array], wanted: Array) -> tuple[Array, Array]:
        first = jnp.minimum(wanted, keys.count - size)  # the last block may reach back over the one before
        scores = index_scores(queries, weights, jax.lax.stop_gradient(keys.block(first, size)))
        mask = visible.mask(first, size, wanted)
        scores = jnp.concatenate([best[0], jnp.where(mask, scores, -jnp.inf)], axis=-1)
        number = first + jnp.arange(size, dtype=jnp.int32)
        numbers = jnp.concatenate([best[1], jnp.broadcast_to(number, mask.shape)], axis=-1)
        scores, order = jax.lax.top_k(scores, top)
        return scores, jnp.where(scores > -jnp.inf, jnp.take_along_axis(numbers, order, axis=-1), -1)

    if size == keys.count:
        return merge(best, jnp.int32(0))

    def step(best: tuple[Array, Array], wanted: Array) -> tuple[tuple[Array, Array], None]:
        return jax.lax.cond(visible.any(wanted, size), merge, lambda best, _: best, best, wanted), None

    return jax.lax.scan(step, best, jnp.arange(0, keys.count, size, dtype=jnp.int32))[0]
