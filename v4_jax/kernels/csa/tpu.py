"""Attention over entries picked for each query, for TPUs: rows of the cache go straight to VMEM, and no copy to HBM.

While the matrix unit works on some rows of one query, as many rows of the next are asked for: that takes the longest,
each row being a transfer of its own. A row of the cache (see `StoredRows`, kind "words") is one run of memory in parts
of 256 channels, two to a 32-bit word, and so are the rows in VMEM: part p of entry e is line `parts * e + p`. Lines are
never taken apart. Instead every line is multiplied by each part of the query; what belongs together is then added up.
Products of one part with another are left out, for queries are few and the matrix unit would be as long at it without.
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
from v4_jax.cache.rows import LANES, WORD_CHANNELS, batch_rows
from v4_jax.kernels.attention.reference import MASKED
from v4_jax.kernels.attention.tpu import statistics
from v4_jax.kernels.memory import kept_in_hbm
from v4_jax.kernels.picked_rows import across, unpacked
from v4_jax.kernels.turns import about
from v4_jax.layers.partials import STATISTICS, Packed, Partial
from v4_jax.sharding import collectives

QUERIES = 16  # of a block
ROWS = 64, 128  # of a query that are attended at once: few where there are hardly more, as each is fetched
VMEM_BYTES = 48 << 20


def supports(queries: Array, entries: Entries) -> bool:
    """Whether `attend_picked` takes queries [B, Q, H, C] and such entries."""
    heads, size = queries.shape[2:]
    return (
        entries.rows.kind == "words"
        and queries.dtype == jnp.bfloat16
        and heads % 8 == 0
        and heads <= LANES
        and size // WORD_CHANNELS in (1, 2)
    )


def attend_picked(
    queries: Array,
    entries: Entries,
    local: Array,
    filled: Array | None = None,
    *,
    together: bool = False,
    rounded: bool = False,
    interpret: bool = False,
) -> Partial | Packed:
    """Attention of each query over its own entries.

    Args:
      queries: [B, Q, H, C] bfloat16.
      entries: the entries, of kind "words".
      local: [B, Q, K] int32 local numbers of those to attend, -1 for none.
      filled: [B, Q] int32 how many are not -1, where those come first and all are there; None: -1 may be anywhere.
      together: whether to return one `Packed` softmax.
      rounded: whether sums of entries are rounded to the dtype of the queries at the end; not `together`.
      interpret: run in interpret mode, on any platform.

    Returns:
      Largest logit [B, Q, H], sum of exp(logit - largest) [B, Q, H], and sum of exp(logit - largest) * entry
      [B, Q, H, C], float32 but for what is rounded; `MASKED`, 0 and 0 for a query without entries.

    Raises:
      NotImplementedError: `supports` says no.
    """
    if not supports(queries, entries):
        raise NotImplementedError(
            f"queries {queries.shape} of {queries.dtype} over entries of kind {entries.rows.kind!r}: expected "
            f"{WORD_CHANNELS} or {2 * WORD_CHANNELS} channels, heads in multiples of 8 up to {LANES}, bfloat16, 'words'"
        )
    rows, places = entries.places(batch_rows(local, 2), local)
    (_, rows_count, places_count), words = entries.rows.shape, entries.rows.arrays[0]
    place = (entries.layer * rows_count + rows) * places_count + places
    place = jnp.where((local >= 0) & (places < places_count), place, -1)
    if filled is None:
        place = -jnp.sort(-place, axis=-1)
        filled = jnp.sum(place >= 0, axis=-1, dtype=jnp.int32)
    (batch, count), (heads, size) = local.shape[:2], queries.shape[2:]
    found = _attend(
        queries.reshape(batch * count, heads, size),
        words.reshape(-1, *words.shape[3:]),
        place.reshape(batch * count, -1),
        filled.reshape(-1),
        share=_share(local.shape[-1], collectives.size(entries.axes)),
        together=together,
        rounded=rounded,
        interpret=interpret,
    )
    apart = [x.reshape(batch, count, *x.shape[1:]) for x in found]
    return Packed(apart[0][None]) if together else Partial(*apart)


def _share(picks: int, devices: int) -> int:
    """How many of a query's picks a device has at most, nearly always, where entries go round the devices by number."""
    mean = picks / devices
    return min(picks, math.ceil(mean + 3 * math.sqrt(mean * (1 - 1 / devices))))


@functools.partial(jax.jit, static_argnames=("share", "together", "rounded", "interpret"))
def _attend(
    queries: Array,
    words: Array,
    place: Array,
    filled: Array,
    *,
    share: int,
    together: bool,
    rounded: bool,
    interpret: bool,
) -> list[Array]:
    """The same of queries [N, H, C] over words [R, parts, 128], of whose rows `place` [N, K] the first `filled` [N] are
    attended, mostly `share` or fewer.
    """
    at_once = next((rows for rows in ROWS if share <= rows), ROWS[-1])
    (count, heads, size), parts = queries.shape, words.shape[1]
    queries, (words,) = kept_in_hbm(queries, [words], interpret=interpret)
    block = min(QUERIES, count)
    padding, room = -count % block, -place.shape[1] % at_once
    queries = jnp.pad(queries, ((0, padding), (0, 0), (0, 0)))
    place = jnp.maximum(jnp.pad(place, ((0, padding), (0, room))), 0)
    filled = jnp.pad(filled, (0, padding))
    total, slots = place.shape
    shapes: list[tuple[int, ...]] = [(heads, size + STATISTICS)] if together else [(heads,), (heads,), (heads, size)]
    dtypes = [*[jnp.float32] * (len(shapes) - 1), queries.dtype if rounded else jnp.float32]

    def along(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((block, *shape), lambda i, _: (i, *(0 for _ in shape)))

    found = pl.pallas_call(
        functools.partial(
            _kernel, scale=size**-0.5, at_once=at_once, turns=-(-share // at_once), unroll=1 if interpret else at_once
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(total // block,),
            in_specs=[
                pl.BlockSpec((None, 1, block * slots), lambda i, _: (i, 0, 0), memory_space=pltpu.SMEM),
                pl.BlockSpec((block, heads, size), lambda i, _: (i, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[along(*shape) for shape in shapes],
            scratch_shapes=[
                pltpu.VMEM((2, slots * parts, LANES), jnp.int32),
                pltpu.SemaphoreType.DMA((2, slots // at_once)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((total, *x), dtype) for x, dtype in zip(shapes, dtypes, strict=True)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * count * heads * share * size,
            bytes_accessed=2 * count * share * size + 6 * count * heads * size,
            transcendentals=count * heads * share,
        ),
        interpret=interpret,
        name="attend_picked",
    )(filled, place.reshape(-1, 1, block * slots), queries, words)
    return [x[:count] for x in found]


def _kernel(
    filled: Any,
    places: Any,
    queries: Any,
    words: Any,
    *refs: Any,
    scale: float,
    at_once: int,
    turns: int,
    unroll: int,
) -> None:
    """A block of queries, one after another, `at_once` rows of each at a time, about `turns` times; each query has the
    first `filled` of its places.

    Refs: largest logits and sums of each query, or one array of all; scratch: rows [2, parts * K, 128], those of this
    query and of the next, and their semaphores.
    """
    *out, rows, arrived = refs
    count, heads, size = queries.shape
    parts, start = words.shape[1], pl.program_id(0) * count
    lines, slots = at_once * parts, rows.shape[1] // parts

    def ask(query: Any, slot: Any, chunk: Any) -> None:
        first = pl.multiple_of(chunk * lines, lines)

        def row(i: Any, carry: None) -> None:
            there = rows.at[slot, pl.ds(first + i * parts, parts), :]
            place = places[0, query * slots + chunk * at_once + i]
            pltpu.make_async_copy(words.at[place], there, arrived.at[slot, chunk]).start()
            return carry

        jax.lax.fori_loop(0, at_once, row, None, unroll=unroll)

    def own(slot: Any, chunk: Any) -> Any:
        return rows.at[slot, pl.ds(pl.multiple_of(chunk * lines, lines), lines), :]

    def part_of(query: Any, p: int) -> Array:
        half = size // 2
        low, high = (queries[query, :, first + p * LANES : first + (p + 1) * LANES] for first in (0, half))
        return jnp.concatenate([low, high], axis=1)

    lane = jax.lax.broadcasted_iota(jnp.int32, (heads, lines), 1)
    odd = (lane & 1) == 1

    def receive(slot: Any, chunk: Any) -> Array:
        pltpu.make_async_copy(own(slot, chunk), own(slot, chunk), arrived.at[slot, chunk]).wait()
        return own(slot, chunk)[...]

    def attend(query: Any, chunk: Any, words: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        largest, total, *sums = state
        keys = jnp.concatenate(unpacked(words), axis=1)  # [lines, 256]
        asked = jnp.concatenate([part_of(query, p) for p in range(parts)], axis=0)
        products = jax.lax.dot_general(asked, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        logits = products[:heads]
        if parts == 2:  # even lines belong to the first part, odd ones to the second
            logits = jnp.where(odd, products[heads:], logits)
            logits += jnp.where(odd, pltpu.roll(logits, 1, 1), pltpu.roll(logits, lines - 1, 1))
        visible = lane < filled[start + query] * parts - chunk * lines
        logits = jnp.where(visible, logits * scale, MASKED)
        most = jnp.maximum(largest, jnp.max(logits, axis=1, keepdims=True))
        shares = jnp.where(visible, jnp.exp(logits - most), 0.0)
        by_part = [shares] if parts == 1 else [jnp.where(odd, 0.0, shares), jnp.where(odd, shares, 0.0)]
        rescale = jnp.exp(largest - most)
        total = total * rescale + jnp.sum(by_part[0], axis=1, keepdims=True)
        wide = jnp.concatenate(by_part, axis=0).astype(keys.dtype)
        values = jnp.dot(wide, keys, preferred_element_type=jnp.float32)
        sums = [x * rescale + values[p * heads : (p + 1) * heads] for p, x in enumerate(sums)]
        return most, total, *sums

    def chunks(query: Any) -> Any:
        return jax.lax.div(filled[start + query] + at_once - 1, jnp.int32(at_once))

    def each(query: Any, carry: None) -> None:
        slot, other = query & 1, 1 - (query & 1)
        here = chunks(query)
        ahead = jnp.where(query + 1 < count, chunks(jnp.minimum(query + 1, count - 1)), 0)
        both = jnp.minimum(here, ahead)

        def ask_next(chunk: Any, carry: None) -> None:
            ask(query + 1, other, chunk)
            return carry

        def attend_alone(chunk: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
            return attend(query, chunk, receive(slot, chunk), state)

        def side_by_side(chunk: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
            words = receive(slot, chunk)  # a barrier to the scheduler, which mixes what follows
            ask(query + 1, other, chunk)
            return attend(query, chunk, words, state)

        state = (
            jnp.full((heads, 1), MASKED),
            jnp.zeros((heads, 1)),
            *(jnp.zeros((heads, WORD_CHANNELS)) for _ in range(parts)),
        )
        whole, rest = (turns, 0) if count > 1 else (0, turns)  # queries have about as many
        with about(whole):
            state = jax.lax.fori_loop(0, both, side_by_side, state)
        with about(0):
            jax.lax.fori_loop(both, ahead, ask_next, None)
        with about(rest):
            largest, amount, *sums = jax.lax.fori_loop(both, here, attend_alone, state)
        halves = [x[:, half : half + LANES] for half in (0, LANES) for x in sums]
        if len(out) == 1:
            out[0][query] = jnp.concatenate([*halves, statistics(largest, amount)], axis=1)
            return carry
        out[0][pl.ds(query, 1), :] = across(largest)
        out[1][pl.ds(query, 1), :] = across(amount)
        out[2][query] = jnp.concatenate(halves, axis=1).astype(out[2].dtype)
        return carry

    def ask_first(chunk: Any, carry: None) -> None:
        ask(0, 0, chunk)
        return carry

    with about(turns):
        jax.lax.fori_loop(0, chunks(0), ask_first, None)
    jax.lax.fori_loop(0, count, each, None)
