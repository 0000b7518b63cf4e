"""The indexer's loss and its gradients for TPUs: neither attention nor scores of entries ever leave the chip.

Of a query's entries, with the attention a that each gets, heads added up, and its score s:

    A = sum a      L = log sum exp(s)      loss = sum a (log a - s) / A - log A + L      d s = exp(s - L) - a / A

and from these, with the indexer's heads z = relu(q . k) and their weights w, d w = sum d s z, d q = d s w k and
d k = d s w q, where z > 0. A tile of queries takes the blocks of entries that any of it sees one after another, all of
which are in VMEM, as the gradients of the index keys are.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.attention.reference import MASKED
from v4_jax.kernels.attention.tiles import Tiles, dot, here
from v4_jax.kernels.attention.tpu import (
    HIDDEN,
    LANES,
    LOG2E,
    VMEM_BYTES,
    across,
    bounds_of,
    by_lane,
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
TOGETHER = 8  # queries whose heads are added up at once
HELD_BYTES = 24 << 20  # of entries, index keys and their gradients, which are all in VMEM
SUM, LOG_SUM, LOSS, GIVEN = range(4)  # lanes of a query's numbers: A, L, the loss, and its gradient


class Operands(NamedTuple):
    """What is compared.

    Attributes:
      queries: [B, Q, H, C] attention's.
      log_total: [B, Q, H] float32 logarithm of the softmax's denominator over window, entries and sink.
      entries: [B, E, C] of any float dtype.
      index_queries: [B, Q, heads, R].
      weights: [B, Q, heads] float32.
      index_keys: [B, E, R] of any float dtype.
    """

    queries: Array
    log_total: Array
    entries: Any
    index_queries: Array
    weights: Array
    index_keys: Any


def supports(operands: Operands) -> bool:
    """Whether `loss` and `gradients` take such operands, arrays or shapes."""
    queries, _, entries, index_queries, _, index_keys = operands
    length, size, index = entries.shape[1] + ENTRIES, entries.shape[2], index_keys.shape[2]
    held = length * ((size + index) * queries.dtype.itemsize + 4 * index)
    return attends(queries) and attends(index_queries) and queries.dtype == index_queries.dtype and held <= HELD_BYTES


def loss(operands: Operands, visible: Visible, hidden: Array | None, *, interpret: bool = False) -> tuple[Array, Array]:
    """The divergence of the indexer's distribution over entries from attention's.

    Args:
      operands: what is compared.
      visible: the entries that queries see.
      hidden: [B, Q, E] float32 as for `attention.tpu.window_attention`; None: all that are visible are compared.
      interpret: run in interpret mode, on any platform.

    Returns:
      [B, Q] float32, 0 for queries without entries, and [B, Q, 128] float32 numbers that `gradients` takes.
    """
    found = _call(operands, visible, hidden, None, interpret)[0]
    return found[..., LOSS], found


def gradients(
    operands: Operands,
    visible: Visible,
    hidden: Array | None,
    numbers: Array,
    gradient: Array,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Gradients of `loss` for index queries, of their dtype, and weights and index keys, float32.

    Args:
      operands: as for `loss`.
      visible: likewise.
      hidden: likewise.
      numbers: [B, Q, 128] of `loss`.
      gradient: [B, Q] float32 of the loss.
      interpret: run in interpret mode, on any platform.
    """
    of_queries, of_weights, parts = _call(operands, visible, hidden, numbers.at[..., GIVEN].set(gradient), interpret)
    index_queries, index_keys = operands.index_queries, operands.index_keys
    of_keys = jnp.sum(parts, axis=1)[:, : index_keys.shape[1]]
    return of_queries.reshape(index_queries.shape), of_weights, of_keys


def _call(
    operands: Operands, visible: Visible, hidden: Array | None, numbers: Array | None, interpret: bool
) -> list[Array]:
    """Runs the kernel: forward, or, where there are numbers, backward."""
    queries, log_total, entries, index_queries, weights, index_keys = operands
    (batch, count, heads, size), (index_heads, index_size) = queries.shape, index_queries.shape[2:]
    dtype, by_tile = queries.dtype, Tiles(batch, count, tile_of(count, max(heads, index_heads)))
    tile, tiles = by_tile.size, by_tile.number
    block = min(ENTRIES, up(entries.shape[1], LANES))
    length = up(entries.shape[1], block)
    given = [
        by_tile.cut(jnp.stack([visible.low, visible.high], axis=-1)),
        by_tile.cut(queries, heads),
        by_tile.cut(log_total * LOG2E),
        by_tile.cut(index_queries, index_heads),
        by_tile.cut(weights),
        by_tile.held(entries, length, dtype),
        by_tile.held(index_keys, length, dtype),
    ]
    given += [] if hidden is None else [by_tile.cut(hidden_from(hidden, length))]
    given += [] if numbers is None else [by_tile.cut(numbers)]
    if numbers is None:
        out = [by_tile.out(LANES, jnp.float32)]
    else:
        out = [by_tile.out(index_size, dtype, index_heads), by_tile.out(index_heads, jnp.float32)]
        out.append(by_tile.sums(length, index_size))
    index_rows = pltpu.VMEM((tile * index_heads, LANES), jnp.float32)
    scratch = [
        pltpu.VMEM((tile * heads, LANES), jnp.float32),
        index_rows,
        *[pltpu.VMEM((tile, block), jnp.float32)] * 2,
    ]
    if numbers is None:
        scratch += [pltpu.VMEM((tile, LANES), jnp.float32)] * 5
    else:
        scratch += [pltpu.VMEM((tile * index_heads, index_size), jnp.float32), index_rows]
    seen = entries.shape[1] // 2  # of a row's entries its queries see a half, on the mean
    products = heads * size + index_heads * index_size * (1 if numbers is None else 4)
    found = pl.pallas_call(
        functools.partial(
            _kernel,
            tiles=tiles,
            block=block,
            turns=pl.cdiv(seen, block),
            picks=hidden is not None,
            backward=numbers is not None,
            scale=size**-0.5 * LOG2E,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=by_tile.grid,
            in_specs=[spec for _, spec in given],
            out_specs=[spec for _, spec in out],
            scratch_shapes=scratch,
        ),
        out_shape=[shape for shape, _ in out],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * count * seen * products,
            bytes_accessed=sum(x.nbytes for x, _ in given),
            transcendentals=batch * count * seen * heads,
        ),
        interpret=interpret,
        name="indexer_loss" if numbers is None else "indexer_loss_gradients",
    )(bounds_of(visible.low, visible.high, tile, tiles, block).reshape(-1), *(x for x, _ in given))
    by_query = found if numbers is None else found[:2]
    cut = [x.reshape(batch, tiles * tile, -1)[:, :count] for x in by_query]
    return [*cut, *found[len(by_query) :]]


def _kernel(
    bounds: Any, *refs: Any, tiles: int, block: int, turns: int, picks: bool, backward: bool, scale: float
) -> None:
    """A grid step: one tile of queries.

    Refs: ranges [tile, 2], queries [rows, C], log totals [tile, H], index queries [index rows, R], weights [tile,
    heads], entries [E, C], index keys [E, R] [, hidden [tile, E]]; forward out [tile, 128]; backward numbers [tile,
    128], and out gradients of index queries, of weights [tile, heads], and of index keys [E, R]. Scratch: log totals
    and weights, each in all lanes of its row, attention and scores of a block [tile, block]; then running sums and
    largest scores [tile, 128], or gradients of index queries in float32 and of weights by lane.
    """
    left = list(refs)
    ranges, queries, log_totals, index_queries, weights, entries, index_keys = (left.pop(0) for _ in range(7))
    hides: Any = left.pop(0) if picks else None
    numbers: Any = left.pop(0) if backward else None
    out = [left.pop(0) for _ in range(3 if backward else 1)]
    totals, shares, got, scores, *rest = left
    (tile, heads), index_heads, dtype = log_totals.shape, weights.shape[1], queries.dtype
    together = TOGETHER if tile % TOGETHER == 0 else tile
    own_tile = here()
    place = (pl.program_id(0) * tiles + own_tile) * 4

    def parts(per_query: int) -> list[tuple[slice, slice]]:
        """Queries that are taken together, and their rows."""
        return [
            (slice(c, c + together), slice(c * per_query, (c + together) * per_query)) for c in range(0, tile, together)
        ]

    def look(start: Any) -> Array:
        """Attention and scores of a block of entries; and which of them count [tile, block]."""
        if picks:
            hidden = hides[:, pl.ds(start, block)]
        else:
            number = start + jax.lax.broadcasted_iota(jnp.int32, (tile, block), 1)
            hidden = jnp.where((number >= ranges[:, 0:1]) & (number < ranges[:, 1:2]), 0.0, HIDDEN)
        some, keys = entries[pl.ds(start, block), :], index_keys[pl.ds(start, block), :]
        for own, rows in parts(heads):
            logits = dot(queries[rows, :], some, (1, 1)) * scale - repeated(totals[rows, :], block)
            attended = jnp.exp2(logits.reshape(together, heads, block))
            got[own, :] = jnp.sum(attended, axis=1)
        for own, rows in parts(index_heads):
            active = jnp.maximum(dot(index_queries[rows, :], keys, (1, 1)), 0.0) * repeated(shares[rows, :], block)
            scores[own, :] = jnp.sum(active.reshape(together, index_heads, block), axis=1)
        return hidden == 0

    def each_block(work: Any) -> None:
        def step(j: Any, carry: None) -> None:
            work(pl.multiple_of(j * block, block))
            return carry

        with about(turns):
            jax.lax.fori_loop(bounds[place], bounds[place + 1], step, None)

    def forward() -> None:
        amounts, logs, products, largest, sums = rest
        for total in (amounts, logs, products, sums):
            total[...] = jnp.zeros(total.shape, jnp.float32)
        largest[...] = jnp.full(largest.shape, MASKED, jnp.float32)

        def add(start: Any) -> None:
            found = look(start)
            attended, score = jnp.where(found, got[...], 0.0), scores[...]
            log = jnp.log(jnp.where(attended > 0, attended, 1.0))
            amounts[...] += by_lane(attended, jnp.add)
            logs[...] += by_lane(attended * log, jnp.add)
            products[...] += by_lane(attended * jnp.where(found, score, 0.0), jnp.add)
            score = jnp.where(found, score, MASKED)
            before = largest[...]
            now = jnp.maximum(before, jnp.max(by_lane(score, jnp.maximum), axis=1, keepdims=True))
            new = by_lane(jnp.where(found, jnp.exp(score - repeated(now, block)), 0.0), jnp.add)
            sums[...] = sums[...] * jnp.exp(before - now) + new
            largest[...] = now

        each_block(add)
        amount, log, product, total = (jnp.sum(x[...], axis=1, keepdims=True) for x in (amounts, logs, products, sums))
        some = amount > 0
        log_sum = largest[:, 0:1] + jnp.log(jnp.where(total > 0, total, 1.0))
        safe = jnp.where(some, amount, 1.0)
        value = jnp.where(some, (log - product) / safe - jnp.log(safe) + log_sum, 0.0)
        lane = jax.lax.broadcasted_iota(jnp.int32, (tile, LANES), 1)
        found = jnp.where(lane == SUM, amount, jnp.where(lane == LOG_SUM, log_sum, value))
        out[0][...] = jnp.where(lane <= LOSS, found, 0.0)

    def pull() -> None:
        of_queries, of_weights, of_keys = out
        of_rows, by_row = rest
        amount, log_sum, given = (numbers[:, x : x + 1] for x in (SUM, LOG_SUM, GIVEN))
        some = amount > 0
        share, factor = 1 / jnp.where(some, amount, 1.0), jnp.where(some, given, 0.0)
        for total in (of_rows, by_row):
            total[...] = jnp.zeros(total.shape, jnp.float32)

        def add(start: Any) -> None:
            found = look(start)
            of_scores = jnp.where(found, (jnp.exp(scores[...] - log_sum) - got[...] * share) * factor, 0.0)
            keys = index_keys[pl.ds(start, block), :]
            total = jnp.zeros(keys.shape, jnp.float32)
            for own, rows in parts(index_heads):
                queries = index_queries[rows, :]
                active = dot(queries, keys, (1, 1))
                each = jnp.broadcast_to(of_scores[own][:, None, :], (together, index_heads, block))
                each = each.reshape(active.shape)
                by_row[rows, :] += by_lane(jnp.maximum(active, 0.0) * each, jnp.add)
                pulled = jnp.where(active > 0, each * repeated(shares[rows, :], block), 0.0).astype(dtype)
                of_rows[rows, :] += dot(pulled, keys, (1, 0))
                total += dot(pulled, queries, (0, 0))
            of_keys[pl.ds(start, block), :] += total

        each_block(add)
        of_queries[...] = of_rows[...].astype(dtype)
        sums = jnp.broadcast_to(jnp.sum(by_row[...], axis=1, keepdims=True), by_row.shape)
        of_weights[...] = across(sums, index_heads)

    def begin() -> None:
        out[2][...] = jnp.zeros(out[2].shape, jnp.float32)

    if backward:
        pl.when(pl.program_id(2) == 0)(begin)

    @pl.when(own_tile < tiles)
    def _() -> None:
        totals[...], shares[...] = in_rows(log_totals[...]), in_rows(weights[...])
        (pull if backward else forward)()
