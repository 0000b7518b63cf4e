"""A compressor's step for TPUs: a token joins each row's open block, which becomes an entry where it is the last.

XLA makes some forty operations of it, and pools the open blocks of all rows as soon as one row's ends. Here rows come
one after another; of a row's ring of projections the eight rows about the token's place are read and written back, and
only where a block ends is the whole ring read, pooled, normed, rotated, rounded and stored among the entries. What the
next row needs is fetched meanwhile. Ring and entries are updated in place, in the stacks of all layers.

A ring keeps a token at its position modulo the ring's size: tokens are told apart by their age, how many came later.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.cache.entries import Entries
from v4_jax.cache.ring import Ring
from v4_jax.cache.rows import LANES, StoredRows, batch_rows
from v4_jax.kernels.memory import kept_in_hbm
from v4_jax.kernels.rotary.reference import Steps
from v4_jax.kernels.rotary.tpu import rounded, settled
from v4_jax.kernels.turns import about
from v4_jax.kernels.vectors import vector, vector_spec
from v4_jax.layer_stack import Cut, one_layer, stack_of
from v4_jax.layout import Layout
from v4_jax.sharding import collectives

ROWS = 8  # of a tile of 32-bit numbers in memory
VMEM_BYTES = 48 << 20


class CompressorWeights(NamedTuple):
    """What turns projections into entries.

    Attributes:
      ape: [ratio, P] float32, added to the gates of a token by its place in its block.
      norm: [width] of the norm.
    """

    ape: Array | Cut
    norm: Array | Cut


class _Numbers(NamedTuple):
    """Static: tokens of an entry, of the ring, channels of an entry; how entries lie; and what becomes of them."""

    ratio: int
    size: int
    width: int
    devices: int
    paged: bool
    words: bool
    steps: Steps


def supports(open_blocks: Ring, entries: Entries, width: int) -> bool:
    """Whether `step` takes such a ring and entries of `width` channels."""
    stored = entries.rows
    tile = ROWS * 4 // jnp.dtype(stored.arrays[0].dtype).itemsize
    whole = stored.kind == "words" or (stored.kind == "plain" and stored.shape[2] % tile == 0 and tile <= 2 * ROWS)
    return (
        whole
        and jnp.dtype(jnp.bfloat16 if stored.kind == "words" else stored.dtype) == jnp.dtype(entries.dtype)
        and width % LANES == 0
        and open_blocks.rows.kind == "plain"
        and open_blocks.rows.shape[2] % ROWS == 0
    )


def step(
    projected: tuple[Array, Array],
    weights: CompressorWeights,
    open_blocks: Ring,
    entries: Entries,
    layout: Layout,
    *,
    steps: Steps,
    interpret: bool = False,
) -> tuple[StoredRows, StoredRows]:
    """Stores a short chunk's projections, and the entries of the blocks that end in it.

    Args:
      projected: values and gates [B, S, P] float32, P being twice the entries' width where blocks overlap.
      weights: what turns them into entries.
      open_blocks: projections of earlier tokens.
      entries: earlier entries, of a layer with the same number.
      layout: where the chunk's tokens stand.
      steps: what becomes of a pooled entry.
      interpret: run in interpret mode, on any platform.

    Returns:
      Ring and entries of all layers, with what is new.
    """
    (batch, size, _), rows, ratio = projected[0].shape, entries.rows, weights.ape.shape[0]
    ring, stored, turn = open_blocks.rows.arrays[0], rows.arrays[0], layout.closing_turn(ratio)
    numbers = _Numbers(
        ratio=ratio,
        size=ring.shape[2],
        width=weights.norm.shape[0],
        devices=collectives.size(entries.axes),
        paged=entries.table is not None,
        words=rows.kind == "words",
        steps=steps,
    )
    device = collectives.index(entries.axes)
    sealed = jnp.zeros((batch,), jnp.int32) if layout.sealed is None else layout.sealed
    layers = [jnp.asarray(layer, jnp.int32).reshape(1) for layer in (entries.layer, one_layer(weights))]
    ape, norm = (stack_of(x)[0] for x in weights)
    for token in range(size):  # one after another: a token's block reads what the tokens before it have stored
        of_rows = open_blocks.start + token, layout.total - token, sealed, jnp.asarray(device, jnp.int32).reshape(1)
        scalars = [*layers, jnp.concatenate(of_rows)]
        if entries.table is not None:
            number = jax.lax.div(open_blocks.start + token, jnp.int32(ratio))[:, None]
            scalars.append(entries.places(batch_rows(number, 1), entries.local(number))[1][:, 0])
        ring, stored = _step(
            scalars,
            [x[:, token, None] for x in projected],
            [ape, norm],
            [x[:, token, None] for x in turn],
            ring,
            stored,
            numbers,
            jnp.dtype(entries.dtype),
            interpret,
        )
    return open_blocks.rows.replace(arrays=(ring,)), rows.replace(arrays=(stored,))


def _step(
    scalars: list[Array],
    projected: list[Array],
    weights: list[Array],
    turn: list[Array],
    ring: Array,
    stored: Array,
    numbers: _Numbers,
    dtype: Any,
    interpret: bool,
) -> tuple[Array, Array]:
    """The same of one token: operands [B, 1, ...], weights of all layers."""
    batch, channels = ring.shape[1], ring.shape[3]

    def by_row(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b, 0, 0))

    def number(b: Any, in_role: Any, layer: Any, *_: Any) -> Any:
        del b, in_role
        return layer[0]

    ape, norm = weights
    of_layer = pl.BlockSpec((None, *ape.shape[1:]), lambda *given: (number(*given), 0, 0), pipeline_mode=pl.Buffered(1))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    line = stored.shape[3:] if numbers.words else (ROWS * 4 // stored.dtype.itemsize, stored.shape[3])
    values, (ring, stored) = kept_in_hbm(projected[0], [ring, stored], interpret=interpret)
    operands = [values, projected[1], *turn, ape, norm, ring, stored]
    place = len(scalars) + len(operands) - 2
    found = pl.pallas_call(
        functools.partial(_kernel, numbers=numbers, dtype=dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch,),
            in_specs=[*map(by_row, [*projected, *turn]), of_layer, vector_spec(norm, number), anywhere, anywhere],
            out_specs=[anywhere, anywhere],
            scratch_shapes=[
                pltpu.VMEM((2, ROWS, channels), jnp.float32),
                pltpu.VMEM((2, numbers.size, channels), jnp.float32),
                pltpu.VMEM(line, stored.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((1,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (ring, stored)],
        input_output_aliases={place: 0, place + 1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=0, bytes_accessed=2 * 4 * batch * ROWS * channels + ape[0].nbytes, transcendentals=0
        ),
        interpret=interpret,
        name="compress",
    )(*scalars, *operands)
    return found[0], found[1]


def _kernel(*refs: Any, numbers: _Numbers, dtype: Any) -> None:
    """A grid step: one row's token.

    Refs: numbers of the layer, among those of its role and of all; positions [B], how many tokens are left [B], where
    rows' sealed entries end [B] and the device's number, in one [, places of entries [B]]; values and gates [1, P],
    turn [1, R] twice, ape [ratio, P], norms [N, width], ring [L, B, size, 2 P] and entries, in and out; scratch: rows
    of the ring about the token's place, of this batch row and the next; the whole of it; rows of entries; their
    semaphores: rows read, rows written, ring read, entry.
    """
    in_role, layer, of_rows, *refs_left = refs
    places: Any = refs_left.pop(0) if numbers.paged else None
    values, gates, cos, sin, ape, norm = refs_left[:6]
    ring, stored, *scratch = refs_left[8:]
    near, history, line, near_in, near_out, history_in, line_moved = scratch
    ratio, size, width = numbers.ratio, numbers.size, numbers.width
    row, rows, batch = pl.program_id(0), pl.num_programs(0), ring.shape[1]
    slot, overlap = row & 1, values.shape[1] > width

    def position(b: Any) -> Any:
        return of_rows[b]

    def real(b: Any) -> Any:
        return of_rows[batch + b] > 0

    def place(b: Any) -> Any:
        return jax.lax.rem(position(b), jnp.int32(size))

    def ends(b: Any) -> Any:
        open_ = position(b) - (ratio - 1) >= of_rows[2 * batch + b]
        return real(b) & ((position(b) & (ratio - 1)) == ratio - 1) & open_

    def around(b: Any) -> Any:
        first = pl.multiple_of(place(b) & -ROWS, ROWS)
        return ring.at[in_role[0], b, pl.ds(first, ROWS), :]

    def fetch(b: Any, into: Any) -> None:
        pltpu.make_async_copy(around(b), near.at[into], near_in.at[into]).start()

        with about(0):
            pl.when(ends(b))(pltpu.make_async_copy(ring.at[in_role[0], b], history.at[into], history_in.at[into]).start)

    def written(b: Any, out_of: Any) -> Any:
        return pltpu.make_async_copy(near.at[out_of], around(b), near_out.at[out_of])

    pl.when(row == 0)(lambda: fetch(row, slot))

    @pl.when(row + 1 < rows)
    def _() -> None:
        pl.when(row > 0)(lambda: written(row - 1, 1 - slot).wait())
        fetch(row + 1, 1 - slot)

    gate = gates[...] + ape[pl.ds(position(row) & (ratio - 1), 1), :]
    fresh = jnp.concatenate([values[...], gate], axis=1)
    pltpu.make_async_copy(around(row), near.at[slot], near_in.at[slot]).wait()
    own = jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0) == (place(row) & (ROWS - 1))
    near[slot] = jnp.where(own & real(row), fresh, near[slot])
    written(row, slot).start()

    def seal() -> None:
        pltpu.make_async_copy(ring.at[in_role[0], row], history.at[slot], history_in.at[slot]).wait()
        index = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        age = place(row) - index
        age = jnp.where(age < 0, age + size, age)
        held = jnp.where(age == 0, fresh, history[slot])
        half = values.shape[1]
        sets = [(age < ratio, half - width, 2 * half - width)]
        if overlap:
            before = (age >= ratio) & (age < 2 * ratio) & (position(row) >= ratio)
            sets.append((before, 0, half))
        entry = settled(
            rounded(_pooled(held, sets, width), dtype),
            vector(norm, layer[0]),
            (cos[...], sin[...]),
            numbers.steps,
            dtype,
        )
        entry = jnp.where(jnp.abs(entry) < jnp.inf, entry, 0.0)
        number = position(row) >> (ratio.bit_length() - 1)
        if numbers.paged:
            there, where = jnp.int32(0), places[row]
            inside = where < stored.shape[2]
        else:
            devices = jnp.int32(numbers.devices)
            there, where = row, jax.lax.div(number, devices)
            inside = (jax.lax.rem(number, devices) == of_rows[3 * batch]) & (where < stored.shape[2])
        pl.when(inside)(lambda: _store(entry, stored, in_role[0], there, where, line, line_moved.at[0], numbers.words))

    with about(0):  # one row in `ratio`
        pl.when(ends(row))(seal)

    @pl.when(row == rows - 1)
    def _() -> None:
        pl.when(row > 0)(lambda: written(row - 1, 1 - slot).wait())
        written(row, slot).wait()


def _pooled(held: Array, sets: list[tuple[Array, int, int]], width: int) -> Array:
    """Softmax-weighted mean per channel: [1, width] from [N, 2 P], over rows of one or two sets.

    A set is which rows [N, 1] are in it, and where their values and gates begin.
    """
    logits = [jnp.where(rows, held[:, gates : gates + width], -jnp.inf) for rows, _, gates in sets]
    largest = functools.reduce(jnp.maximum, (jnp.max(x, axis=0, keepdims=True) for x in logits))
    total, weighted = jnp.zeros((1, width), jnp.float32), jnp.zeros((1, width), jnp.float32)
    for (rows, values, _), x in zip(sets, logits, strict=True):
        shares = jnp.exp(x - largest)
        total += jnp.sum(shares, axis=0, keepdims=True)
        weighted += jnp.sum(shares * jnp.where(rows, held[:, values : values + width], 0.0), axis=0, keepdims=True)
    return weighted / total


def _store(entry: Array, stored: Any, layer: Any, row: Any, place: Any, line: Any, moved: Any, words: bool) -> None:
    """Puts an entry [1, C], float32 that holds the stored values, at a place of a row."""

    def move(source: Any, target: Any) -> None:
        copy = pltpu.make_async_copy(source, target, moved)
        copy.start()
        copy.wait()

    if words:
        low, high = jnp.split(_bits(entry), 2, axis=1)
        word = ((low >> 16) & 0xFFFF) | (high & -65536)
        for part in range(line.shape[0]):
            line[part : part + 1, :] = word[:, part * LANES : (part + 1) * LANES]
        move(line, stored.at[layer, row, place])
        return
    tile = line.shape[0]
    lines = stored.at[layer, row, pl.ds(pl.multiple_of(place & -tile, tile), tile), :]
    move(lines, line)
    index = jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0)
    if tile == ROWS:
        line[...] = jnp.where(index == (place & (ROWS - 1)), entry, line[...])
    else:  # two rows to a word
        held, bits = pltpu.bitcast(line[...], jnp.int32), _bits(entry)
        odd = (place & 1) == 1
        joined = jnp.where(odd, (held & 0xFFFF) | (bits & -65536), (held & -65536) | ((bits >> 16) & 0xFFFF))
        here = index == ((place & (tile - 1)) >> 1)
        line[...] = pltpu.bitcast(jnp.where(here, joined, held), line.dtype)
    move(line, lines)


def _bits(x: Array) -> Array:
    return pltpu.bitcast(x, jnp.int32)
