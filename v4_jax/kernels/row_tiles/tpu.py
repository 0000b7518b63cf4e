"""Rows to whole tiles of memory and back, for TPUs.

A row that travels alone, or is gathered, is [n, 128]: tiles of its own. Rows of a matrix share tiles. XLA's copy from
one form to the other takes several times as long as the memory does. Here a block of rows is read once, and of its
words, of two channels' numbers each, those of the same channels are loaded from all rows at a time, by a stride.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.row_tiles.reference import LANES

ROWS = 256  # of a block
WHOLE = 8 * LANES  # channels that are whole tiles
VMEM_BYTES = 48 << 20


def supports(width: int, dtype: Any) -> bool:
    """Whether rows of such a width and dtype are taken."""
    return jnp.dtype(dtype) == jnp.bfloat16 and width % WHOLE == 0


def in_tiles(rows: Array, count: Array, *, interpret: bool = False) -> Array:
    """See `reference.in_tiles`, of bfloat16; all but the first `count` rows [] come out as anything."""
    (length, width), block = rows.shape, min(ROWS, rows.shape[0])
    lines = width // LANES
    scratch = [pltpu.VMEM((block * lines // 2, LANES), jnp.uint32)]
    out = (length * lines, LANES)
    return _call(_to_tiles, "rows_in_tiles", rows, out, count, block, scratch, interpret).reshape(-1, lines, LANES)


def from_tiles(tiles: Array, count: Array, *, interpret: bool = False) -> Array:
    """See `reference.from_tiles`, of bfloat16; all but the first `count` rows [] come out as anything."""
    length, lines, _ = tiles.shape
    block, out = min(ROWS, length), (length, lines * LANES)
    return _call(_from_tiles, "rows_from_tiles", tiles.reshape(-1, LANES), out, count, block, [], interpret)


def _call(
    kernel: Any,
    name: str,
    x: Array,
    out: tuple[int, int],
    count: Array,
    block: int,
    scratch: list[Any],
    interpret: bool,
) -> Array:
    """Runs a kernel over blocks of so many rows, up to the last that has one of the first `count`."""
    rows = x.size // max(x.shape[1], out[1])

    def blocks(shape: tuple[int, ...]) -> pl.BlockSpec:
        def place(i: Any, count: Any) -> Any:
            return jnp.minimum(i, jnp.maximum(jax.lax.div(count[0] + (block - 1), block) - 1, 0)), 0

        return pl.BlockSpec((shape[0] // rows * block, shape[1]), place)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(rows, block),),
            in_specs=[blocks(x.shape)],
            out_specs=blocks(out),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(out, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=2 * x.nbytes, transcendentals=0),
        interpret=interpret,
        name=name,
    )(count.astype(jnp.int32).reshape(1), x)


def _from_tiles(count: Any, tiles: Any, rows: Any) -> None:
    """Refs: tiles [T * n, 128], and rows [T, n * 128]."""
    block = rows.shape[0]
    each = tiles.shape[0] // block // 2  # words of a row, of two channels' numbers each

    @pl.when(pl.program_id(0) * block < count[0])
    def _() -> None:
        words = tiles.bitcast(jnp.uint32)
        for j in range(each):
            both = words[pl.ds(j, block, stride=each), :]
            for half, bits in enumerate((both << 16, both & jnp.uint32(0xFFFF0000))):
                here = slice((2 * j + half) * LANES, (2 * j + half + 1) * LANES)
                rows[:, here] = jax.lax.bitcast_convert_type(bits, jnp.float32).astype(rows.dtype)


def _to_tiles(count: Any, rows: Any, tiles: Any, words: Any) -> None:
    """Refs: rows [T, n * 128], and tiles [T * n, 128]; scratch: their words."""
    block = rows.shape[0]
    each = words.shape[0] // block

    @pl.when(pl.program_id(0) * block < count[0])
    def _() -> None:
        for j in range(each):
            parts = (rows[:, k * LANES : (k + 1) * LANES].astype(jnp.float32) for k in (2 * j, 2 * j + 1))
            low, high = (jax.lax.bitcast_convert_type(part, jnp.uint32) for part in parts)
            words[pl.ds(j, block, stride=each), :] = (low >> 16) | high
        tiles[...] = pltpu.bitcast(words[...], tiles.dtype)
