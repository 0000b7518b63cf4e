"""Grouped matmul for TPUs that reads expert weights in their stored format and expands them on the chip.

    out[m] = rows[m] . weights[group of row m]^T        rows sorted by group, group sizes known only at run time

XLA would first write the bfloat16 copy of the weights to memory: four times the bytes of E2M1, and for a whole layer
at once. Here a tile of codes travels as it is stored and becomes bfloat16 in VMEM, next to the matrix unit. The
reference is `map_groups` with `linear`, which rounds where this does: weights to bfloat16 (exact for both formats),
products summed in float32, the sum to bfloat16.

The grid is (tiles of N, visits). A visit is a pair (group, tile of rows) that share rows; a tile of rows in which one
group ends and the next begins is visited by both, and each stores its own rows. The list of visits is computed from
the sizes and prefetched as scalars, and its length is the grid's, so empty groups and unused rows cost nothing. A
weight tile spans all of K: successive visits by one group find it already there, and every chosen expert's weights
cross from HBM once per call, however its rows fall into tiles.

Decoding bounds a step with few rows. E4M3 goes to the matrix unit as it is, as in `linear.tpu`. E2M1 becomes E4M3, by
integers and four codes at a time, which is exact where the scales of a weight tile lie within a factor of 2^11 of one
another; where they do not, it becomes bfloat16, two codes at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.block_scales import LANES, block_lines, by_scaled_rows, product, repeat_lanes
from v4_jax.number_formats import E2M1, E4M3, FP4_BLOCK, FP8_BLOCK, BlockScaled, Weight, bytes_of

COLUMNS = 512  # outputs of a weight tile: 1 MiB of E2M1 codes at K = 4,096, long enough to hide a grid step's overhead
STRIP = 256  # outputs at a time within it: the widest matrix unit
CHUNKS = (1024, 512, 256, 128)  # inputs at a time, the largest that divides K
ROWS = (128, 256)  # rows of a tile: when groups are small, and when they are several tiles each
E4M3_RANGE = 11  # binades from the lowest to the highest scale that E2M1 can have in normal E4M3 numbers
E4M3_SHIFT = 6  # what E2M1 gains in E4M3 under the highest scale, in binades
VMEM_BYTES = 48 << 20  # of the 64 MiB or more that every generation from v5e on has

_FORMATS = {jnp.dtype(E2M1): FP4_BLOCK, jnp.dtype(E4M3): FP8_BLOCK}


def supports(weight: Weight, dtype: Any) -> bool:
    """Whether `grouped_matmul` takes this weight [..., N, K] and compute dtype."""
    if jnp.dtype(dtype) != jnp.bfloat16 or any(size % LANES for size in weight.shape[-2:]):
        return False
    if isinstance(weight, BlockScaled):
        return _FORMATS.get(jnp.dtype(weight.codes.dtype)) == weight.block
    return weight.dtype == jnp.bfloat16


def grouped_matmul(rows: Array, weight: Weight, sizes: Array, *, layer: Any = None, interpret: bool = False) -> Array:
    """Multiplies each row by its group's weight.

    Args:
      rows: [M, K] bfloat16, sorted by group.
      weight: [G, N, K], or [L, G, N, K] when `layer` is given: bfloat16, or block-scaled E2M1 or E4M3. N and K are
        multiples of 128.
      sizes: [G] int32 rows of each group; their sum is at most M, and rows beyond it come out as zeros.
      layer: int32 scalar, which layer of stacked weights to read; the others are not touched.
      interpret: run as plain JAX on any backend, for tests.

    Returns:
      [M, N] bfloat16. Not differentiable.

    Raises:
      NotImplementedError: see `supports`.
      ValueError: shapes disagree.
    """
    if not supports(weight, rows.dtype):
        raise NotImplementedError(
            f"rows {rows.dtype}, weight {jax.tree.map(jnp.shape, weight)}: expected bfloat16 rows, a bfloat16, E2M1 or "
            f"E4M3 weight in the released blocks, and its last two axes multiples of {LANES}"
        )
    if layer is None:
        weight, layer = jax.tree.map(lambda x: x[None], weight), 0
    (count, depth), (_, groups, width, _) = rows.shape, weight.shape
    if sizes.shape != (groups,) or depth != weight.shape[-1]:
        raise ValueError(f"rows {rows.shape} and sizes {sizes.shape} do not fit a weight {weight.shape}")
    tile = _tile_rows(count, groups)
    columns = min(COLUMNS, width)
    visits = _visits(sizes, count, tile)
    total = jnp.maximum(visits.total, 1)  # a grid of no steps is not worth finding out about: without rows, visit one
    scalars = (jnp.asarray(layer, jnp.int32).reshape(1), *visits[:-1])

    def weight_map(n: Any, v: Any, layer: Any, group: Any, *_: Any) -> Any:
        return layer[0], group[v], n, 0

    def across_map(n: Any, v: Any, layer: Any, group: Any, *_: Any) -> Any:
        return layer[0], group[v], 0, n

    def whole_map(n: Any, v: Any, layer: Any, group: Any, *_: Any) -> Any:
        return layer[0], group[v], 0, 0

    specs = [
        pl.BlockSpec((tile, depth), lambda n, v, layer, group, base, *_: (base[group[v]] + v, 0)),
        pl.BlockSpec((None, None, columns, depth), weight_map),
    ]
    operands = [rows, weight.codes if isinstance(weight, BlockScaled) else weight]
    block, across = None, False
    if isinstance(weight, BlockScaled):
        block, scales = weight.block, weight.scales
        # XLA stores the scales with N innermost unless K / 32 fills the lanes; seen so, they need no copy.
        across = block == FP4_BLOCK and scales.shape[-1] % LANES != 0
        if across:
            scales = jnp.swapaxes(scales, -1, -2)
            specs.append(pl.BlockSpec((None, None, scales.shape[-2], columns), across_map))
        elif block == FP4_BLOCK:
            specs.append(pl.BlockSpec((None, None, columns, scales.shape[-1]), weight_map))
        else:
            specs.append(pl.BlockSpec((None, None, *scales.shape[-2:]), whole_map))
        operands.append(scales)
    out = pl.pallas_call(
        functools.partial(_kernel, block=block, across=across),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(width, columns), total),
            in_specs=specs,
            out_specs=pl.BlockSpec((tile, columns), lambda n, v, layer, group, base, *_: (base[group[v]] + v, n)),
        ),
        out_shape=jax.ShapeDtypeStruct((count, width), rows.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(rows, weight, columns),
        interpret=interpret,
        name="grouped_matmul",
    )(*scalars, *operands)
    return jnp.where(jnp.arange(count)[:, None] < jnp.sum(sizes), out, 0)


class _Visits(NamedTuple):
    """The pairs (group, tile of rows) to compute, in row order: visit v is of tile `base[group[v]] + v`."""

    group: Array  # [V] int32; entries from `total` on are not read
    base: Array  # [G] int32
    first: Array  # [G] int32, first row of each group
    last: Array  # [G] int32, one beyond its last
    total: Array  # int32


def _tile_rows(count: int, groups: int) -> int:
    """Rows of a tile. Every visit expands its weights anew, beside the matrix unit's work on the previous ones.

    That takes about as long as the products of 128 rows: a smaller tile gains nothing, even where a group has one row.
    """
    few, many = ROWS
    return min(count, many if count // groups >= 2 * many else few)


def _visits(sizes: Array, count: int, tile: int) -> _Visits:
    """Lists the visits; V is the most there can be: each tile once, and once more for each boundary between groups."""
    last = jnp.cumsum(sizes.astype(jnp.int32))
    first = last - sizes
    tiles = jnp.where(sizes > 0, (last - 1) // tile - first // tile + 1, 0)
    ends = jnp.cumsum(tiles)
    visits = jnp.arange(pl.cdiv(count, tile) + min(count, sizes.shape[0]) - 1)
    group = jnp.sum(ends <= visits[:, None], axis=1, dtype=jnp.int32)
    return _Visits(jnp.minimum(group, sizes.shape[0] - 1), first // tile - (ends - tiles), first, last, ends[-1])


def _cost(rows: Array, weight: Weight, columns: int) -> pl.CostEstimate:
    """Useful products, and the bytes when as many groups as can be are hit: fewer rows than groups touch fewer."""
    (count, depth), (layers, groups, width, _) = rows.shape, weight.shape
    per_group = (weight.nbytes if isinstance(weight, BlockScaled) else bytes_of(weight)) // (layers * groups)
    passes = pl.cdiv(width, columns)
    traffic = min(count, groups) * per_group + (passes * depth + width) * count * rows.dtype.itemsize
    return pl.CostEstimate(flops=2 * count * width * depth, bytes_accessed=traffic, transcendentals=0)


def _kernel(
    layer: Any,
    group: Any,
    base: Any,
    first: Any,
    last: Any,
    rows: Any,
    codes: Any,
    *rest: Any,
    block: Any,
    across: bool,
) -> None:
    """One visit: `rows` [tile, K] times `codes` [columns, K] into the group's own rows of `out` [tile, columns]."""
    del layer
    *scales, out = rest
    n, visit = pl.program_id(0), pl.program_id(1)
    own = group[visit]
    count, depth = rows.shape
    columns = codes.shape[0]
    strip = next(size for size in (STRIP, LANES) if columns % size == 0)
    chunk = next(size for size in CHUNKS if depth % size == 0)
    row = (base[own] + visit) * count + jax.lax.broadcasted_iota(jnp.int32, (count, strip), 0)
    mine = (first[own] <= row) & (row < last[own])

    def each_strip(result: Callable[[Any, Any], Array]) -> None:
        """Stores the `result` of each strip: of its place among the columns, and the number of its first."""

        def store(i: Any, carry: None) -> None:
            start = pl.multiple_of(i * strip, strip)
            here = pl.ds(start, strip)
            out[:, here] = jnp.where(mine, result(here, start).astype(out.dtype), out[:, here])
            return carry

        jax.lax.fori_loop(0, columns // strip, store, None)

    def sums(expanded: Callable[[int], Array]) -> Array:
        """Sums over all inputs of rows times weights, of which `expanded` gives those of the chunk from an input on."""
        total = jnp.zeros((count, strip), jnp.float32)
        for k in range(0, depth, chunk):
            total += product(rows[:, k : k + chunk], expanded(k))
        return total

    if block is None:
        each_strip(lambda here, start: sums(lambda k: codes[here, k : k + chunk]))
    elif block == FP8_BLOCK:

        def scaled(here: Any, start: Any) -> Array:
            return by_scaled_rows(rows, codes, here, block_lines(scales[0][...], n * columns + start, strip))

        each_strip(scaled)
    else:

        def scales_of(here: Any) -> Array:
            wide = scales[0][:, here] if across else scales[0][here, :]
            return wide.astype(jnp.float32)

        def in_order(here: Any) -> Array:
            return scales_of(here).T if across else scales_of(here)

        def as_e4m3(here: Any, start: Any) -> Array:
            del start
            exponents = _quad_exponents(in_order(here), highest)
            total = sums(
                lambda k: _as_e4m3(codes[here, k : k + chunk], repeat_lanes(exponents, FP4_BLOCK[1], k, chunk))
            )
            return total * (highest * 2.0**-E4M3_SHIFT)

        def as_bfloat16(here: Any, start: Any) -> Array:
            del start
            exponents = _pair_exponents(in_order(here))
            return sums(
                lambda k: _as_bfloat16(codes[here, k : k + chunk], repeat_lanes(exponents, FP4_BLOCK[1], k, chunk))
            )

        everything = scales_of(slice(None))
        highest, lowest = jnp.max(everything), jnp.min(everything)
        near = (lowest * 2.0**E4M3_RANGE >= highest) & (highest >= 2.0**-100) & (highest <= 2.0**100)
        pl.when(near)(lambda: each_strip(as_e4m3))
        pl.when(jnp.logical_not(near))(lambda: each_strip(as_bfloat16))


def _quad_exponents(scales: Array, highest: Any) -> Array:
    """Scales [R, K / 32] float32 to [R / 4, K / 32] int32: those of rows 4r to 4r + 3 as the bytes of a word.

    They come as exponents of E4M3 at bit 3, 12 for the highest scale, less what `_as_e4m3` is to add to its codes.
    """
    steps = pltpu.bitcast(scales, jnp.int32) - pltpu.bitcast(jnp.full(scales.shape, highest), jnp.int32)
    return pltpu.bitcast(((steps >> 20) + (12 * 8 - 4)).astype(jnp.int8), jnp.int32)


def _as_e4m3(codes: Array, exponents: Array) -> Array:
    """E2M1 codes [R, C] times two to their exponents [R / 4, C], see `_quad_exponents`: [R, C] E4M3, exactly.

    Four codes at a time. With magnitude bits a = e e m (value 0, .5, 1, 1.5, 2, 3, 4, 6) where E4M3 keeps the low
    exponent bits and the first of the fraction, a is right from 1 on up to a constant; .5 lies one step of a too high,
    and 0 is no power of two.
    """
    quad = pltpu.bitcast(pltpu.bitcast(codes, jnp.int4).astype(jnp.int8), jnp.int32)  # with its sign in bits 3 to 7
    magnitude = (quad << 2) & _each(7 << 2)
    from_one = _shift_right((magnitude + _each(0x80 - (2 << 2))) & _each(0x80), 5)
    from_half = (magnitude + _each(0x80 - (1 << 2))) & _each(0x80)
    keep = from_half - _shift_right(from_half, 7)
    value = (magnitude + from_one + exponents) & keep
    return pltpu.bitcast(value | (quad & _each(0x80)), E4M3)


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
