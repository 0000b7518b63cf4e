"""What trains the indexer: its scores are to be like the attention that entries get.

The technical report does not describe this loss; the form is that of DeepSeek-V3.2 (facts, section 6).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.cache.entries import Entries
from v4_jax.kernels.choose import index_scores
from v4_jax.layers.entry_attention import ENTRY_BLOCK
from v4_jax.layers.partial_softmax import MASKED, mass
from v4_jax.layers.stages import recompute
from v4_jax.layers.visible import Visible
from v4_jax.sharding.collectives import Axes, psum


class Attended(NamedTuple):
    """How a block of queries attends entries.

    Attributes:
      queries: [B, Q, H, C].
      log_total: [B, Q, H] logarithm of the softmax's denominator over window, entries and sink.
      entries: the entries, all on this device.
    """

    queries: Array
    log_total: Array
    entries: Entries


class Scored(NamedTuple):
    """How the indexer scores the same entries for the same queries.

    Attributes:
      queries: [B, Q, heads, C] index queries.
      weights: [B, Q, heads] float32 head weights.
      keys: the entries' index keys.
    """

    queries: Array
    weights: Array
    keys: Entries


@jax.named_scope("indexer.loss")
def indexer_loss(attended: Attended, scored: Scored, picked: Array | None, visible: Visible, heads: Axes) -> Array:
    """How far the indexer's scores are from the attention that entries get: a KL divergence per query.

    Args:
      attended: how the entries are attended; no gradient flows back to it.
      scored: how they are scored.
      picked: [B, Q, K] entries to compare over, -1 for none; None compares over all visible ones.
      visible: which entries the queries see.
      heads: mesh axes over which the heads' work is shared.

    Returns:
      [B, Q] float32.
    """
    queries, log_total, entries = jax.lax.stop_gradient(attended)

    def compare(rows: Array, keys: Array, mask: Array) -> tuple[Array, Array]:
        return mass(queries, rows, mask, log_total), index_scores(scored.queries, scored.weights, keys)

    if picked is not None:
        found = picked >= 0
        got, scores = compare(entries.gather(picked), scored.keys.gather(picked), found)
        return divergence(scores, psum(got, heads), found)

    size = min(ENTRY_BLOCK, entries.count)

    def block(wanted: Array) -> tuple[Array, Array, Array]:
        first = jnp.minimum(wanted, entries.count - size)
        mask = visible.mask(first, size, wanted)
        return *compare(entries.block(first, size), scored.keys.block(first, size), mask), mask

    blocks = jax.lax.map(recompute(block), jnp.arange(0, entries.count, size, dtype=jnp.int32))
    got, scores, found = map(_joined, blocks)
    return divergence(scores, psum(got, heads), found)


def _joined(blocks: Array) -> Array:
    """[n, B, Q, size] -> [B, Q, n * size]."""
    joined = jnp.moveaxis(blocks, 0, 2)
    return joined.reshape(*joined.shape[:2], -1)


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
