"""The indexer's loss over picked entries, and its gradients, for TPUs: entries and index keys are fetched row by row.

It is that of `indexer_loss.tpu`, for more entries than VMEM has room for. An entry and its index key are one row of
memory, so that a pick is one transfer; backward, keys alone are fetched and added to. What the loss pulls at the scores
with is one number a pick, which forward leaves.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.cache.rows import LANES
from v4_jax.kernels.attention.reference import MASKED
from v4_jax.kernels.attention.tiles import dot
from v4_jax.kernels.csa.gradients import supports as attends
from v4_jax.kernels.indexer_loss.tpu import Operands
from v4_jax.kernels.picked_rows import Added, Fetched, Picks, across, as_words, down, from_words, walk


def supports(operands: Operands) -> bool:
    """Whether `loss` and `gradients` take such operands, arrays or shapes."""
    index_queries = operands.index_queries
    heads, size = index_queries.shape[2:]
    few = heads % 8 == 0 and heads <= LANES
    return attends(operands.queries) and index_queries.dtype == jnp.bfloat16 and few and size == LANES


def loss(operands: Operands, picked: Array, *, interpret: bool = False) -> tuple[Array, Array]:
    """The divergence of the indexer's distribution over a query's entries from attention's.

    Args:
      operands: what is compared.
      picked: [B, Q, K] int32 numbers of entries, each once, -1 for none.
      interpret: run in interpret mode, on any platform.

    Returns:
      [B, Q] float32, 0 for queries without entries, and its slopes [B, Q, K] float32, by the scores of those picked.
    """
    queries, log_total, entries, index_queries, weights, index_keys = operands
    (heads, size), (index_heads, index_size) = queries.shape[2:], index_queries.shape[2:]
    words, picks = as_words(entries, index_keys, interpret=interpret), Picks.of(picked, entries.shape[1])
    by_chunk = (picks.most, LANES)
    value, slopes = picks.call(
        functools.partial(_loss_kernel, parts=words.shape[2] // 2, scale=size**-0.5),
        (queries, log_total, index_queries, weights),
        words.reshape(-1, *words.shape[2:]),
        [((1, LANES), jnp.float32), (by_chunk, jnp.float32)],
        scratch=[pltpu.VMEM(by_chunk, jnp.float32)] * 2,
        flops=2 * picked.size * (heads * size + index_heads * index_size),
        transcendentals=picked.size * heads,
        interpret=interpret,
        name="picked_indexer_loss",
    )
    return value[..., 0, 0], slopes.reshape(*picked.shape[:2], -1)[..., : picked.shape[2]]


def gradients(
    index_queries: Array,
    weights: Array,
    index_keys: Array,
    picked: Array,
    slopes: Array,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Gradients of the loss for index queries, of their dtype, and weights and index keys, float32.

    Args:
      index_queries: as of `Operands`, like the next two.
      weights: likewise.
      index_keys: likewise.
      picked: as for `loss`.
      slopes: [B, Q, K] float32 of `loss`, times its gradient.
      interpret: run in interpret mode, on any platform.
    """
    (heads, size), picks = index_queries.shape[2:], Picks.of(picked, index_keys.shape[1])
    slopes = jnp.pad(slopes, ((0, 0), (0, 0), (0, picks.most * LANES - slopes.shape[2])))
    of_queries, of_weights, of_keys = picks.call(
        _gradients_kernel,
        (index_queries, weights, slopes.reshape(*slopes.shape[:2], picks.most, LANES)),
        index_keys.astype(jnp.float32).reshape(-1, size),
        [((heads, size), index_queries.dtype), ((1, heads), jnp.float32)],
        added=1,
        flops=3 * 2 * picked.size * heads * size,
        transcendentals=0,
        interpret=interpret,
        name="picked_indexer_loss_gradients",
    )
    return of_queries, of_weights.reshape(weights.shape), of_keys.reshape(index_keys.shape)


def _loss_kernel(
    chunks: Any,
    places: Any,
    seen: Any,
    queries: Any,
    log_totals: Any,
    index_queries: Any,
    weights: Any,
    rows: Any,
    values: Any,
    slopes: Any,
    *scratch: Any,
    parts: int,
    scale: float,
    unrolled: bool,
) -> None:
    """A block of queries. Refs: queries [Q, H, C], log totals [Q, 1, H], index queries [Q, heads, 128], weights
    [Q, 1, heads], rows in memory; out [Q, 1, 128] and [Q, chunks, 128]; scratch: that of rows, and a query's attention
    and scores [chunks, 128].
    """
    *room, attended, scores = scratch
    fetched = Fetched(rows, *room)

    def begin(query: Any) -> tuple[Array, Array]:
        attended[...] = jnp.zeros(attended.shape, jnp.float32)
        scores[...] = jnp.full(scores.shape, MASKED, jnp.float32)
        return down(log_totals[query]), down(weights[query])

    def work(query: Any, chunk: Any, slot: Any, state: Any) -> tuple[Any, list[Array]]:
        log_total, weight = state
        entries = from_words(fetched, slot, chunk, parts)
        keys = pltpu.bitcast(fetched.line(slot, chunk, parts), jnp.float32).astype(jnp.bfloat16)
        shares = jnp.exp(dot(queries[query], entries, (1, 1)) * scale - log_total)
        active = jnp.maximum(dot(index_queries[query], keys, (1, 1)), 0.0) * weight
        own = pl.ds(chunk, 1)
        visible = seen[query, own, :] > 0
        attended[own, :] = jnp.where(visible, jnp.sum(shares, axis=0, keepdims=True), 0.0)
        scores[own, :] = jnp.where(visible, jnp.sum(active, axis=0, keepdims=True), MASKED)
        return state, []

    def total(x: Array) -> Array:
        return jnp.sum(jnp.sum(x, axis=1, keepdims=True), axis=0, keepdims=True)

    def end(query: Any, _: Any) -> None:
        got, score = attended[...], scores[...]
        visible = score > MASKED
        amount = total(got)
        some = amount > 0
        largest = jnp.max(jnp.max(score, axis=1, keepdims=True), axis=0, keepdims=True)
        guess = jnp.where(visible, jnp.exp(score - largest), 0.0)
        sums = total(guess)
        sums = jnp.where(sums > 0, sums, 1.0)
        share = got / jnp.where(some, amount, 1.0)
        log = jnp.log(jnp.where(share > 0, share, 1.0))
        value = total(share * jnp.where(visible, log - score, 0.0)) + largest + jnp.log(sums)
        values[query] = jnp.broadcast_to(jnp.where(some, value, 0.0), values.shape[1:])
        slopes[query] = jnp.where(some, guess / sums - share, 0.0)

    walk(chunks, places, queries.shape[0], fetched, None, begin, work, end, unrolled=unrolled)


def _gradients_kernel(
    chunks: Any,
    places: Any,
    _: Any,
    index_queries: Any,
    weights: Any,
    slopes: Any,
    keys: Any,
    of_queries: Any,
    of_weights: Any,
    sums: Any,
    *scratch: Any,
    unrolled: bool,
) -> None:
    """A block of queries. Refs: index queries [Q, heads, 128], weights [Q, 1, heads], slopes [Q, chunks, 128], keys in
    memory; scratch: that of rows.
    """
    room, arrived, *added = scratch
    (count, heads, size), dtype = index_queries.shape, index_queries.dtype
    fetched = Fetched(keys, room, arrived)

    def begin(query: Any) -> tuple[Array, ...]:
        return down(weights[query]), jnp.zeros((heads, size), jnp.float32), jnp.zeros((heads, LANES), jnp.float32)

    def work(query: Any, chunk: Any, slot: Any, state: Any) -> tuple[Any, list[Array]]:
        weight, of_query, of_weight = state
        own, some = index_queries[query], fetched.line(slot, chunk, 0).astype(dtype)
        active, slope = dot(own, some, (1, 1)), slopes[query, pl.ds(chunk, 1), :]
        of_weight += jnp.maximum(active, 0.0) * slope
        pulled = jnp.where(active > 0, slope * weight, 0.0).astype(dtype)
        return (weight, of_query + dot(pulled, some, (1, 0)), of_weight), [dot(pulled, own, (0, 0))]

    def end(query: Any, state: Any) -> None:
        _, of_query, of_weight = state
        of_queries[query] = of_query.astype(dtype)
        of_weights[query] = across(jnp.sum(of_weight, axis=1, keepdims=True))

    added_to = Added(sums.at[pl.program_id(0)], *added)
    walk(chunks, places, count, fetched, added_to, begin, work, end, unrolled=unrolled)
