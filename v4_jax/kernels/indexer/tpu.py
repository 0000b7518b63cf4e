"""Index scores and the exact choice of the best entries for TPUs, in one kernel: no score ever reaches HBM.

A block of queries goes over all index keys that any of them sees, `8 * columns` keys a step, and keeps its scores in
VMEM, as integers that order as the scores do. Then the k-th best score of each query is found without a sort, by
narrowing an interval of such integers with counts of how many scores lie above. The narrowing begins on the maxima of
groups of up to 16 entries: k of the maxima, and so k scores, reach the k-th best maximum, and little more than k. The
chosen entries' numbers are then packed together by products with zeros and ones, exact in bfloat16.

Scores of a query fill the eight sublanes of its registers, so that counting costs a single query no more than its
share. Entry `(8 * step + sublane) * columns + i` of the visible steps lies in lane `step * columns + i`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.cache.entries import Entries
from v4_jax.kernels.memory import kept_in_hbm
from v4_jax.kernels.turns import about
from v4_jax.layers.visible import Visible
from v4_jax.natural import quotient

LANES, SUBLANES = 128, 8  # of a vector register
COLUMNS = 512  # keys of a sublane in a step, fewer where there are few keys
FOLD = 16  # entries of a group at most: 16 maxima fill the depth of a matrix unit when the chosen are packed
QUERIES = 16  # of a block
SIDE_BY_SIDE = 4  # queries whose products are taken at once
ROUNDS = 12  # of a search for a threshold: 4 to 19 with scores of several shapes, 8,192 to 262,144 of them
SLOTS = 512  # places that are packed at once
ROOM = 16  # rows of the table beside the entries, for digits
UNROLLED = 16  # pages that are asked for without a loop
SCORES_BYTES = 34 << 20  # of a block's scores in VMEM
VMEM_BYTES = 56 << 20  # of the 64 MiB or more that every generation from v5e on has
LEAST = -(2**31)  # below every score
TIED = 2**31 - 1  # beyond every entry


class _Sizes(NamedTuple):
    """How the work is cut."""

    queries: int  # of a block
    columns: int  # keys of a sublane in a step
    steps: int  # for all keys
    group: int  # steps side by side in a chunk of columns: entries of a group lie one in each chunk

    @property
    def keys(self) -> int:
        """Keys of a step."""
        return SUBLANES * self.columns

    @property
    def chunk(self) -> int:
        """Columns of a chunk."""
        return self.group * self.columns

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.steps, self.group)

    @property
    def shift(self) -> int:
        """Logarithm of the columns, to divide by: the sign that a division looks at lowers differently by chip."""
        return self.columns.bit_length() - 1


def _sizes(queries: int, entries: int) -> _Sizes:
    columns = LANES
    while columns < min(COLUMNS, entries // SUBLANES):
        columns *= 2
    steps = pl.cdiv(entries, SUBLANES * columns)
    block = QUERIES
    while block > 1 and 4 * block * steps * SUBLANES * columns > SCORES_BYTES:
        block //= 2
    return _Sizes(min(queries, block), columns, steps, pl.cdiv(steps, FOLD))


def supports(queries: Array, keys: Entries, top: int) -> bool:
    """Whether `best_entries` takes index queries [B, Q, heads, C] over such entries.

    For few queries no copies of keys are made, which would cost as much as the room that there is for entries.
    """
    (count, heads, size), entries = queries.shape[1:], keys.count
    if queries.dtype not in (jnp.bfloat16, jnp.float32) or heads % 16 or heads > LANES or size % LANES:
        return False
    cut = _sizes(count, entries)
    return (
        (keys.rows.kind == "plain" or count >= QUERIES)
        and (keys.table is None or cut.columns % keys.page == 0)
        and 4 * cut.queries * cut.steps * cut.keys <= SCORES_BYTES
        and (cut.queries % SUBLANES == 0 or cut.queries == count)
        and top <= SUBLANES * cut.chunk
    )


def best_entries(
    queries: Array,
    weights: Array,
    keys: Entries,
    visible: Visible,
    *,
    top: int,
    scored: bool = False,
    share: float = 1,
    interpret: bool = False,
) -> tuple[Array | None, Array]:
    """See `selection.best_entries`; the order is none in particular.

    Keys of a plain cache are read where they lie. Of others the layer's are copied, decoded. A plan counts that a query
    sees such a `share` of all.

    Raises:
      NotImplementedError: `supports` says no.
    """
    if not supports(queries, keys, top):
        raise NotImplementedError(
            f"index queries {queries.shape} of {queries.dtype} over {keys.count} entries: expected channels in "
            f"multiples of {LANES}, heads of 16 up to {LANES}, bfloat16 or float32, and scores that fit VMEM"
        )
    stack, layer, table = keys.rows.arrays[0], keys.layer, keys.table
    if keys.rows.kind != "plain" or jnp.dtype(keys.rows.dtype) != queries.dtype:
        stack, layer, table = keys.block(0, keys.count).astype(queries.dtype)[None], 0, None
    turns = math.ceil(share * _sizes(queries.shape[1], keys.count).steps)
    options = dict(top=top, scored=scored, page=0 if table is None else keys.page, turns=turns, interpret=interpret)
    return _best_entries(queries, weights, stack, layer, table, visible.low, visible.high, **options)


@functools.partial(jax.jit, static_argnames=("top", "scored", "page", "turns", "interpret"))
def _best_entries(
    queries: Array,
    weights: Array,
    keys: Array,
    layer: Any,
    table: Array | None,
    low: Array,
    high: Array,
    *,
    top: int,
    scored: bool,
    page: int,
    turns: int,
    interpret: bool,
) -> tuple[Array | None, Array]:
    """The same over keys [L, B, E, C] of all layers in the queries' dtype, or its bits, within [low, high) [B, Q].

    With a table of pages [B, pages], keys are [L, 1, places, C]. A block of queries takes about so many turns.
    """
    batch, count, heads, size = queries.shape
    entries = keys.shape[2] if table is None else table.shape[1] * page
    cut = _sizes(count, entries)
    if table is None and entries < cut.keys:
        keys, layer = jax.lax.dynamic_index_in_dim(keys, layer, keepdims=True), 0
        keys = jnp.pad(keys, ((0, 0), (0, 0), (0, cut.keys - entries), (0, 0)))
    high = jnp.minimum(high, entries)
    low = jnp.minimum(low, high)
    padding = -count % cut.queries
    queries, weights, low, high = (
        jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in (queries, weights, low, high)
    )
    blocks, slots = (count + padding) // cut.queries, pl.cdiv(top, LANES) * LANES
    bounds = low.reshape(batch * blocks, -1), high.reshape(batch * blocks, -1)
    seen = bounds[1] > bounds[0]
    first = quotient(jnp.min(jnp.where(seen, bounds[0], entries), axis=1), cut.keys)
    last = quotient(jnp.max(jnp.where(seen, bounds[1], 0), axis=1) + cut.keys - 1, cut.keys)
    ahead = jnp.maximum(last - first, 0)
    scalars = (jnp.asarray(layer, jnp.int32).reshape(1), first, ahead, low.reshape(-1), high.reshape(-1))

    def step(b: Any, i: Any, e: Any, first: Any, ahead: Any) -> Any:
        """The step of these keys that comes e-th; the last one again, and no other is fetched, after the last."""
        block = b * blocks + i
        return first[block] + jnp.clip(e, 0, jnp.maximum(ahead[block] - 1, 0))

    if table is None:
        queries, operands = kept_in_hbm(queries, [keys], interpret=interpret)
        buffers = []
        specs = [
            pl.BlockSpec(
                (None, None, cut.keys, size),
                lambda b, i, e, layer, first, ahead, *_: (layer[0], b, step(b, i, e, first, ahead), 0),
            )
        ]
    else:
        pages = cut.keys // page
        table = jnp.pad(table, ((0, 0), (0, cut.steps * pages - table.shape[1])))
        table = (layer * (keys.shape[2] // page) + jnp.maximum(table, 0)).reshape(batch, cut.steps, 1, pages)

        def pages_of(later: int) -> pl.BlockSpec:
            return pl.BlockSpec(
                (None, None, 1, pages),
                lambda b, i, e, _, first, ahead, *__: (b, step(b, i, e + later, first, ahead), 0, 0),
                memory_space=pltpu.SMEM,
            )

        queries, (pages_of_all,) = kept_in_hbm(queries, [keys.reshape(-1, page, size)], interpret=interpret)
        operands = [table, table, pages_of_all]
        specs = [pages_of(0), pages_of(1), pl.BlockSpec(memory_space=pl.ANY)]
        buffers = [pltpu.VMEM((2 * pages, page, size), keys.dtype), pltpu.SemaphoreType.DMA((2,))]

    outputs = [jax.ShapeDtypeStruct((batch, count + padding, slots), jnp.int32)]
    if scored:
        outputs.append(jax.ShapeDtypeStruct((batch, count + padding, slots), jnp.float32))
    state = (cut.queries, SUBLANES, LANES)
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            cut=cut,
            blocks=blocks,
            turns=turns,
            top=top,
            scored=scored,
            page=page,
            unroll=1 if interpret else UNROLLED,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, blocks, jnp.maximum(jnp.max(ahead), 1)),
            in_specs=[
                pl.BlockSpec((None, cut.queries, heads, size), lambda b, i, e, *_: (b, i, 0, 0)),
                pl.BlockSpec((None, cut.queries, heads), lambda b, i, e, *_: (b, i, 0)),
                *specs,
            ],
            out_specs=[pl.BlockSpec((None, cut.queries, slots), lambda b, i, e, *_: (b, i, 0)) for _ in outputs],
            scratch_shapes=[
                pltpu.VMEM((cut.queries, SUBLANES, cut.chunks * cut.chunk), jnp.int32),
                pltpu.VMEM((cut.queries, SUBLANES, cut.chunk), jnp.int32),
                pltpu.VMEM((cut.queries, heads, LANES), jnp.float32),
                *(pltpu.VMEM(state, jnp.int32) for _ in range(3)),
                *buffers,
            ],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,  # they take longer than asking for a page
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * queries.size * turns * cut.keys,
            bytes_accessed=(batch * blocks * turns * cut.keys * size + queries.size) * keys.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="best_entries",
    )
    with about(turns):
        found = call(*scalars, queries, weights, *operands)
    numbers = found[0][:, :count, :top]
    return (found[1][:, :count, :top] if scored else None), numbers


def _kernel(
    layer: Any,
    first: Any,
    ahead: Any,
    low: Any,
    high: Any,
    queries: Any,
    weights: Any,
    *rest: Any,
    cut: _Sizes,
    blocks: int,
    turns: int,
    top: int,
    scored: bool,
    page: int,
    unroll: int,
) -> None:
    """One step of one block of queries: scores of its keys [8 * columns, C]; after the last step, the choice."""
    refs = list(rest)
    pages = [refs.pop(0) for _ in range(2)] if page else []
    keys, numbers = refs.pop(0), refs.pop(0)
    values = refs.pop(0) if scored else None
    ranks, maxima, wide, thresholds, limits, wanted, *buffers = refs
    block, step = pl.program_id(0) * blocks + pl.program_id(1), pl.program_id(2)
    start = first[block]
    tokens = range(cut.queries)

    @pl.when(step == 0)
    def _() -> None:
        maxima[...] = jnp.full(maxima.shape, LEAST, jnp.int32)
        _spread(weights, wide)

    @pl.when(step < ahead[block])
    def _() -> None:
        own = _fetched(keys, pages, *buffers, step, ahead[block], unroll) if page else keys
        here = pl.ds(pl.multiple_of(step * cut.columns, cut.columns), cut.columns)
        _score(queries, own, wide, ranks, here, cut)
        group = pl.ds(pl.multiple_of(jax.lax.rem(step, cut.group) * cut.columns, cut.columns), cut.columns)
        number = _numbers(cut.columns, cut) + (start + step) * cut.keys
        for t in tokens:
            query = block * cut.queries + t
            seen = (number >= low[query]) & (number < high[query])
            rank = jnp.where(seen, _rank(ranks[t, :, here]), LEAST)
            ranks[t, :, here] = rank
            maxima[t, :, group] = jnp.maximum(maxima[t, :, group], rank)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        def clear(column: Any, carry: None) -> None:
            ranks[:, :, pl.ds(pl.multiple_of(column * cut.columns, cut.columns), cut.columns)] = jnp.full(
                (cut.queries, SUBLANES, cut.columns), LEAST, jnp.int32
            )
            return carry

        with about(cut.chunks * cut.group - turns):
            jax.lax.fori_loop(ahead[block], cut.chunks * cut.group, clear, None)
        for t in tokens:
            query = block * cut.queries + t
            wanted[t] = jnp.full((SUBLANES, LANES), high[query] - low[query], jnp.int32)
        used = jax.lax.div(ahead[block] + cut.group - 1, cut.group)
        thresholds[...], limits[...] = _threshold(ranks, maxima, wanted[...], top, start, used, cut)

        def pack(t: Any, carry: None) -> None:
            _pack(t, ranks, thresholds, limits, wanted, start, numbers, values, top, cut)
            return carry

        jax.lax.fori_loop(0, cut.queries, pack, None)


def _fetched(keys: Any, pages: Any, buffer: Any, arrived: Any, step: Any, steps: Any, unroll: int) -> Any:
    """This step's keys, whose pages were asked for in the step before; those of the next are asked for."""

    def ask(table: Any, slot: Any) -> None:
        def one(i: Any, carry: None) -> None:
            pltpu.make_async_copy(keys.at[table[0, i]], buffer.at[slot * count + i], arrived.at[slot]).start()
            return carry

        jax.lax.fori_loop(0, count, one, None, unroll=unroll)

    count, slot = pages[0].shape[1], step & 1
    pl.when(step == 0)(lambda: ask(pages[0], slot))
    pl.when(step + 1 < steps)(lambda: ask(pages[1], 1 - slot))
    own = buffer.at[pl.ds(slot * count, count)]
    pltpu.make_async_copy(own, own, arrived.at[slot]).wait()
    return own


def _spread(weights: Any, wide: Any) -> None:
    """Weights [Q, heads] to [Q, heads, lanes]: each head's in all lanes."""
    heads = weights.shape[1]
    own = jax.lax.broadcasted_iota(jnp.int32, (heads, heads), 0) == jax.lax.broadcasted_iota(
        jnp.int32, (heads, heads), 1
    )
    for t in range(weights.shape[0]):
        column = jnp.sum(jnp.where(own, weights[t : t + 1, :], 0.0), axis=1, keepdims=True)
        wide[t] = jnp.broadcast_to(column, (heads, LANES))


def _score(queries: Any, keys: Any, wide: Any, ranks: Any, here: Any, cut: _Sizes) -> None:
    """Bits of the scores of all queries and keys of a step, sublane by sublane."""
    count, heads, size = queries.shape
    exact = jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None

    def sublane(g: Any, carry: None) -> None:
        lines = cut.columns * keys.shape[0] // cut.keys  # of pages, or of keys
        key = keys[pl.ds(pl.multiple_of(g * lines, lines), lines)].reshape(cut.columns, size)
        if key.dtype != queries.dtype:
            key = pltpu.bitcast(key, queries.dtype)
        for t in range(0, count, SIDE_BY_SIDE):
            some = min(SIDE_BY_SIDE, count - t)
            products = jax.lax.dot_general(
                queries[t : t + some].reshape(some * heads, size),
                key,
                (((1,), (1,)), ((), ())),
                precision=exact,
                preferred_element_type=jnp.float32,
            )
            for u in range(some):
                weight = jnp.concatenate([wide[t + u]] * (cut.columns // LANES), axis=1)
                weighed = jnp.maximum(products[u * heads : (u + 1) * heads], 0.0) * weight
                total = weighed[:SUBLANES]
                for h in range(SUBLANES, heads, SUBLANES):
                    total += weighed[h : h + SUBLANES]
                score = jnp.sum(total, axis=0, keepdims=True)
                ranks[t + u, pl.ds(g, 1), here] = pltpu.bitcast(score, jnp.int32)
        return carry

    jax.lax.fori_loop(0, SUBLANES, sublane, None)


def _numbers(columns: int, cut: _Sizes) -> Array:
    """Numbers [8, columns] of entries in the first lanes, counted from the first step."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, columns), 1)
    sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, columns), 0)
    return (SUBLANES * (lane >> cut.shift) + sublane) * cut.columns + (lane & (cut.columns - 1))


def _rank(bits: Array) -> Array:
    """Float32 bits to integers of the same order, above `LEAST`; both zeros are 0. Its own inverse but for -0."""
    return jnp.where(bits < 0, LEAST - bits, bits)


def _total(counts: Array) -> Array:
    """Sums [Q, 8, 128] int32 over each query's register, everywhere in it; sums are below 2^24."""
    total = jnp.sum(counts.astype(jnp.float32), axis=1, keepdims=True)
    return jnp.broadcast_to(jnp.sum(total, axis=2, keepdims=True), counts.shape).astype(jnp.int32)


def _any(mask: Array) -> Array:
    return jnp.max(mask.astype(jnp.float32)) > 0


def _threshold(
    ranks: Any, maxima: Any, visible: Array, top: int, start: Any, used: Any, cut: _Sizes
) -> tuple[Array, Array]:
    """Each query's k-th best rank, and the first entry from which on equal ones are left out.

    All are [Q, 8, 128] int32, the same everywhere in a query's register.
    """
    zero = jnp.zeros(visible.shape, jnp.int32)

    def count(reached: Any) -> Array:
        """How many ranks fulfil `reached`, which maps ranks [Q, 8, 128] and where they begin."""

        def chunk(c: Any, counts: Array) -> Array:
            for i in range(0, cut.chunk, LANES):
                lanes = pl.multiple_of(c * cut.chunk, LANES) + i
                counts += reached(ranks[:, :, pl.ds(lanes, LANES)], lanes).astype(jnp.int32)
            return counts

        with about(cut.chunks):
            return _total(jax.lax.fori_loop(0, used, chunk, zero))

    def count_maxima(rank: Array) -> Array:
        counts = zero
        for i in range(0, cut.chunk, LANES):
            counts += (maxima[:, :, i : i + LANES] >= rank).astype(jnp.int32)
        return _total(counts)

    def count_ranks(rank: Array) -> Array:
        return count(lambda x, _: x >= rank)

    most = maxima[:, :, :LANES]
    for i in range(LANES, cut.chunk, LANES):
        most = jnp.maximum(most, maxima[:, :, i : i + LANES])
    most = jnp.max(jnp.max(most, axis=1, keepdims=True), axis=2, keepdims=True)
    most = jnp.broadcast_to(most, visible.shape)
    all_kept = visible <= top  # whatever is visible
    k = jnp.full(visible.shape, top, jnp.int32)
    lowest = jnp.where(all_kept, LEAST + 1, LEAST)
    highest = jnp.where(all_kept, LEAST + 1, most)
    groups = jnp.where(all_kept, k, SUBLANES * cut.chunk)
    lowest = _narrow(count_maxima, k, lowest, highest, groups, slack=top // 8)[0]
    above = jnp.where(all_kept, k, count_ranks(lowest))
    lowest, reach, beyond = _narrow(count_ranks, k, lowest, highest, above, slack=0)

    # More reach the threshold than are wanted: it is the score of several, of which the first ones are kept.
    lacking = k - beyond
    low, high = zero, jnp.where(reach > k, cut.steps * cut.keys, 0)

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = (low + high) >> 1

        def before(x: Array, lanes: Any) -> Array:
            ahead = (start + (lanes >> cut.shift)) * cut.keys + (lanes & (cut.columns - 1))
            number = _numbers(LANES, cut) + ahead
            return (x == lowest) & (number < middle)

        enough = count(before) >= lacking
        searched = low < high
        return jnp.where(searched & ~enough, middle + 1, low), jnp.where(searched & enough, middle, high)

    with about(0):  # equal scores are rare
        limit = jax.lax.while_loop(lambda state: _any(state[0] < state[1]), halve, (low, high))[0]
    return lowest, jnp.where(reach > k, limit, TIED)


def _narrow(
    count: Any, k: Array, lowest: Array, highest: Array, reach: Array, slack: int
) -> tuple[Array, Array, Array]:
    """The largest rank in an interval that at least k of what is counted reach; any where at most `slack` more do.

    Halves the interval and guesses by the counts in turn: guesses are quick where scores are spread evenly, which the
    best ones nearly are, and halving bounds the number of rounds.

    Args:
      count: maps ranks to how many reach each.
      k: how many are wanted.
      lowest: a rank that at least k reach.
      highest: less than k reach more.
      reach: how many reach `lowest`.
      slack: see above.

    Returns:
      The rank, how many reach it, and, where the interval has closed, how many exceed it.
    """

    def open_(lowest: Array, highest: Array, reach: Array) -> Array:
        return (lowest < highest) & (reach > k + slack)

    def cond(state: Any) -> Array:
        return _any(open_(*state[1:4]))

    def body(state: Any) -> Any:
        guess, lowest, highest, reach, beyond = state
        width = highest - lowest  # negative where it overflows
        share = (reach - k).astype(jnp.float32) + 0.5
        share = share / jnp.maximum(reach - beyond, 1).astype(jnp.float32)
        ahead = (share * (0.5 * width.astype(jnp.float32))).astype(jnp.int32) * 2
        guessed = lowest + jnp.clip(ahead, 1, jnp.maximum(width, 1))
        middle = (lowest >> 1) + (highest >> 1) + ((lowest | highest) & 1)
        middle = jnp.where((guess > 0) & (width > 0), guessed, middle)
        found = count(middle)
        searched = open_(lowest, highest, reach)
        up, down = searched & (found >= k), searched & (found < k)
        return (
            1 - guess,
            jnp.where(up, middle, lowest),
            jnp.where(down, middle - 1, highest),
            jnp.where(up, found, reach),
            jnp.where(down, found, beyond),
        )

    state = (jnp.int32(0), lowest, highest, reach, jnp.zeros(k.shape, jnp.int32))
    with about(ROUNDS):
        _, lowest, _, reach, beyond = jax.lax.while_loop(cond, body, state)
    return lowest, reach, beyond


def _pack(
    t: Any,
    ranks: Any,
    thresholds: Any,
    limits: Any,
    wanted: Any,
    start: Any,
    numbers: Any,
    values: Any,
    top: int,
    cut: _Sizes,
) -> None:
    """Writes the numbers, and the scores, of what query t keeps.

    Entries form a table: row 8 * chunk + sublane, column the lane within the chunk. The j-th place takes an entry of
    the column in which the count of kept entries passes j, and of that column's kept entries the right one.
    """
    depth, breadth = SUBLANES * cut.chunks, cut.chunk
    threshold, limit = (_repeat(x[t], breadth) for x in (thresholds, limits))
    chunks = [ranks[t, :, c * breadth : (c + 1) * breadth] for c in range(cut.chunks)]
    number = _numbers(breadth, cut)
    kept = []
    for c, rank in enumerate(chunks):
        tied = (rank == threshold) & (number + (start + c * cut.group) * cut.keys < limit)
        kept.append(((rank > threshold) | tied).astype(jnp.float32))
    heights = functools.reduce(jnp.add, kept)
    heights = jnp.sum(heights, axis=0, keepdims=True)  # [1, breadth]
    before = _before(heights)

    lane = jax.lax.broadcasted_iota(jnp.int32, (1, breadth), 1).astype(jnp.float32)
    digits = [part for x in (lane, before) for part in (x - 256 * jnp.floor(x / 256), jnp.floor(x / 256))]
    table = jnp.concatenate([*kept, *digits, jnp.zeros((ROOM - len(digits), breadth), jnp.float32)], axis=0)
    table = table.astype(jnp.bfloat16)
    width = depth + ROOM
    line = jax.lax.broadcasted_iota(jnp.int32, (width, width), 0)
    up_to = _ones((line <= jax.lax.broadcasted_iota(jnp.int32, (width, width), 1)) & (line < depth))

    slots = numbers.shape[1]
    size = next(size for size in (SLOTS, 2 * LANES, LANES) if slots % size == 0)
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 1)
    # Row 0 adds up the table's rows; rows 1 and 2 read the digits of the lane.
    read = ((row == 0) & (column < depth)) | ((row > 0) & (row < 3) & (column == depth + row - 1))
    read = _ones(read)
    k = jnp.minimum(_repeat(wanted[t], size), top)[:1]

    for place in range(0, slots, size):
        j = place + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0).astype(jnp.float32)
        own = _ones((before <= j) & (j < before + heights))  # [size, breadth]
        found = _contract(own, table)  # [size, width] the column that each place's entry is in
        rank = j - (found[:, depth + 2 : depth + 3] + 256 * found[:, depth + 3 : depth + 4])
        up_to_row = jnp.dot(found.astype(jnp.bfloat16), up_to, preferred_element_type=jnp.float32)
        passed = (up_to_row <= rank).astype(jnp.float32)
        in_table = jax.lax.broadcasted_iota(jnp.int32, (size, width), 1) < depth
        place_of = _contract(read, jnp.where(in_table, passed, found).astype(jnp.bfloat16)).astype(jnp.int32)
        line, lane_of = place_of[:1], place_of[1:2] + 256 * place_of[2:3]
        step = start + (line >> 3) * cut.group + (lane_of >> cut.shift)
        number = (SUBLANES * step + (line & 7)) * cut.columns + (lane_of & (cut.columns - 1))
        here = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) + place < k
        numbers[pl.ds(t, 1), place : place + size] = jnp.where(here, number, -1)
        if values is None:
            continue
        mine = in_table & (up_to_row > rank) & (up_to_row - found <= rank)
        rank = jnp.zeros((1, size), jnp.int32)
        for shift in range(0, 32, 8):
            part = jnp.concatenate([((x >> shift) & 255).astype(jnp.float32) for x in chunks], axis=0)
            part = jnp.concatenate([part, jnp.zeros((ROOM, breadth), jnp.float32)], axis=0).astype(jnp.bfloat16)
            byte = jnp.where(mine, _contract(own, part), 0.0).astype(jnp.bfloat16)
            rank |= _contract(read, byte)[:1].astype(jnp.int32) << shift
        score = pltpu.bitcast(_rank(rank), jnp.float32)
        values[pl.ds(t, 1), place : place + size] = jnp.where(here, score, -jnp.inf)


def _repeat(register: Array, count: int) -> Array:
    """[8, 128], the same in all lanes, to [8, count]."""
    return jnp.concatenate([register] * (count // LANES), axis=1)


def _ones(mask: Array) -> Array:
    """1 and 0 for a mask, in bfloat16."""
    return mask.astype(jnp.float32).astype(jnp.bfloat16)


def _contract(a: Array, b: Array) -> Array:
    """a [M, K] times b [N, K] in bfloat16: [M, N] float32."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _before(heights: Array) -> Array:
    """Sums [1, N] of all heights [1, N] before each; heights are whole numbers up to 256."""
    shape = (LANES, LANES)
    line, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    up_to = _ones(line <= column)
    carry, sums = jnp.zeros((SUBLANES, 1), jnp.float32), []
    for i in range(0, heights.shape[1], LANES):
        own = jnp.broadcast_to(heights[:, i : i + LANES], (SUBLANES, LANES))
        total = jnp.dot(own.astype(jnp.bfloat16), up_to, preferred_element_type=jnp.float32) + carry
        sums.append(total - own)
        carry = total[:, LANES - 1 :]
    return jnp.concatenate(sums, axis=1)[:1]
