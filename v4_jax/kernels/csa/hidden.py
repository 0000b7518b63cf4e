"""Which entries each query did not pick, as numbers to add to logits: for kernels that attend picks among all entries.

Up to some thousands of entries it takes less time to attend all of them, and to hide those that were not picked, than
to fetch those that were, and to add their gradients up one by one.

Entry e is the place (e // 128, e % 128). Of a query's picks, one-hot rows of the first numbers times one-hot rows of
the second have a one where both are a pick's: one small product of a query. Picks that come as marks are read off them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.attention.tpu import HIDDEN, LANES, up
from v4_jax.kernels.indexer.cut import SUBLANES, cut_of
from v4_jax.kernels.indexer.marks import Marks, bit_of

QUERIES = 16  # of a block
MARKED_QUERIES = 128  # of a block of marks: two of 2 MiB of what is written


def reference(picked: Array, count: int) -> Array:
    """0 for entries that a query picked and `HIDDEN` for others, [B, Q, E] float32, of `count` entries E.

    Args:
      picked: [B, Q, K] int32 numbers of entries, -1 for none.
      count: of the entries.
    """
    rows, queries = (jnp.arange(size)[:, None] for size in picked.shape[:2])
    places = jnp.where(picked < 0, count, picked)
    all_hidden = jnp.full((*picked.shape[:2], count), HIDDEN, jnp.float32)
    return all_hidden.at[rows[..., None], queries, places].set(0.0, mode="drop")


def hide(picked: Array | Marks, count: int, *, interpret: bool = False) -> Array:
    """See `reference`."""
    if isinstance(picked, Marks):
        return _unmarked(picked.bits, count, interpret)
    batch, size, top = picked.shape
    queries = batch * size
    block, groups = min(QUERIES, queries), up(count, LANES) // LANES
    room = up(top, LANES) - top
    found = pl.pallas_call(
        functools.partial(_kernel, unroll=1 if interpret else 4),
        grid=(pl.cdiv(queries, block),),
        in_specs=[pl.BlockSpec((block, 1, top + room), lambda i: (i, 0, 0))],
        out_specs=pl.BlockSpec((block, groups, LANES), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((queries, groups, LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * queries * groups * LANES * (top + room),
            bytes_accessed=4 * queries * (groups * LANES + top),
            transcendentals=0,
        ),
        interpret=interpret,
        name="hidden_entries",
    )(jnp.pad(picked, ((0, 0), (0, 0), (0, room)), constant_values=-1).reshape(queries, 1, -1))
    return found.reshape(batch, size, -1)[:, :, :count]


def _unmarked(bits: Array, count: int, interpret: bool) -> Array:
    """Of marked entries."""
    batch, size, _ = bits.shape
    queries, columns = batch * size, cut_of(size, count).columns
    block = min(MARKED_QUERIES, up(queries, SUBLANES))

    def kernel(bits: Any, hidden: Any) -> None:
        words = bits[...]
        for first in range(0, SUBLANES * columns, LANES):
            marked = (words >> bit_of(first, columns)) & 1
            hidden[:, first : first + LANES] = jnp.where(marked == 1, 0.0, HIDDEN)

    found = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(queries, block),),
        in_specs=[pl.BlockSpec((block, LANES), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((block, SUBLANES * columns), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((queries, SUBLANES * columns), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=0, bytes_accessed=4 * queries * (SUBLANES * columns + LANES), transcendentals=0
        ),
        interpret=interpret,
        name="unmarked_entries",
    )(bits.reshape(queries, LANES))
    return found.reshape(batch, size, -1)[:, :, :count]


def _kernel(picked: Any, hidden: Any, *, unroll: int) -> None:
    """Refs: picks [Q, 1, K]; what is added [Q, G, 128]."""
    (_, groups, _), top = hidden.shape, picked.shape[2]
    group = jax.lax.broadcasted_iota(jnp.int32, (groups, top), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (LANES, top), 0)

    def each(query: Any, carry: None) -> None:
        numbers = picked[query]
        first = (group == (numbers >> 7)).astype(jnp.float32).astype(jnp.bfloat16)
        second = (lane == (numbers & (LANES - 1))).astype(jnp.float32).astype(jnp.bfloat16)
        found = jax.lax.dot_general(first, second, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        hidden[query] = jnp.where(found > 0, 0.0, HIDDEN)
        return carry

    jax.lax.fori_loop(0, picked.shape[0], each, None, unroll=unroll)
