"""Attention of a block of drafts (DSpark, arXiv 2607.05147): over the keys of the context before it and over itself.

The context's keys are made from the trunk's taps, not from what the stage computes, and are all that a cache keeps.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from v4_jax.cache.cache import Cache
from v4_jax.kernels.choose import norm_rotate
from v4_jax.kernels.rotary.reference import Steps
from v4_jax.layers.attention import Attention
from v4_jax.layers.linear import linear, linears
from v4_jax.layers.partial_softmax import attend
from v4_jax.layout import Layout
from v4_jax.sharding.collectives import Axes, psum, rows_at


class Places(struct.PyTreeNode):
    """Where blocks stand in rows that are known as a whole: A of them in each.

    Attributes:
      ends: [B, A] int32 tokens of the row before a block's anchor.
      first: [B, A] int32 the first of them that are of the anchor's document.
    """

    ends: Array
    first: Array


class Taps(struct.PyTreeNode):
    """What a trunk's chunk hands to the stages.

    Attributes:
      main: [B, S, D] its taps, projected and normed: what keys are made from.
      layout: where the chunk stands.
      axes: mesh axes that split its sequence. The drafts' never is.
      places: where the blocks stand, which are then B * A; None for one a row, behind the chunk. Not with a cache.
    """

    main: Array
    layout: Layout
    axes: Axes = struct.field(pytree_node=False, default=())
    places: Places | None = None


class DraftAttention(Attention):
    """The attention sublayer of a stage, with the parameters of any other.

    All drafts see the same keys: the last `sliding_window` of the context, and all of the block's own.
    """

    @nn.compact
    def __call__(  # type: ignore[override]  # it is called for what it is, in one place
        self, y: Array, layout: Layout, cache: Cache | None, layer: int, taps: Taps
    ) -> tuple[Array, Cache | None]:
        """Attends.

        Args:
          y: [B, Q, D] normed, collapsed input; a row for every block.
          layout: where the drafts stand.
          cache: the whole cache, in whose ring of the stage the context's keys are added; None without one.
          layer: the stage's number, its place in the ring's stack.
          taps: the context's newest part; with a cache what came before is there, without one all of it is here.

        Returns:
          Output [B, Q, D], and the cache with the context's keys.
        """
        c, dtype = self.config, self.policy.compute_dtype
        turn = layout.turn(self.roles.ratio)
        weights, count = self.weights(), c.sliding_window
        with jax.named_scope("attention.project"):
            latent, own = linears(y, [weights.wq_a, weights.wkv], dtype)
            latent = norm_rotate(latent, weights.q_norm, None, Steps(c.rms_norm_eps))
            own = self.keys(own, weights.kv_norm, turn)
            context = linear(taps.main, weights.wkv, dtype)
            context = self.keys(context, weights.kv_norm, taps.layout.turn(self.roles.ratio))
        with jax.named_scope("attention.window_cache"):
            total, steps = taps.layout.total, jnp.arange(count, dtype=jnp.int32) - count
            if cache is None:
                places = taps.places or Places(total[:, None], jnp.zeros_like(total)[:, None])
                last = places.ends[..., None] + steps  # [B, A, count]
                before = rows_at(context, last.reshape(len(last), -1), taps.axes).reshape(len(y), count, -1)
                visible = (last >= places.first[..., None]).reshape(len(y), count)
            else:
                ring = cache.window(self.window, layer, taps.layout.cached, dtype)
                rows = ring.append(context, taps.layout, taps.axes)
                cache = cache.with_ring(self.window, rows)
                before = ring.replace(rows=rows, start=ring.start + total).history(count)
                visible = (ring.start + total)[:, None] + steps >= 0
        with jax.named_scope("attention.window"):
            queries = self.queries(linear(latent, weights.wq_b, self.policy.compute_dtype), turn)
            seen = jnp.concatenate([visible, jnp.ones(y.shape[:2], bool)], axis=1)
            keys = jnp.concatenate([before, own], axis=1)
            mask = jnp.broadcast_to(seen[:, None], (*y.shape[:2], keys.shape[1]))
            partial = attend(queries, keys, mask)
        with jax.named_scope("attention.output"):
            output = self.output([partial], weights.sink, turn, weights.wo_a, weights.wo_b)
        return psum(output, self.split.shared("o_groups")), cache
