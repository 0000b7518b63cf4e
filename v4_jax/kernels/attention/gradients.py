"""Gradients of attention over the window and all visible entries, for TPUs: logits never leave the chip.

With a row's logits l, its largest m, and the gradients g of what it sums up and t of its sum:

    p = exp(l - m)      d l = p (g . key + t)      d query = d l . keys      d key = d l^T . queries + p^T . g

No gradient is that of m, by which what comes of a softmax is divided again. A tile is one of the forward kernel's. It
takes its part of the window and then the blocks of entries that any of it sees; gradients of queries add up over these,
and those of keys and entries over tiles, in VMEM and float32. Half of the tiles each have sums of their own, for chips
with two cores.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.attention.blocks import Blocks
from v4_jax.kernels.attention.tiles import Tiles, dot, here
from v4_jax.kernels.attention.tpu import (
    CHUNK,
    HIDDEN,
    LANES,
    LOG2E,
    SUBLANES,
    VMEM_BYTES,
    bounds_of,
    hidden_from,
    in_rows,
    repeated,
    tile_of,
    up,
)
from v4_jax.kernels.attention.tpu import supports as attends
from v4_jax.kernels.turns import about
from v4_jax.layers.visible import Visible

ENTRIES = 256  # of a block
HELD_BYTES = 32 << 20  # of keys, entries and their gradients, which are all in VMEM


def supports(queries: Any, keys: Any, entries: Any) -> bool:
    """Whether `gradients` takes queries [B, Q, H, C], keys [B, past + Q, C] and entries [B, E, C], arrays or shapes."""
    cut = Blocks.of(*queries.shape[:2], keys)
    lengths = (0 if keys is None else cut.past + cut.width, 0 if entries is None else entries.shape[1])
    held = sum(length + 2 * LANES for length in lengths if length)
    per_row = queries.shape[3] * (4 + queries.dtype.itemsize)
    return attends(queries) and held * per_row <= HELD_BYTES


def gradients(
    queries: Array,
    keys: Array | None,
    oldest: Array | None,
    entries: Array | None,
    visible: Visible | None,
    maximum: Array,
    of_total: Array,
    of_weighted: Array,
    hidden: Array | None = None,
    *,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of `tpu.window_attention`, which gives a `Partial` softmax.

    Args:
      queries: [B, Q, H, C] bfloat16 or float32.
      keys: [B, past + Q, C] of the window, or None.
      oldest: [B, Q] int32 the first of the keys that a query's document has.
      entries: [B, E, C] of any float dtype, or None.
      visible: which of them the queries see.
      maximum: [B, Q, H] float32, of the result.
      of_total: [B, Q, H] float32 gradient of the sums.
      of_weighted: [B, Q, H, C] gradient of the weighted keys, rounded to the dtype of the queries where it is float32.
      hidden: as for `tpu.window_attention`.
      interpret: run in interpret mode, on any platform.

    Returns:
      Those of queries and keys, of their dtype, and of entries, float32.
    """
    (*_, heads, size), dtype = queries.shape, queries.dtype
    cut = Blocks.of(*queries.shape[:2], keys)
    batch, count, past = cut.all, cut.width, cut.past
    by_tile = Tiles(batch, count, tile_of(count, heads))
    tile, tiles = by_tile.size, by_tile.number
    rows = tile * heads

    def of_tiles(x: Array, each: int) -> tuple[Array, pl.BlockSpec]:
        return by_tile.cut(cut.cut(x), each)

    given = [
        of_tiles(queries, heads),
        of_tiles(of_weighted, heads),
        of_tiles(maximum * LOG2E, 1),
        of_tiles(of_total, 1),
    ]
    index, nothing = jnp.arange(count, dtype=jnp.int32), jnp.zeros((batch, count), jnp.int32)
    ranges = [nothing] * 4

    out = [by_tile.out(size, dtype, heads)]
    scalars, room, block = [], 0, 0

    def held(x: Array, length: int, shared: int = 1) -> None:
        """Adds keys that are in VMEM, made up to a length, and sums for their gradients."""
        given.append(by_tile.held(x, length, dtype, shared))
        out.append(by_tile.sums(length, size))

    if keys is not None and oldest is not None:
        keys = cut.windows(keys)
        ranges[:2] = jnp.maximum(cut.oldest(oldest), index), jnp.broadcast_to(index + past + 1, (batch, count))
        room = up(tile + past + (0 if tiles == 1 else SUBLANES - 1), LANES)
        held(keys, max((tiles - 1) * tile // SUBLANES * SUBLANES + room, up(keys.shape[1], SUBLANES)))
    if entries is not None and visible is not None:
        ranges[2:] = low, high = cut.cut(visible.low), cut.cut(visible.high)
        block = min(ENTRIES, up(entries.shape[1], LANES))
        scalars = [bounds_of(low, high, tile, tiles, block).reshape(-1)]
        held(entries, up(entries.shape[1], block), cut.each)
        if hidden is not None:
            given.append(by_tile.cut(hidden_from(cut.cut(hidden), up(entries.shape[1], block))))
    given.insert(0, by_tile.cut(jnp.stack(ranges, axis=-1)))
    half = 0 if entries is None else entries.shape[1] // 2  # of a row's entries its queries see a half, on the mean
    seen = (room and past + 1) + half
    found = pl.pallas_call(
        functools.partial(
            _kernel,
            heads=heads,
            tiles=tiles,
            room=room,
            block=block,
            turns=-(-half // block) if block else 0,
            picks=hidden is not None,
            scale=size**-0.5,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=by_tile.grid,
            in_specs=[spec for _, spec in given],
            out_specs=[spec for _, spec in out],
            scratch_shapes=[pltpu.VMEM((rows, size), jnp.float32), *[pltpu.VMEM((rows, LANES), jnp.float32)] * 2],
        ),
        out_shape=[shape for shape, _ in out],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * batch * count * heads * size * seen,
            bytes_accessed=batch * (2 * dtype.itemsize + of_weighted.dtype.itemsize) * size * count * heads,
            transcendentals=batch * count * heads * seen,
        ),
        interpret=interpret,
        name="window_attention_gradients",
    )(*scalars, *(x for x, _ in given))
    of_queries, *sums = found
    of_queries = cut.joined(of_queries.reshape(batch, tiles * tile, heads, size)[:, :count])
    of_keys = of_entries = None
    if block and entries is not None:
        length, parts = entries.shape[1], sums.pop()
        of_entries = jnp.sum(parts.reshape(entries.shape[0], -1, *parts.shape[2:]), axis=1)[:, :length]
    if room and keys is not None:
        of_keys = cut.of_windows(jnp.sum(sums.pop(), axis=1)[:, : keys.shape[1]]).astype(keys.dtype)
    return of_queries, of_keys, of_entries


def _kernel(*refs: Any, heads: int, tiles: int, room: int, block: int, turns: int, picks: bool, scale: float) -> None:
    """A grid step: one tile.

    Refs: [bounds,] ranges [tile, 4], queries and gradients [rows, C], largest logits and gradients of the sums [tile,
    heads], [keys [length, C],] [entries [E, C],] [hidden [tile, E],] gradients of queries [rows, C] [, of keys] [, of
    entries]; scratch: gradients of queries in float32, and the two numbers of each row in all lanes [rows, 128].
    """
    left = list(refs)
    bounds: Any = left.pop(0) if block else None
    ranges, queries, gradients, maxima, of_totals = (left.pop(0) for _ in range(5))
    keys: Any = left.pop(0) if room else None
    entries: Any = left.pop(0) if block else None
    hides: Any = left.pop(0) if picks else None
    of_queries = left.pop(0)
    of_keys: Any = left.pop(0) if room else None
    of_entries: Any = left.pop(0) if block else None
    sums, most, added = left
    tile, dtype = ranges.shape[0], queries.dtype
    tokens = next(n for n in range(max(1, CHUNK // heads), 0, -1) if tile % n == 0)  # of a chunk
    chunk, chunks = tokens * heads, tile // tokens
    own_tile = here()
    place = (pl.program_id(0) * tiles + own_tile) * 4

    def attend(held: Any, of_held: Any, start: Any, count: int, columns: tuple[int, int] | None) -> None:
        """Takes keys from `start` on, of which each query sees a range, which is in two columns of `ranges`; None: what
        is not hidden."""
        some = held[pl.ds(start, count), :]
        total = jnp.zeros(some.shape, jnp.float32)
        for c in range(chunks):
            rows = slice(c * chunk, (c + 1) * chunk)
            own, given = queries[rows, :], gradients[rows, :].astype(dtype)
            of_chunk = slice(c * tokens, (c + 1) * tokens)
            if columns is None:
                hidden = hides[of_chunk, pl.ds(start, count)]
            else:
                low, high = (ranges[of_chunk, x : x + 1] for x in columns)
                number = start + jax.lax.broadcasted_iota(jnp.int32, (tokens, count), 1)
                hidden = jnp.where((number >= low) & (number < high), 0.0, HIDDEN)
            logits = dot(own, some, (1, 1)) * (scale * LOG2E)
            logits = (logits.reshape(tokens, heads, count) + hidden[:, None, :]).reshape(chunk, count)
            shares = jnp.exp2(logits - repeated(most[rows, :], count))
            of_logits = shares * (dot(given, some, (1, 1)) + repeated(added[rows, :], count)) * scale
            of_logits, shares = of_logits.astype(dtype), shares.astype(dtype)
            sums[rows, :] += dot(of_logits, some, (1, 0))
            total += dot(of_logits, own, (0, 0)) + dot(shares, given, (0, 0))
        of_held[pl.ds(start, count), :] += total

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for total in (of_keys, of_entries):
            if total is not None:
                total[...] = jnp.zeros(total.shape, total.dtype)

    @pl.when(own_tile < tiles)
    def _() -> None:
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        most[...], added[...] = in_rows(maxima[...]), in_rows(of_totals[...])
        if room:
            start = 0 if tiles == 1 else pl.multiple_of(own_tile * tile & -SUBLANES, SUBLANES)
            attend(keys, of_keys, start, room, (0, 1))
        if block:

            def each_block(j: Any, carry: None) -> None:
                attend(entries, of_entries, pl.multiple_of(j * block, block), block, None if picks else (2, 3))
                return carry

            with about(turns):
                jax.lax.fori_loop(bounds[place], bounds[place + 1], each_block, None)
        of_queries[...] = sums[...].astype(dtype)
