"""The best entries of each query by a running top-k over blocks of entries.

Neither a [queries, entries] array nor work beyond the visible entries exists at any length.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.cache.entries import Entries
from v4_jax.layers.visible import Visible

ENTRY_BLOCK = 2048  # entries scored at once


def best_entries(
    score: Callable[[Array, Array, Array], Array],
    queries: Array,
    weights: Array,
    keys: Entries,
    visible: Visible,
    *,
    top: int,
    scored: bool,
) -> tuple[Array | None, Array]:
    """The best-scoring visible entries that lie on this device.

    Args:
      score: as `reference.index_scores`.
      queries: [B, Q, heads, C] index queries.
      weights: [B, Q, heads] float32 head weights.
      keys: index keys of every entry.
      visible: which of them the queries see, in local numbers.
      top: how many to keep, at most as many as there are entries.
      scored: whether to return scores.

    Returns:
      Float32 scores [B, Q, top], -inf where fewer are visible, or None; and local numbers [B, Q, top] int32, -1 after
      the last. Of equal scores the earlier entries are kept. Their order is the platform's.
    """
    size = min(ENTRY_BLOCK, keys.count)
    shape = (*visible.low.shape, top)
    best = (jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32))

    def update(best: tuple[Array, Array], wanted: Array) -> tuple[Array, Array]:
        first = jnp.minimum(wanted, keys.count - size)  # the last block may reach back over the one before
        scores = score(queries, weights, keys.block(first, size))
        mask = visible.mask(first, size, wanted)
        scores = jnp.concatenate([best[0], jnp.where(mask, scores, -jnp.inf)], axis=-1)
        number = first + jnp.arange(size, dtype=jnp.int32)
        numbers = jnp.concatenate([best[1], jnp.broadcast_to(number, mask.shape)], axis=-1)
        scores, order = jax.lax.top_k(scores, top)
        return scores, jnp.where(scores > -jnp.inf, jnp.take_along_axis(numbers, order, axis=-1), -1)

    def step(best: tuple[Array, Array], wanted: Array) -> tuple[tuple[Array, Array], None]:
        return jax.lax.cond(visible.any(wanted, size), update, lambda best, _: best, best, wanted), None

    if size == keys.count:
        scores, numbers = update(best, jnp.int32(0))
    else:
        scores, numbers = jax.lax.scan(step, best, jnp.arange(0, keys.count, size, dtype=jnp.int32))[0]
    return (scores if scored else None), numbers


def all_entries(
    score: Callable[[Array, Array, Array], Array],
    queries: Array,
    weights: Array,
    keys: Entries,
    visible: Visible,
    *,
    scored: bool,
) -> tuple[Array | None, Array]:
    """`best_entries` where as many are kept as there are: all that are visible, which nothing need be compared for.

    With scores, those that are not visible lie between the others.
    """
    if not scored:
        numbers = visible.low[..., None] + jnp.arange(keys.count, dtype=jnp.int32)
        return None, jnp.where(numbers < jnp.minimum(visible.high, keys.count)[..., None], numbers, -1)
    mask = visible.mask(jnp.int32(0), keys.count, jnp.int32(0))
    scores = score(queries, weights, keys.block(jnp.int32(0), keys.count))
    return jnp.where(mask, scores, -jnp.inf), jnp.where(mask, jnp.arange(keys.count, dtype=jnp.int32), -1)
