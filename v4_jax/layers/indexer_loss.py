"""What trains the indexer: its scores are to be like the attention that entries get.

The technical report does not describe this loss; the form is that of DeepSeek-V3.2 (facts, section 6).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.cache.entries import Entries
from v4_jax.kernels import choose
from v4_jax.kernels.choose import index_scores
from v4_jax.kernels.indexer.marks import Marks, numbers_of
from v4_jax.kernels.indexer_loss.tpu import Operands
from v4_jax.layers.entry_attention import ENTRY_BLOCK
from v4_jax.layers.partial_softmax import MASKED, mass
from v4_jax.layers.query_blocks import WIDE_BLOCK, cut_into, joined, padded
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
def indexer_loss(
    attended: Attended, scored: Scored, picked: Array | Marks | None, visible: Visible, heads: Axes
) -> Array:
    """How far the indexer's scores are from the attention that entries get: a KL divergence per query.

    Args:
      attended: how the entries are attended; no gradient flows back to it.
      scored: how they are scored.
      picked: [B, Q, K] entries to compare over, -1 for none, or marks of them; None compares over all visible ones.
      visible: which entries the queries see.
      heads: mesh axes over which the heads' work is shared.

    Returns:
      [B, Q] float32.
    """
    still, entries = jax.lax.stop_gradient, attended.entries
    fixed = still(attended.queries), still(attended.log_total), entries.replace(rows=still(entries.rows))
    operands = Operands(*fixed, *scored)
    plain = functools.partial(_in_parts, heads=heads)
    if heads:  # the attention that an entry gets is that of all of them
        return plain(operands, visible, picked)
    return choose.indexer_loss(plain, operands, visible, picked)


def _in_parts(operands: Operands, visible: Visible, picked: Array | Marks | None, *, heads: Axes) -> Array:
    """The same by plain JAX: entries block by block, or copies of those that were picked, some queries at a time."""
    entries, keys = operands.entries, operands.index_keys
    if picked is None:
        return _over_visible(operands, visible, heads)
    picked = numbers_of(picked)

    def block(x: tuple[Operands, Array]) -> Array:
        some, picked = x
        found, (copies, key_copies) = picked >= 0, (held.gather(picked) for held in (entries, keys))
        got = mass(some.queries, copies, found, some.log_total)
        return divergence(index_scores(some.index_queries, some.weights, key_copies), psum(got, heads), found)

    queries, size = operands._replace(entries=None, index_keys=None), picked.shape[1]
    count = -(-size // WIDE_BLOCK)
    if count == 1:
        return block((queries, picked))
    blocks = jax.tree.map(lambda x: cut_into(padded(x, -size % count), count), (queries, picked))
    return joined(jax.lax.map(recompute(block), blocks))[:, :size]


def _over_visible(operands: Operands, visible: Visible, heads: Axes) -> Array:
    queries, log_total, entries, *index, keys = operands
    size = min(ENTRY_BLOCK, entries.count)

    def block(wanted: Array) -> tuple[Array, Array, Array]:
        first = jnp.minimum(wanted, entries.count - size)
        mask = visible.mask(first, size, wanted)
        got = mass(queries, entries.block(first, size), mask, log_total)
        return got, index_scores(*index, keys.block(first, size)), mask

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
