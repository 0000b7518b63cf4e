"""Gradients of attention over picked entries, for TPUs: entries are fetched row by row, and gradients added to them so.

With a query's logits l of its entries, their largest m, and the gradients g of what it sums up and t of its sum:

    p = exp(l - m)      d l = p (g . entry + t)      d query = d l . entries      d entry = d l^T . query + p^T . g

A query's heads and their gradients g stand one below the other: logits and g . entry are one product, both terms of an
entry's gradient another.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.cache.rows import LANES, WORD_CHANNELS
from v4_jax.kernels.attention.tiles import dot
from v4_jax.kernels.picked_rows import Added, Fetched, Picks, down, from_words, walk
from v4_jax.layers.partials import Partial


def supports(queries: Any) -> bool:
    """Whether `gradients` takes queries [B, Q, H, C], array or shape."""
    heads, size = queries.shape[2:]
    few = heads % 8 == 0 and heads <= LANES
    return queries.dtype == jnp.bfloat16 and few and size in (WORD_CHANNELS, 2 * WORD_CHANNELS)


def gradients(
    queries: Array,
    words: Array,
    picked: Array,
    maximum: Array,
    gradient: Partial,
    *,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Gradients of attention's sums for queries, of their dtype, and entries, [B, E, C] float32.

    Args:
      queries: [B, Q, H, C] bfloat16.
      words: [B, E, C / 256, 128] int32 the entries, as `StoredRows` of kind "words" holds them.
      picked: [B, Q, K] int32 numbers of those to attend, each once, -1 for none.
      maximum: [B, Q, H] float32 largest logits.
      gradient: of sums [B, Q, H] and weighted sums [B, Q, H, C], float32; that of the maximum is not used.
      interpret: run in interpret mode, on any platform.
    """
    heads, size = queries.shape[2:]
    of_queries, of_entries = Picks.of(picked, words.shape[1]).call(
        functools.partial(_kernel, scale=size**-0.5),
        (queries, gradient.weighted, maximum, gradient.total),
        words.reshape(-1, *words.shape[2:]),
        [((heads, size), queries.dtype)],
        added=size // LANES,
        scratch=[pltpu.VMEM((2 * heads, size), queries.dtype)],
        flops=5 * 2 * picked.size * heads * size,
        transcendentals=picked.size * heads,
        interpret=interpret,
        name="attend_picked_gradients",
    )
    return of_queries, of_entries.reshape(*words.shape[:2], size)


def _kernel(
    chunks: Any,
    places: Any,
    seen: Any,
    queries: Any,
    weighted: Any,
    maxima: Any,
    totals: Any,
    words: Any,
    of_queries: Any,
    sums: Any,
    *scratch: Any,
    scale: float,
    unrolled: bool,
) -> None:
    """A block of queries. Refs: queries and gradients of weighted sums [Q, H, C], largest logits and gradients of sums
    [Q, 1, H]; scratch: that of rows, and a query's heads and gradients [2 H, C].
    """
    room, arrived, *added, both = scratch
    (count, heads, size), lines, dtype = queries.shape, words.shape[1], queries.dtype
    fetched = Fetched(words, room, arrived)

    def begin(query: Any) -> tuple[Array, ...]:
        both[:heads], both[heads:] = queries[query], weighted[query].astype(dtype)
        return down(maxima[query]), down(totals[query]), jnp.zeros((heads, size), jnp.float32)

    def work(query: Any, chunk: Any, slot: Any, state: Any) -> tuple[Any, list[Array]]:
        largest, of_total, of_query = state
        entries = from_words(fetched, slot, chunk, lines)
        products = dot(both[...], entries, (1, 1))
        visible = seen[query, pl.ds(chunk, 1), :] > 0
        shares = jnp.where(visible, jnp.exp(products[:heads] * scale - largest), 0.0)
        of_logits = (shares * (products[heads:] + of_total) * scale).astype(dtype)
        of_query += dot(of_logits, entries, (1, 0))
        of_entries = dot(jnp.concatenate([of_logits, shares.astype(dtype)]), both[...], (0, 0))
        lanes = [of_entries[:, first : first + LANES] for first in range(0, size, LANES)]
        return (largest, of_total, of_query), lanes

    def end(query: Any, state: Any) -> None:
        of_queries[query] = state[2].astype(dtype)

    added_to = Added(sums.at[pl.program_id(0)], *added)
    walk(chunks, places, count, fetched, added_to, begin, work, end, unrolled=unrolled)
