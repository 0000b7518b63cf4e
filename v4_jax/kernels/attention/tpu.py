"""Attention over the window and all visible entries in one softmax, for TPUs: logits and sums never leave the chip.

Heads share their keys, which are also the values, so that a few queries with all their heads make a tile of `ROWS`
rows: enough products per key to keep the matrix unit busy while keys travel. A tile attends its window, which is in
VMEM, while the first block of entries is on its way; entries then come block by block, two buffers in turn, straight
from the stack of all layers where the cache's format allows it. Blocks that no query of the tile sees are not fetched,
and only those that some do not see are masked. One-token steps take several batch rows at a time, each a tile of its
own, and the next row's first block is fetched during this one's.

Rows of a tile go in chunks: the matrix unit works on the logits of one chunk while the vector unit takes the softmax
of the one before. A row's largest logit stands in all lanes of a register; its sum is kept as one sum in each lane.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.cache.entries import Entries
from v4_jax.kernels.attention.blocks import Blocks
from v4_jax.kernels.attention.reference import MASKED
from v4_jax.kernels.memory import kept_in_hbm
from v4_jax.kernels.turns import about
from v4_jax.layers.partials import STATISTICS, Packed, Partial
from v4_jax.layers.visible import Visible
from v4_jax.natural import quotient

LANES, SUBLANES = 128, 16  # of a tile of 16-bit numbers in memory
ROWS = 1024  # queries times heads of a tile
CHUNK = 256  # rows of a chunk: the widest matrix unit
ENTRIES = 512  # of a block
STEP_ROWS, STEP_BYTES = 8, 4 << 20  # batch rows of a grid step: so many, as long as their windows are no larger
HIDDEN = -1e32  # added to logits; so far below `MASKED` that their exponentials are zero even where nothing is seen
VMEM_BYTES = 48 << 20

LOG2E = math.log2(math.e)


def supports(queries: Array) -> bool:
    """Whether `window_attention` takes queries [B, Q, H, C]."""
    heads, size = queries.shape[2:]
    return queries.dtype in (jnp.bfloat16, jnp.float32) and heads % 8 == 0 and heads <= LANES and size % LANES == 0


def window_attention(
    queries: Array,
    keys: Array | None,
    oldest: Array | None,
    entries: Entries | None,
    visible: Visible | None,
    hidden: Array | None = None,
    *,
    together: bool = False,
    rounded: bool = False,
    interpret: bool = False,
) -> Partial | Packed:
    """Attention over the window, or all visible entries, or both in one softmax.

    Args:
      queries: [B, Q, H, C] bfloat16 or float32.
      keys: [B, past + Q, C] of the window: query q sees at most those from q to q + past. None: no window.
      oldest: [B, Q] int32 the first of the keys that a query's document has; queries do not see what comes before.
      entries: the entries. None: no entries.
      visible: which of them the queries see.
      hidden: [B, Q, E] float32 what is added to the logits of E entries, no fewer than there are: 0 for those that a
        query attends, of those that it sees, and `HIDDEN` for all others. None: a query attends what it sees.
      together: whether to return one `Packed` softmax.
      rounded: whether sums of keys are rounded to the dtype of the queries at the end; not `together`.
      interpret: run in interpret mode, on any platform.

    Returns:
      Largest logit [B, Q, H], sum of exp(logit - largest) [B, Q, H], and sum of exp(logit - largest) * key
      [B, Q, H, C], float32 but for what is rounded; `MASKED`, 0 and 0 for a query that sees nothing. Not
      differentiable.

    Raises:
      NotImplementedError: `supports` says no.
    """
    if not supports(queries):
        raise NotImplementedError(
            f"queries {queries.shape} of {queries.dtype}: expected bfloat16 or float32, heads in multiples of 8 up to "
            f"{LANES}, channels in multiples of {LANES}"
        )
    (*_, heads, size), dtype = queries.shape, queries.dtype
    cut = Blocks.of(*queries.shape[:2], keys)
    batch, count, past = cut.all, cut.width, cut.past
    tile = tile_of(count, heads)
    tiles = -(-count // tile)
    index = jnp.arange(count, dtype=jnp.int32)
    nothing = jnp.zeros((batch, count), jnp.int32)
    ranges, operands, specs, scratch, scalars = [], [], [], [], []
    step, room, block, queries = 1, 0, 0, cut.cut(queries)

    if keys is not None and oldest is not None:
        keys = cut.windows(keys)
        ranges += [jnp.maximum(cut.oldest(oldest), index), jnp.broadcast_to(index + past + 1, (batch, count))]
        # What a tile sees begins at a row that a slice may begin at, and is whole registers long.
        room = up(tile + past + (0 if tiles == 1 else SUBLANES - 1), LANES)
        length = max((tiles - 1) * tile // SUBLANES * SUBLANES + room, keys.shape[1])
        keys = jnp.pad(keys, ((0, 0), (0, length - keys.shape[1]), (0, 0)))
        if count == 1:
            most = max(1, STEP_BYTES // (length * size * keys.dtype.itemsize))
            step = next(n for n in range(min(STEP_ROWS, most), 0, -1) if batch % n == 0)
        operands.append(keys)
        specs.append(pl.BlockSpec((step, length, size), lambda b, i, *_: (b, 0, 0)))
    else:
        ranges += [nothing, nothing]
        if count == 1:
            step = next(n for n in range(STEP_ROWS, 0, -1) if batch % n == 0)

    if entries is not None and visible is not None:
        low, high = cut.cut(visible.low), cut.cut(visible.high)
        ranges += [low, high]
        stack, layer, block = _blocks_of(entries, dtype, apart=hidden is not None)
        queries, (stack,) = kept_in_hbm(queries, [stack], interpret=interpret)
        scalars = [
            jnp.asarray(layer, jnp.int32).reshape(1),
            bounds_of(low, high, tile, tiles, block).reshape(-1),
        ]
        operands.append(stack)
        specs.append(pl.BlockSpec(memory_space=pl.ANY))
        if hidden is not None:
            operands.append(hidden_from(cut.cut(hidden), up(stack.shape[2], block)))
            specs.append(pl.BlockSpec((step, tile, operands[-1].shape[2]), lambda b, i, *_: (b, i, 0)))
        scratch = [pltpu.VMEM((2, 2, block, size), stack.dtype), pltpu.SemaphoreType.DMA((2, 2))]
        if rounded:
            scratch.append(pltpu.VMEM((step, tile * heads, size), jnp.float32))
    else:
        ranges += [nothing, nothing]

    if together:
        out = [jax.ShapeDtypeStruct((batch, count * heads, size + STATISTICS), jnp.float32)]
        out_specs = [pl.BlockSpec((step, tile * heads, size + STATISTICS), lambda b, i, *_: (b, i, 0))]
    else:
        by_head = jax.ShapeDtypeStruct((batch, count, heads), jnp.float32)
        sums = jax.ShapeDtypeStruct((batch, count * heads, size), dtype if rounded else jnp.float32)
        out = [by_head, by_head, sums]
        by_tile = pl.BlockSpec((step, tile, heads), lambda b, i, *_: (b, i, 0))
        out_specs = [by_tile, by_tile, pl.BlockSpec((step, tile * heads, size), lambda b, i, *_: (b, i, 0))]
    there = 0 if entries is None else entries.count // (1 if entries.cached else 2)  # that a query sees on the mean
    rows, seen = tile * heads, (0 if keys is None else past + 1) + there
    found = pl.pallas_call(
        functools.partial(
            _kernel,
            heads=heads,
            tiles=tiles,
            room=room,
            block=block,
            turns=-(-there // block) if block else 0,
            shared=cut.each,
            picks=hidden is not None,
            together=together,
            scale=size**-0.5 * LOG2E,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch // step, tiles),
            in_specs=[
                pl.BlockSpec((step, tile, len(ranges)), lambda b, i, *_: (b, i, 0)),
                pl.BlockSpec((step, rows, size), lambda b, i, *_: (b, i, 0)),
                *specs,
            ],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((rows, LANES), jnp.float32)] * 2 + scratch,
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * count * heads * size * seen,
            bytes_accessed=batch * (dtype.itemsize * seen + 6 * count * heads) * size,
            transcendentals=batch * count * heads * seen,
        ),
        interpret=interpret,
        name="window_attention",
    )(*scalars, jnp.stack(ranges, axis=-1), queries.reshape(batch, count * heads, size), *operands)
    if together:
        return Packed(cut.joined(found[0].reshape(batch, count, heads, size + STATISTICS))[None])
    maximum, total, weighted = found
    return Partial(*map(cut.joined, (maximum, total, weighted.reshape(queries.shape))))


def tile_of(count: int, heads: int) -> int:
    """Queries of a tile."""
    return min(count, max(8, ROWS // heads // 8 * 8))


def up(size: int, unit: int) -> int:
    """The size made up to a multiple of the unit."""
    return -(-size // unit) * unit


def hidden_from(hidden: Array, count: int) -> Array:
    """`hidden` [B, Q, E] of so many entries."""
    room = max(0, count - hidden.shape[2])
    return jnp.pad(hidden, ((0, 0), (0, 0), (0, room)), constant_values=HIDDEN)


def _blocks_of(entries: Entries, dtype: Any, *, apart: bool) -> tuple[Array, Any, int]:
    """Where blocks of entries are fetched from; those that are to be `apart` have no entries in common.

    Returns:
      A stack [layers, B, E, C] of numbers or, as unsigned integers, their bits; the layer there; entries of a block.
    """
    stored = entries.rows.arrays[0]
    count = entries.count
    direct = entries.table is None and entries.rows.kind == "plain" and entries.rows.dtype == dtype
    block = min(ENTRIES, count // LANES * LANES)
    if direct and block and count % (block if apart else SUBLANES) == 0:
        return stored, entries.layer, block
    block = min(ENTRIES, up(count, LANES))
    copy = jnp.pad(entries.block(0, count), ((0, 0), (0, up(count, block) - count), (0, 0)))
    return copy.astype(dtype)[None], 0, block


def bounds_of(low: Array, high: Array, tile: int, tiles: int, block: int) -> Array:
    """Blocks of entries that tiles see [B, tiles, 4]: the first, one past the last; the same of those seen whole."""
    padding = tiles * tile - low.shape[1]

    def by_tile(x: Array, mode: str) -> Array:
        return jnp.pad(x, ((0, 0), (0, padding)), mode=mode).reshape(x.shape[0], tiles, tile)

    low, high = by_tile(low, "edge"), by_tile(high, "edge")
    some = high > low
    first = quotient(jnp.min(jnp.where(some, low, jnp.iinfo(jnp.int32).max), axis=2), block)
    last = quotient(jnp.max(jnp.where(some, high, 0), axis=2) + block - 1, block)
    whole_first = quotient(jnp.max(low, axis=2) + block - 1, block)
    whole_last = quotient(jnp.min(high, axis=2), block)
    return jnp.stack([jnp.minimum(first, last), last, whole_first, whole_last], axis=-1)


def _kernel(
    *refs: Any,
    heads: int,
    tiles: int,
    room: int,
    block: int,
    turns: int,
    shared: int,
    picks: bool,
    together: bool,
    scale: float,
) -> None:
    """A grid step: one tile of each of `step` batch rows, of which `shared` after one another have the same entries, in
    some `turns` blocks.

    Refs: [layer, bounds,] ranges [step, tile, 4], queries [step, rows, C], [keys [step, length, C],] [entries
    [layers, B, E, C],] [hidden [step, tile, E],] maximum and total [step, tile, heads], weighted [step, rows, C], or
    all three `together` [step, rows, C + 128]; scratch: largest and sums [rows, 128] [, blocks of two batch rows, two
    each; their semaphores [; what is rounded at the end [step, rows, C]]].
    """
    left = list(refs)
    layer: Any = left.pop(0) if block else None
    bounds: Any = left.pop(0) if block else None
    ranges, queries = left.pop(0), left.pop(0)
    keys: Any = left.pop(0) if room else None
    stack: Any = left.pop(0) if block else None
    hides: Any = left.pop(0) if picks else None
    packed: Any = left.pop(0) if together else None
    maximum: Any = None if together else left.pop(0)
    total: Any = None if together else left.pop(0)
    weighted: Any = packed.at[:, :, pl.ds(0, queries.shape[2])] if together else left.pop(0)
    largest, sums, *buffers = left
    blocks: Any = buffers[0] if block else None
    arrived: Any = buffers[1] if block else None
    added: Any = buffers[2] if buffers[2:] else weighted
    (step, tile, _), size, dtype = ranges.shape, queries.shape[2], queries.dtype
    tokens = next(n for n in range(max(1, CHUNK // heads), 0, -1) if tile % n == 0)  # of a chunk
    chunk, chunks = tokens * heads, tile // tokens
    group, here = pl.program_id(0), pl.program_id(1)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def dot(a: Array, b: Array, axis: int) -> Array:
        dimensions = (((1,), (axis,)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)

    def attend(
        row: Any,
        keys: Array,
        number: Any,
        columns: tuple[int, int] | None,
        wanted: Any = 0,
        *,
        fresh: bool,
        picked: bool = False,
    ) -> None:
        """Joins keys from `number` on.

        Of those from `wanted` on each query sees a range, which is in two columns of `ranges`; None: all, or those that
        it is said to attend.
        """
        count = keys.shape[0]

        def score(c: int) -> Array:
            return dot(queries[row, c * chunk : (c + 1) * chunk, :], keys, 1)

        ahead = score(0)
        for c in range(chunks):
            logits, rows = ahead * scale, slice(c * chunk, (c + 1) * chunk)
            if c + 1 < chunks:
                ahead = score(c + 1)
            own = slice(c * tokens, (c + 1) * tokens)
            hidden: Any = hides[row, own, pl.ds(pl.multiple_of(number, LANES), count)] if picked else None
            if columns is not None:
                low, high = (ranges[row, own, x : x + 1] for x in columns)
                place = number + jax.lax.broadcasted_iota(jnp.int32, (tokens, count), 1)
                seen = (place >= jnp.maximum(low, wanted)) & (place < high)
                hidden = jnp.where(seen, 0.0, HIDDEN)
            if hidden is not None:
                logits = (logits.reshape(tokens, heads, count) + hidden[:, None, :]).reshape(chunk, count)
            most = jnp.max(by_lane(logits, jnp.maximum), axis=1, keepdims=True)
            before = jnp.full((chunk, LANES), MASKED * LOG2E, jnp.float32) if fresh else largest[rows, :]
            now = jnp.maximum(before, most)
            shares = jnp.exp2(logits - repeated(now, count))
            amount = by_lane(shares, jnp.add)
            values = dot(shares.astype(dtype), keys, 0)
            if not fresh:
                rescale = jnp.exp2(before - now)
                amount += sums[rows, :] * rescale
                values += added[row, rows, :] * repeated(rescale, size)
            largest[rows, :], sums[rows, :], added[row, rows, :] = now, amount, values.astype(added.dtype)

    def bound(row: Any, which: int) -> Any:
        return bounds[(((group * step + row) * tiles) + here) * 4 + which]

    def begin(j: Any) -> Any:  # the last block may reach back over the one before
        return pl.multiple_of(jnp.minimum(j * block, stack.shape[2] - block), SUBLANES)

    def transfer(row: Any, j: Any, slot: Any) -> Any:
        own = group * step + row if shared == 1 else jax.lax.div(group * step + row, shared)
        there = stack.at[layer[0], own, pl.ds(begin(j), block), :]
        return pltpu.make_async_copy(there, blocks.at[row & 1, slot], arrived.at[row & 1, slot])

    def ask(row: Any, j: Any, slot: Any) -> None:
        @pl.when(j < bound(row, 1))
        def _() -> None:
            transfer(row, j, slot).start()

    def each_row(row: Any, carry: None) -> None:
        if block:

            @pl.when(row + 1 < step)
            def _() -> None:
                ask(row + 1, bound(jnp.minimum(row + 1, step - 1), 0), 0)

        if room:
            # No division: the sign that it looks at lowers differently by chip, which a CPU host cannot tell.
            start = 0 if tiles == 1 else pl.multiple_of(here * tile & -SUBLANES, SUBLANES)
            attend(row, keys[row, pl.ds(start, room), :], start, (0, 1), fresh=True)
        else:
            largest[...] = jnp.full(largest.shape, MASKED * LOG2E, jnp.float32)
            sums[...] = jnp.zeros(sums.shape, jnp.float32)
            added[row] = jnp.zeros((tile * heads, size), added.dtype)

        def entries(slot: Any) -> Array:
            found = blocks[row & 1, slot]
            return found if found.dtype == dtype else pltpu.bitcast(found, dtype)

        def each_block(j: Any, carry: None) -> None:
            slot = (j - bound(row, 0)) & 1
            with about(0):  # a plan counts their bytes
                ask(row, j + 1, 1 - slot)
                transfer(row, j, slot).wait()
            if picks:
                attend(row, entries(slot), begin(j), None, fresh=False, picked=True)
                return carry
            whole = (j >= bound(row, 2)) & (j < bound(row, 3))

            def attend_whole() -> None:
                attend(row, entries(slot), begin(j), None, fresh=False)

            def attend_part() -> None:
                attend(row, entries(slot), begin(j), (2, 3), j * block, fresh=False)

            with about(1):
                pl.when(whole)(attend_whole)
            with about(0):  # the first and the last at most
                pl.when(~whole)(attend_part)
            return carry

        if block:
            with about(turns):
                jax.lax.fori_loop(bound(row, 0), bound(row, 1), each_block, None)
        if buffers[2:]:
            weighted[row] = added[row].astype(dtype)
        amount = jnp.sum(sums[...], axis=1, keepdims=True)
        most = largest[...] * (1 / LOG2E)
        if together:
            packed[row, :, size:] = statistics(most, amount)
        else:
            maximum[row] = across(most, heads)
            total[row] = across(jnp.broadcast_to(amount, largest.shape), heads)
        return carry

    if block:
        ask(0, bound(0, 0), 0)
    jax.lax.fori_loop(0, step, each_row, None)


def by_lane(x: Array, join: Any) -> Array:
    """[N, n * 128] -> [N, 128]."""
    return functools.reduce(join, (x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)))


def repeated(x: Array, count: int) -> Array:
    """[N, 128] with the same in all lanes -> [N, count]."""
    return jnp.concatenate([x] * (count // LANES), axis=1)


def statistics(largest: Array, total: Array) -> Array:
    """The last channels [N, 128] of a `Packed` softmax, from columns."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (total.shape[0], STATISTICS), 1)
    return jnp.where(lane == 0, largest, jnp.where(lane == 1, total, 0.0))


def in_rows(x: Array) -> Array:
    """[tile, heads] -> [tile * heads, 128], the same in all lanes."""
    return jnp.broadcast_to(x[:, :, None], (*x.shape, LANES)).reshape(-1, LANES)


def across(x: Array, heads: int) -> Array:
    """[tile * heads, 128] with the same in all lanes -> [tile, heads]."""
    shape = (x.shape[0] // heads, heads, LANES)
    own = jax.lax.broadcasted_iota(jnp.int32, shape, 1) == jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    return jnp.sum(jnp.where(own, x.reshape(shape), 0.0), axis=1)[:, :heads]
