"""The lightning indexer: cheap multi-head scores over all compressed entries, of which each query keeps the best.

Technical report, section 2.3.1.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.architecture import RATIO_OF_ROLE, Architecture
from v4_jax.cache.entries import Entries
from v4_jax.cache.ring import Ring
from v4_jax.kernels.choose import best_entries, best_of_devices, marked_entries, norm_rotate
from v4_jax.kernels.indexer.marks import Marks
from v4_jax.kernels.rotary.reference import Projection, Steps
from v4_jax.layers.compressor import Compressed, Compressor
from v4_jax.layers.linear import linear
from v4_jax.layers.rotary import Turn
from v4_jax.layers.stages import keep
from v4_jax.layers.visible import Visible
from v4_jax.layout import Layout
from v4_jax.number_formats import Weight
from v4_jax.parameters import Module
from v4_jax.policy import Policy
from v4_jax.sharding.collectives import all_gather
from v4_jax.sharding.split import Split


class LightningIndexer(Module):
    """Parameters of the indexer and its key compressor; `prefix` ends in `attn.indexer.`."""

    config: Architecture
    policy: Policy

    def setup(self) -> None:  # noqa: D102 called by Linen
        c = self.config
        heads, size = c.index_n_heads, c.index_head_dim
        matrix = functools.partial(self.linear, config=c, family="indexer")
        self.query_weight = matrix("wq_b", (heads * size, c.q_lora_rank), ("index_heads", "latent"))
        # Small enough that every device makes the weights of all heads: to join them would take longer.
        self.head_weight = matrix("weights_proj", (heads, c.hidden_size), ("index_weights", "embed"), storage="bf16")
        self.keys = Compressor(
            config=c,
            policy=self.policy,
            prefix=self.prefix + "compressor.",
            ratio=RATIO_OF_ROLE["csa"],
            width=size,
            index=True,
            split=self.split,
            loss=self.loss,
            name="compressor",
        )

    def projections(self) -> list[Projection]:
        """What makes head weights, and the key compressor's values and gates, of the layer's input, to which no
        gradient flows back.
        """
        return [Projection(self.head_weight, self.policy.compute_dtype, detached=True), *self.keys.projections()]

    def __call__(
        self,
        weights: Array,
        values: Array,
        gates: Array,
        layout: Layout,
        open_blocks: Ring | None,
        stored: Entries | None,
    ) -> tuple[Compressed, Array, Weight]:
        """Prepares what the per-block selection needs.

        Args:
          weights: [B, S, index_n_heads] what `projections` make of the layer's normed input.
          values: [B, S, P] likewise.
          gates: [B, S, P] likewise.
          layout: where its tokens stand.
          open_blocks: the key compressor's, or None without a cache.
          stored: earlier index keys; None without a cache.

        Returns:
          What comes of the key compressor, head weights [B, S, index_n_heads] float32, and the query projection.
        """
        c = self.config
        keys = self.keys(values, gates, layout, open_blocks, stored)
        scale = (c.index_head_dim * c.index_n_heads) ** -0.5
        return keys, weights.astype(jnp.float32) * scale, self.query_weight


@jax.named_scope("indexer.queries")
def index_queries(latent: Array, wq_b: Weight, turn: Turn, config: Architecture, policy: Policy, split: Split) -> Array:
    """Index queries [B, Q, heads, index_head_dim] of a query block from its normed latent [B, Q, q_lora].

    No gradient flows back to the latent. Devices that share the heads' work each make some and join them: every entry
    is scored by all heads.
    """
    queries = linear(jax.lax.stop_gradient(latent), wq_b, policy.compute_dtype)
    queries = queries.reshape(*latent.shape[:2], -1, config.index_head_dim)
    queries = norm_rotate(queries, None, turn, Steps(rounding=policy.rounding("index")))
    return all_gather(queries, split.shared("index_heads"), 2)


class Here(NamedTuple):
    """Picked entries that lie on this device.

    Attributes:
      local: [B, Q, K] int32 local numbers, -1 after the last.
      filled: [B, Q] int32 how many they are.
    """

    local: Array
    filled: Array


@jax.named_scope("indexer.select")
def mark(queries: Array, weights: Array, keys: Entries, visible: Visible, top: int) -> Array | Marks:
    """What `select` picks, for attention that hides all other entries; these lie here."""
    picked = marked_entries(*jax.lax.stop_gradient((queries, weights, keys)), visible, top=min(top, keys.count))
    return jax.tree.map(lambda x: keep(x, "picked"), picked)


@jax.named_scope("indexer.select")
def select(queries: Array, weights: Array, keys: Entries, visible: Visible, top: int) -> tuple[Array, Here]:
    """The best-scoring visible entries of each query, wherever they lie.

    Args:
      queries: [B, Q, heads, C] index queries.
      weights: [B, Q, heads] float32 head weights.
      keys: index keys of every entry.
      visible: which of them the queries see.
      top: how many to keep.

    Returns:
      [B, Q, min(top, entries)] int32 entry numbers in no particular order, -1 after the last where fewer are visible;
      and those of them that lie here. Of equal scores the earlier entries are kept.
    """
    operands = (*jax.lax.stop_gradient((queries, weights, keys)), visible)
    if keys.axes:
        picked, *here = best_of_devices(*operands, top=top)
        return keep(picked, "picked"), Here(*here)
    picked = keep(best_entries(*operands, top=min(top, keys.count), scored=False)[1], "picked")
    return picked, Here(picked, jnp.sum(picked >= 0, axis=-1, dtype=jnp.int32))
