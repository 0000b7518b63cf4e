"""Rows times a tile of expert weights as they are stored, inside TPU kernels: a strip of outputs at a time.

Decoding bounds a step with few rows. E4M3 goes to the matrix unit as it is, as in `linear/tpu.py`. E2M1 becomes E5M2,
by integers and four codes at a time, which is exact where the scales of a weight tile lie within a factor of 2^26 of
one another; where they do not, it becomes bfloat16, two codes at a time.

Few rows are spread: each becomes eight, of which the b-th has the inputs of every eighth block of 32 and zeros. Their
products with a run of eight blocks are sums over one block each, which are scaled instead of the weights, and E2M1
becomes E5M2 by a shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.block_scales import LANES, SUBLANES, block_lines, by_scaled_rows, product, repeat_lanes, some_lines
from v4_jax.kernels.turns import about, visits
from v4_jax.low_rank import Adapted
from v4_jax.number_formats import E2M1, E4M3, FP4_BLOCK, FP8_BLOCK, BlockScaled, Weight

STRIP = 256  # outputs at a time: the widest matrix unit
TOGETHER = 4  # strips in one turn of a loop: what one waits for is hidden by the others' work
CHUNKS = (1024, 512, 256, 128)  # inputs at a time, the largest that divides K
SPREAD_ROWS = 8  # are spread at most: with more, scaling their sums would take longer than the weights' way from HBM
RUN = SUBLANES * FP4_BLOCK[1]  # inputs of eight blocks

# What E2M1 becomes for the matrix unit. All generations take it as it is, whereas v5 and v6 have E4M3 with another bias
# and without a negative zero, and the compiler makes the difference up with as many instructions as all the rest.
E5M2 = jnp.float8_e5m2
E5M2_RANGE = 26  # binades from the lowest to the highest scale that E2M1 can have in its normal numbers
E5M2_GAIN = 13  # of E2M1 under the highest scale, in binades
E5M2_LOSS = 14  # of E2M1 without scales, in binades

_FORMATS = {jnp.dtype(E2M1): FP4_BLOCK, jnp.dtype(E4M3): FP8_BLOCK}


class Form(NamedTuple):
    """How a weight lies in memory.

    Attributes:
      block: elements that share a scale; None without scales.
      across: whether the scales come with their last two axes swapped: XLA stores those of E2M1 with N innermost unless
        K / 32 fills the lanes, and those of E4M3 with the longer axis innermost; seen so, they need no copy.
    """

    block: tuple[int, int] | None
    across: bool


def supports(weight: Weight, dtype: Any) -> bool:
    """Whether `multiply` takes tiles of this weight [..., N, K] and rows of this dtype."""
    if isinstance(weight, Adapted):
        return False
    if jnp.dtype(dtype) != jnp.bfloat16 or any(size % LANES for size in weight.shape[-2:]):
        return False
    if isinstance(weight, BlockScaled):
        return _FORMATS.get(jnp.dtype(weight.codes.dtype)) == weight.block
    return weight.dtype == jnp.bfloat16


def in_memory(weight: Weight) -> tuple[list[Array], Form]:
    """The arrays of a weight [L, G, N, K] as kernels take them: its elements, and scales where it has them."""
    if not isinstance(weight, BlockScaled):
        return [weight], Form(None, across=False)
    (width, depth), inner = weight.shape[-2:], weight.scales.shape[-1]
    across = width > depth if weight.block == FP8_BLOCK else inner % LANES != 0
    scales = jnp.swapaxes(weight.scales, -1, -2) if across else weight.scales
    return [weight.codes, scales], Form(weight.block, across)


def one_in_stack(weight: BlockScaled) -> tuple[BlockScaled, Any]:
    """A weight [N, K] as the only one of its group in the stack of all layers, [L, 1, N, K], and its layer."""
    stack = weight.stack
    codes, scales = (weight.codes[None], weight.scales[None]) if stack is None else (stack.codes, stack.scales)
    return BlockScaled(codes[:, None], scales[:, None], weight.block), 0 if stack is None else stack.layer


class Tile(NamedTuple):
    """The part of one of a weight's arrays that belongs to some of the outputs.

    Attributes:
      shape: of its last two axes.
      along: the one of them on which tiles follow one another; None where all share the whole.
    """

    shape: tuple[int, int]
    along: int | None

    def indices(self, number: Any) -> tuple[Any, Any]:
        """Of tile `number`, in tiles."""
        return number if self.along == 0 else 0, number if self.along == 1 else 0

    def slices(self, number: Any) -> tuple[Any, Any]:
        """The elements of tile `number`."""
        first, second = (
            pl.ds(pl.multiple_of(index * size, size), size) if axis == self.along else slice(None)
            for axis, (index, size) in enumerate(zip(self.indices(number), self.shape, strict=True))
        )
        return first, second


def tiles(arrays: Sequence[Any], form: Form, columns: int) -> list[Tile]:
    """Tiles of `columns` outputs of a weight's arrays, see `in_memory`, or of references to them."""
    codes = Tile((columns, arrays[0].shape[-1]), 0)
    if form.block is None:
        return [codes]
    rows, width = arrays[1].shape[-2:]
    if form.block == FP8_BLOCK:
        return [codes, Tile((rows, width), None)]
    return [codes, Tile((rows, columns), 1) if form.across else Tile((columns, width), 0)]


def spread_shape(rows: int, depth: int, form: Form) -> tuple[int, int] | None:
    """The shape of rows [rows, depth] that `spread` makes for `multiply`; None where they are taken as they are."""
    if form.block != FP4_BLOCK or rows > SPREAD_ROWS or depth % RUN:
        return None
    return rows * SUBLANES, depth


def spread(rows: Any, wide: Any) -> None:
    """Writes rows [M, K] to `wide` [8 M, K]: row 8 m + b has the inputs of blocks b, b + 8, ... of row m.

    Both are references, bfloat16.
    """
    count, depth = rows.shape
    shape = (SUBLANES, RUN)
    block = jax.lax.broadcasted_iota(jnp.int32, shape, 1) >> (FP4_BLOCK[1].bit_length() - 1)
    own = block == jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    for k in range(0, depth, RUN):
        some = rows[:, k : k + RUN].astype(jnp.float32)
        parts = [jnp.where(own, jnp.broadcast_to(some[m : m + 1], shape), 0.0) for m in range(count)]
        wide[:, k : k + RUN] = jnp.concatenate(parts, axis=0).astype(wide.dtype)


class Kept(NamedTuple):
    """A tile's weights from one visit of it to the next.

    Attributes:
      expanded: reference of [columns, K] E5M2 for what E2M1 was expanded to.
      fresh: whether the tile is another than in the visit before.
    """

    expanded: Any
    fresh: Any


def kept_shape(columns: int, depth: int, form: Form) -> tuple[int, int] | None:
    """The shape of what `multiply` keeps of a tile of so many columns; None for weights that it takes as they are."""
    return (columns, depth) if form.block == FP4_BLOCK else None


def lines_shape(columns: int, depth: int, form: Form) -> tuple[int, int] | None:
    """The shape of `multiply`'s room for the scales of a tile of so many columns; None for weights that need none."""
    return (columns // LANES * SUBLANES, depth // FP8_BLOCK[1]) if form.block == FP8_BLOCK else None


def multiply(
    rows: Any,
    tile: Sequence[Any],
    form: Form,
    first: Any,
    store: Callable[[Any, Array], None],
    wide: Any = None,
    kept: Kept | None = None,
    lines: Any = None,
) -> None:
    """Multiplies rows by a tile of a weight.

    Args:
      rows: reference of [M, K] bfloat16.
      tile: references of the tile's elements [columns, K] and of its scales, see `tiles`.
      form: the weight's form.
      first: number of the tile's first output among the weight's.
      store: takes the place (`pl.ds`) of each strip among the tile's outputs, and the products [M, strip] float32.
      wide: reference of the same rows as `spread` writes them, where `spread_shape` gives a shape.
      kept: what is kept of the tile, where `kept_shape` gives a shape and visits of it follow one another.
      lines: room for the tile's scales, where `lines_shape` gives a shape: else each strip waits for its own.
    """
    codes, *scales = tile
    (count, depth), columns = rows.shape, codes.shape[0]
    strip = next(size for size in (STRIP, LANES) if columns % size == 0)
    chunk = next(size for size in CHUNKS if depth % size == 0)

    def each_strip(result: Callable[[Any, Any], Array], together: int = 1) -> None:
        """Stores the `result` of each strip, of its place among the columns and the number of its first; of so many
        together in one turn of the loop.
        """

        def one(i: Any, carry: None) -> None:
            start = pl.multiple_of(i * strip, strip)
            here = pl.ds(start, strip)
            store(here, result(here, start))
            return carry

        jax.lax.fori_loop(0, columns // strip, one, None, unroll=together)

    def sums(expanded: Callable[[int], Array]) -> Array:
        """Sums over all inputs of rows times weights, of which `expanded` gives those of the chunk from an input on."""
        total = jnp.zeros((count, strip), jnp.float32)
        for k in range(0, depth, chunk):
            total += product(rows[:, k : k + chunk], expanded(k))
        return total

    if form.block is None:
        each_strip(lambda here, start: sums(lambda k: codes[here, k : k + chunk]))
    elif form.block == FP8_BLOCK:
        if lines is not None:
            lines[...] = block_lines(scales[0][...], first, columns, form.across)

        def scaled(here: Any, start: Any) -> Array:
            if lines is None:
                own = block_lines(scales[0][...], first + start, strip, form.across)
            else:
                own = some_lines(lines, start, strip)
            return by_scaled_rows(rows, codes, here, own)

        each_strip(scaled, together=TOGETHER)  # each waits for the scaling of its rows
    else:

        def scales_of(here: Any) -> Array:
            wide = scales[0][:, here] if form.across else scales[0][here, :]
            return wide.astype(jnp.float32)

        identity = _identity(strip) if form.across and wide is None else None

        def in_order(here: Any) -> Array:
            if identity is None:
                return scales_of(here)
            # Turned by a product, exact for powers of two: to transpose them takes as long as to expand the codes.
            return product(identity, scales_of(here).astype(jnp.bfloat16))

        def as_e5m2(here: Any, start: Any) -> Array:
            del start
            exponents = _quad_exponents(in_order(here), highest)

            def expanded(k: int) -> Array:
                found = _as_e5m2(codes[here, k : k + chunk], repeat_lanes(exponents, FP4_BLOCK[1], k, chunk))
                if kept is not None:
                    kept.expanded[here, k : k + chunk] = found
                return found

            return sums(expanded) * (highest * 2.0**-E5M2_GAIN)

        def as_kept(here: Any, start: Any) -> Array:
            del start
            assert kept is not None
            return sums(lambda k: kept.expanded[here, k : k + chunk]) * (highest * 2.0**-E5M2_GAIN)

        def as_bfloat16(here: Any, start: Any) -> Array:
            del start
            exponents = _pair_exponents(in_order(here))
            return sums(
                lambda k: _as_bfloat16(codes[here, k : k + chunk], repeat_lanes(exponents, FP4_BLOCK[1], k, chunk))
            )

        def spread_out(here: Any, start: Any) -> Array:
            del start
            lines = _evens_first(scales[0][:, here] if form.across else scales[0][here, :], across=form.across)
            total = jnp.zeros((SUBLANES * count, strip), jnp.float32)
            for k in range(0, depth, RUN):
                line = lines[k // FP4_BLOCK[1] : (k + RUN) // FP4_BLOCK[1]]
                found = product(wide[:, k : k + RUN], _unscaled_e5m2(codes[here, k : k + RUN]))
                total += found * jnp.concatenate([line] * count, axis=0)
            out = jnp.sum(total.reshape(count, SUBLANES, strip), axis=1) * 2.0**E5M2_LOSS
            return _in_turn(jnp.pad(out, ((0, -count % SUBLANES), (0, 0))))[:count]

        if wide is not None:
            each_strip(spread_out, together=TOGETHER)  # one's sums are awaited while the other's codes are expanded
            return
        everything = scales_of(slice(None))
        highest, lowest = jnp.max(everything), jnp.min(everything)
        near = (lowest * 2.0**E5M2_RANGE >= highest) & (highest >= 2.0**-100) & (highest <= 2.0**100)
        if kept is None:
            with about(1):
                pl.when(near)(lambda: each_strip(as_e5m2, together=TOGETHER))
        else:
            with visits(first=True):
                pl.when(near & kept.fresh)(lambda: each_strip(as_e5m2, together=TOGETHER))
            with visits(first=False):
                pl.when(near & jnp.logical_not(kept.fresh))(lambda: each_strip(as_kept))
        with about(0):  # no release has scales so far apart
            pl.when(jnp.logical_not(near))(lambda: each_strip(as_bfloat16))


def _identity(size: int) -> Array:
    """Ones on the diagonal, [size, size] bfloat16."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return (row == column).astype(jnp.float32).astype(jnp.bfloat16)


def _quad_exponents(scales: Array, highest: Any) -> Array:
    """Scales [R, K / 32] float32 to [R / 4, K / 32] int32: those of rows 4r to 4r + 3 as the bytes of a word.

    They come as exponents of E5M2 at bit 2, 28 for 1 under the highest scale, less what `_as_e5m2` is to add to its
    codes.
    """
    steps = pltpu.bitcast(scales, jnp.int32) - pltpu.bitcast(jnp.full(scales.shape, highest), jnp.int32)
    return pltpu.bitcast(((steps >> 21) + (28 * 4 - 6)).astype(jnp.int8), jnp.int32)


def _as_e5m2(codes: Array, exponents: Array) -> Array:
    """E2M1 codes [R, C] times two to their exponents [R / 4, C], see `_quad_exponents`: [R, C] E5M2, exactly.

    Four codes at a time. With magnitude bits a = e e m (value 0, .5, 1, 1.5, 2, 3, 4, 6) where E5M2 keeps the low
    exponent bits and the first of the fraction, a is right from 1 on up to a constant; .5 lies one step of a too high,
    and 0 is no power of two.
    """
    quad = pltpu.bitcast(pltpu.bitcast(codes, jnp.int4).astype(jnp.int8), jnp.int32)  # signs in bits 3 to 7
    magnitude = (quad << 1) & _each(7 << 1)
    from_one = _shift_right((magnitude + _each(0x80 - (2 << 1))) & _each(0x80), 6)
    from_half = (magnitude + _each(0x80 - (1 << 1))) & _each(0x80)
    keep = from_half - _shift_right(from_half, 7)
    value = (magnitude + from_one + exponents) & keep
    return pltpu.bitcast(value | (quad & _each(0x80)), E5M2)


def _unscaled_e5m2(codes: Array) -> Array:
    """E2M1 codes [R, C] over 2^14: [R, C] E5M2, exactly; of rows 0, 2, 4, ... first, and then of 1, 3, 5, ...

    Both formats have numbers below their normal ones, so that the exponent and the fraction only move: .5 becomes the
    half of E5M2's lowest normal number. A word has eight rows' codes, the first one's in its lowest bits: every other
    one becomes a byte where it is, which takes half as many instructions as to give each its turn.
    """
    octet = pltpu.bitcast(codes, jnp.int32)
    even = ((octet << 1) & _each(7 << 1)) | ((octet << 4) & _each(0x80))
    odd = ((octet >> 3) & _each(7 << 1)) | (octet & _each(0x80))
    return jnp.concatenate([pltpu.bitcast(even, E5M2), pltpu.bitcast(odd, E5M2)], axis=0)


def _evens_first(scales: Array, *, across: bool) -> Array:
    """Scales of a strip of outputs, [K / 32, strip] float32: those of outputs 0, 2, 4, ..., and then of 1, 3, 5, ...

    Args:
      scales: [K / 32, strip] E8M0 if they come across, else [strip, K / 32].
      across: see `Form`.
    """
    words = pltpu.bitcast(scales, jnp.int32)
    if across:
        words = _columns(words, lambda number, half: 2 * (number & (half - 1)) + (number >= half).astype(jnp.int32))
        return pltpu.bitcast(words, scales.dtype).astype(jnp.float32)
    # Four outputs to a word: two of them, as exponents at bit 7, are two numbers in bfloat16.
    halves = (words & _both(0xFF)) << 7, (_shift_right(words, 8) & _both(0xFF)) << 7
    return jnp.concatenate([pltpu.bitcast(half, jnp.bfloat16).astype(jnp.float32).T for half in halves], axis=1)


def _in_turn(x: Array) -> Array:
    """Columns of x [R, C] that come as those 0, 2, 4, ... and then 1, 3, 5, ..., in their order."""
    return _columns(x, lambda number, half: (number >> 1) + (number & 1) * half)


def _columns(x: Array, source: Callable[[Array, int], Array]) -> Array:
    """Columns of x [R, C] of 32 bits in another order: `source` takes each one's number, and C / 2, to which it is."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
    registers, parts = jnp.split(x, x.shape[1] // LANES, axis=1), []
    for i in range(len(registers)):
        number = source(i * LANES + lane, x.shape[1] // 2)
        part = jnp.zeros(lane.shape, x.dtype)
        for j, register in enumerate(registers):
            found = jnp.take_along_axis(register, number & (LANES - 1), axis=1, mode="promise_in_bounds")
            part = jnp.where((number >> 7) == j, found, part) if j else found
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def _each(bits: int) -> int:
    """The same 8 bits in all bytes of a word, as a signed integer."""
    return int(np.uint32(bits * 0x01010101).astype(np.int32))


def _shift_right(words: Array, bits: int) -> Array:
    return jax.lax.shift_right_logical(words, jnp.full_like(words, bits))


def _both(bits: int) -> int:
    """The same 16 bits in both halves of a word, as a signed integer."""
    return int(np.uint32(bits << 16 | bits).astype(np.int32))


def _pair_exponents(scales: Array) -> Array:
    """Scales [R, K / 32] float32 to [R / 2, K / 32] int32: those of rows 2r and 2r + 1 as the halves of a word.

    A power of two in bfloat16 is its exponent at bit 7. They come less what `_as_bfloat16` is to add to its codes.
    """
    scales = jnp.clip(scales, 2.0**-125, 2.0**125)  # beyond, bfloat16 could not hold the products
    return pltpu.bitcast(scales.astype(jnp.bfloat16), jnp.int32) - _both(3 << 6)


def _as_bfloat16(codes: Array, exponents: Array) -> Array:
    """E2M1 codes [R, C] times two to their exponents [R / 2, C], see `_pair_exponents`: [R, C] bfloat16, exactly.

    Two thirds of the instructions of float32 arithmetic, and the same on all generations, with or without bfloat16
    arithmetic. With magnitude bits a = e e m (value 0, .5, 1, 1.5, 2, 3, 4, 6) where bfloat16 keeps the low exponent
    bits and the first of the fraction, a is right from 2 on up to a constant; 1 lies one step of a too high, and 0 is
    no power of two.
    """
    pair = pltpu.bitcast(codes, jnp.uint8).astype(jnp.int32)  # rows 2r and 2r + 1 in a byte, low bits first
    pair = pair | (pair << 12)  # four bits in each half
    magnitude = (pair & _both(7)) << 6
    from_two = ((magnitude + _both(6 << 6)) & _both(8 << 6)) >> 3
    from_one = (magnitude + _both(0x7FC0)) & _both(0x8000)
    keep = from_one - _shift_right(from_one, 15)
    value = (magnitude + from_two + exponents) & keep
    return pltpu.bitcast(value | ((pair & _both(8)) << 12), jnp.bfloat16)
