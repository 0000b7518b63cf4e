"""Index scores and the exact choice of the best entries for TPUs, in one kernel: no score ever reaches HBM.

A block of queries goes over all index keys that any of them sees, `8 * columns` keys a step, and keeps its scores in
VMEM, as integers that order as the scores do. Then the k-th best score of each query is found (`threshold.py`), and the
numbers of the entries that reach it are packed together (`packing.py`), or the entries marked (`marks.py`). Rows of few
queries choose when all of them have their scores: a round of the search for a threshold takes as long for one query as
for sixteen.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.cache.entries import Entries
from v4_jax.kernels.indexer import marks
from v4_jax.kernels.indexer.cut import (
    LANES,
    LEAST,
    QUERIES,
    SCORES_BYTES,
    SUBLANES,
    Cut,
    cut_of,
    entry_numbers,
    rank_of,
)
from v4_jax.kernels.indexer.marks import Marks, mark
from v4_jax.kernels.indexer.packing import pack
from v4_jax.kernels.indexer.threshold import threshold
from v4_jax.kernels.memory import cores, kept_in_hbm
from v4_jax.kernels.turns import about
from v4_jax.layers.visible import Visible
from v4_jax.natural import quotient

Result = Literal["numbers", "candidates", "marks"]  # what is written of the best entries

SIDE_BY_SIDE = 4  # queries whose products are taken at once
OVERLAPPING = 4  # sublanes of keys in one turn of the loop: products of one are awaited while another's are summed
UNROLLED = 16  # pages that are asked for without a loop, on TPUs
VMEM_BYTES = 56 << 20  # of the 64 MiB or more that every generation from v5e on has


def supports(queries: Array, keys: Entries, top: int) -> bool:
    """Whether `best_entries` takes index queries [B, Q, heads, C] over such entries.

    For few queries no copies of keys are made, which would cost as much as the room that there is for entries.
    """
    (count, heads, size), entries = queries.shape[1:], keys.count
    if queries.dtype not in (jnp.bfloat16, jnp.float32) or heads % 16 or heads > LANES or size % LANES:
        return False
    cut = cut_of(count, entries)
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
    if scored:
        found = candidates(queries, weights, keys, visible, top=top, share=share, interpret=interpret)
        bits, numbers = (x[..., :top] for x in jnp.split(found, 2, axis=-1))
        return jax.lax.bitcast_convert_type(bits, jnp.float32), numbers
    return None, _of_entries("numbers", queries, weights, keys, visible, top, share, interpret)[..., :top]


def candidates(
    queries: Array,
    weights: Array,
    keys: Entries,
    visible: Visible,
    *,
    top: int,
    share: float = 1,
    interpret: bool = False,
) -> Array:
    """`best_entries` and their scores as they travel between devices: [B, Q, 2 K] int32, K being `top` made up to 128s.

    Bits of the scores come first, of -inf for none, and then the numbers, -1 for none.

    Raises:
      NotImplementedError: `supports` says no.
    """
    return _of_entries("candidates", queries, weights, keys, visible, top, share, interpret)


def marks_of(
    queries: Array,
    weights: Array,
    keys: Entries,
    visible: Visible,
    *,
    top: int,
    share: float = 1,
    interpret: bool = False,
) -> Marks:
    """`best_entries` as marks.

    Raises:
      NotImplementedError: `supports` says no, or `marks.supports`.
    """
    if not marks.supports(queries.shape[1], keys.count):
        steps = cut_of(queries.shape[1], keys.count).steps
        raise NotImplementedError(f"{keys.count} entries are chosen from in {steps} steps: expected 1")
    bits = _of_entries("marks", queries, weights, keys, visible, top, share, interpret)
    return Marks(bits, keys.count, top)


def _of_entries(
    result: Result,
    queries: Array,
    weights: Array,
    keys: Entries,
    visible: Visible,
    top: int,
    share: float,
    interpret: bool,
) -> Array:
    """Of entries as they are stored, the numbers of the best, their `candidates`, or the bits of their marks."""
    if not supports(queries, keys, top):
        raise NotImplementedError(
            f"index queries {queries.shape} of {queries.dtype} over {keys.count} entries: expected channels in "
            f"multiples of {LANES}, heads of 16 up to {LANES}, bfloat16 or float32, and scores that fit VMEM"
        )
    stack, layer, table = keys.rows.arrays[0], keys.layer, keys.table
    if keys.rows.kind != "plain" or jnp.dtype(keys.rows.dtype) != queries.dtype:
        stack, layer, table = keys.block(0, keys.count).astype(queries.dtype)[None], 0, None
    turns = math.ceil(share * cut_of(queries.shape[1], keys.count).steps)
    page = 0 if table is None else keys.page
    options = dict(top=top, result=result, page=page, turns=turns, interpret=interpret)
    return _best_entries(queries, weights, stack, layer, table, visible.low, visible.high, **options)


@functools.partial(jax.jit, static_argnames=("top", "result", "page", "turns", "interpret"))
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
    result: Result,
    page: int,
    turns: int,
    interpret: bool,
) -> Array:
    """The same over keys [L, B, E, C] of all layers in the queries' dtype, or its bits, within [low, high) [B, Q].

    With a table of pages [B, pages], keys are [L, 1, places, C]. A block of queries takes about so many turns.
    """
    batch, count, heads, size = queries.shape
    entries = keys.shape[2] if table is None else table.shape[1] * page
    cut = cut_of(count, entries)
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
    together = _together(batch // cores(), cut) if blocks == 1 and batch % cores() == 0 else 1
    members = max(blocks, together)
    bounds = low.reshape(batch * blocks, -1), high.reshape(batch * blocks, -1)
    seen = bounds[1] > bounds[0]
    first = quotient(jnp.min(jnp.where(seen, bounds[0], entries), axis=1), cut.keys)
    # The same for rows that choose together, whose scores lie beside one another.
    first = jnp.repeat(jnp.min(first.reshape(-1, together), axis=1), together)
    last = quotient(jnp.max(jnp.where(seen, bounds[1], 0), axis=1) + cut.keys - 1, cut.keys)
    ahead = jnp.maximum(last - first, 0)
    scalars = (jnp.asarray(layer, jnp.int32).reshape(1), first, ahead, low.reshape(-1), high.reshape(-1))

    def row(g: Any, i: Any) -> Any:
        return g if together == 1 else g * together + i

    def part(i: Any) -> Any:
        return i if together == 1 else 0

    def step(g: Any, i: Any, e: Any, first: Any, ahead: Any) -> Any:
        """The step of these keys that comes e-th; the last one again, and no other is fetched, after the last."""
        block = g * members + i
        return first[block] + jnp.clip(e, 0, jnp.maximum(ahead[block] - 1, 0))

    if table is None:
        queries, operands = kept_in_hbm(queries, [keys], interpret=interpret)
        buffers = []
        specs = [
            pl.BlockSpec(
                (None, None, cut.keys, size),
                lambda g, i, e, layer, first, ahead, *_: (layer[0], row(g, i), step(g, i, e, first, ahead), 0),
            )
        ]
    else:
        pages = cut.keys // page
        table = jnp.pad(table, ((0, 0), (0, cut.steps * pages - table.shape[1])))
        table = (layer * (keys.shape[2] // page) + jnp.maximum(table, 0)).reshape(batch, cut.steps, 1, pages)

        def pages_of(later: int) -> pl.BlockSpec:
            return pl.BlockSpec(
                (None, None, 1, pages),
                lambda g, i, e, _, first, ahead, *__: (row(g, i), step(g, i, e + later, first, ahead), 0, 0),
                memory_space=pltpu.SMEM,
            )

        queries, (pages_of_all,) = kept_in_hbm(queries, [keys.reshape(-1, page, size)], interpret=interpret)
        operands = [table, table, pages_of_all]
        specs = [pages_of(0), pages_of(1), pl.BlockSpec(memory_space=pl.ANY)]
        buffers = [pltpu.VMEM((2 * pages, page, size), keys.dtype), pltpu.SemaphoreType.DMA((2,))]

    lines = together * cut.queries
    width = {"numbers": slots, "candidates": 2 * slots, "marks": LANES}[result]
    shape = (batch // together, together * (count + padding), width)
    state = (lines, SUBLANES, LANES)
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            cut=cut,
            members=members,
            together=together,
            turns=turns,
            top=top,
            result=result,
            page=page,
            unroll=1 if interpret else UNROLLED,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch // together, members, jnp.maximum(jnp.max(ahead), 1)),
            in_specs=[
                pl.BlockSpec((None, cut.queries, heads, size), lambda g, i, e, *_: (row(g, i), part(i), 0, 0)),
                pl.BlockSpec((None, cut.queries, heads), lambda g, i, e, *_: (row(g, i), part(i), 0)),
                *specs,
            ],
            out_specs=pl.BlockSpec((None, lines, shape[2]), lambda g, i, e, *_: (g, part(i), 0)),
            scratch_shapes=[
                pltpu.VMEM((lines, SUBLANES, cut.chunks * cut.chunk), jnp.int32),
                pltpu.VMEM((lines, SUBLANES, cut.chunk), jnp.int32),
                pltpu.VMEM((cut.queries, heads, LANES), jnp.float32),
                *(pltpu.VMEM(state, jnp.int32) for _ in range(3)),
                *buffers,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel" if together == 1 else "arbitrary", "arbitrary"),
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
    return found.reshape(batch, count + padding, -1)[:, :count]


def _together(batch: int, cut: Cut) -> int:
    """Of so many rows with one block of queries each, those that choose together."""
    most = min(QUERIES // cut.queries, SCORES_BYTES // (4 * cut.queries * cut.steps * cut.keys))
    return max(size for size in range(1, max(1, min(most, batch)) + 1) if batch % size == 0)


def _kernel(
    layer: Any,
    first: Any,
    ahead: Any,
    low: Any,
    high: Any,
    queries: Any,
    weights: Any,
    *rest: Any,
    cut: Cut,
    members: int,
    together: int,
    turns: int,
    top: int,
    result: Result,
    page: int,
    unroll: int,
) -> None:
    """One step of one block of queries: scores of its keys [8 * columns, C]; after the last step, the choice."""
    refs = list(rest)
    pages = [refs.pop(0) for _ in range(2)] if page else []
    keys, numbers = refs.pop(0), refs.pop(0)
    bits = None
    if result == "candidates":
        slots = numbers.shape[1] // 2
        bits, numbers = (numbers.at[:, pl.ds(i * slots, slots)] for i in range(2))
    ranks, maxima, wide, thresholds, limits, wanted, *buffers = refs
    member, step = pl.program_id(1), pl.program_id(2)
    block = pl.program_id(0) * members + member
    start = first[block]
    own_ranks, own_maxima = ranks, maxima
    if together > 1:
        own_ranks, own_maxima = (x.at[pl.ds(member * cut.queries, cut.queries)] for x in (ranks, maxima))

    @pl.when(step == 0)
    def _() -> None:
        own_maxima[...] = jnp.full(own_maxima.shape, LEAST, jnp.int32)
        _spread(weights, wide)

    def score() -> None:
        own = _fetched(keys, pages, *buffers, step, ahead[block], unroll) if page else keys
        here = pl.ds(pl.multiple_of(step * cut.columns, cut.columns), cut.columns)
        _score(queries, own, wide, own_ranks, here, cut, unroll)
        group = pl.ds(pl.multiple_of(jax.lax.rem(step, cut.group) * cut.columns, cut.columns), cut.columns)
        number = entry_numbers(cut.columns, cut) + (start + step) * cut.keys
        for t in range(cut.queries):
            query = block * cut.queries + t
            seen = (number >= low[query]) & (number < high[query])
            rank = jnp.where(seen, rank_of(own_ranks[t, :, here]), LEAST)
            own_ranks[t, :, here] = rank
            own_maxima[t, :, group] = jnp.maximum(own_maxima[t, :, group], rank)

    with about(1):
        pl.when(step < ahead[block])(score)

    def choose() -> None:
        before = block + 1 - together
        most = functools.reduce(jnp.maximum, [ahead[before + i] for i in range(together)])
        for t in range(ranks.shape[0]):
            query = before * cut.queries + t
            wanted[t] = jnp.full((SUBLANES, LANES), high[query] - low[query], jnp.int32)
        used = jax.lax.div(most + cut.group - 1, cut.group)
        thresholds[...], limits[...] = threshold(ranks, maxima, wanted[...], top, start, used, cut)

        def keep(t: Any, carry: None) -> None:
            if result == "marks":
                mark(t, ranks, thresholds, limits, numbers, cut)
            else:
                pack(t, ranks, thresholds, limits, wanted, start, numbers, bits, top, cut)
            return carry

        jax.lax.fori_loop(0, ranks.shape[0], keep, None)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        def clear(column: Any, carry: None) -> None:
            own_ranks[:, :, pl.ds(pl.multiple_of(column * cut.columns, cut.columns), cut.columns)] = jnp.full(
                (cut.queries, SUBLANES, cut.columns), LEAST, jnp.int32
            )
            return carry

        with about(cut.chunks * cut.group - turns):
            jax.lax.fori_loop(ahead[block], cut.chunks * cut.group, clear, None)
        if together == 1:
            choose()
        else:
            pl.when(member == pl.num_programs(1) - 1)(choose)


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


def _score(queries: Any, keys: Any, wide: Any, ranks: Any, here: Any, cut: Cut, unroll: int) -> None:
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

    jax.lax.fori_loop(0, SUBLANES, sublane, None, unroll=min(unroll, OVERLAPPING))
