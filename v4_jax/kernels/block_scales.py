"""Scales of blocks inside TPU kernels: spread over the elements that they belong to, in few instructions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from v4_jax.number_formats import FP8_BLOCK

LANES, SUBLANES = 128, 8  # of a vector register
CHUNKS = (512, 256, 128)  # inputs at a time, the largest that divides K
FEW_ROWS = 8  # are spread at most: eight times as many are no more than the matrix unit has to have


def product(rows: Array, weight: Array) -> Array:
    """[M, K] times [N, K]: [M, N] float32. The matrix unit takes E4M3 weights as they are."""
    return jax.lax.dot_general(rows, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def by_scaled_rows(rows: Any, codes: Any, here: Any, lines: Array) -> Array:
    """Rows times a strip of an E4M3 weight: each block of 128 outputs with rows that are scaled for it.

    Args:
      rows: reference of [M, K] bfloat16.
      codes: reference of [N, K] E4M3.
      here: `pl.ds` of the strip's outputs in `codes`, a multiple of 128.
      lines: [outputs / 16, K / 128] their scales, see `block_lines`.

    Returns:
      [M, outputs] float32.
    """
    depth, columns = rows.shape[1], here.size
    chunk = next(size for size in CHUNKS if depth % size == 0)
    repeated = [repeat_lanes(lines, LANES, k, chunk).astype(jnp.bfloat16) for k in range(0, depth, chunk)]
    totals = []
    for i in range(columns // LANES):
        block = pl.ds(here.start + i * LANES, LANES)
        total = jnp.zeros((rows.shape[0], LANES), jnp.float32)
        for j, line in enumerate(repeated):
            inputs = slice(j * chunk, (j + 1) * chunk)
            scaled = rows[:, inputs] * line[i * SUBLANES : i * SUBLANES + 1]
            total += product(scaled, codes[block, inputs])
        totals.append(total)
    return jnp.concatenate(totals, axis=1)


def lines_of(scales: Array, rows: int, first: Any, count: int, across: bool) -> Array:
    """Scales of `count` outputs from `first` on as `times_tile` takes them for so many rows; see `block_lines`."""
    if rows <= FEW_ROWS:
        return scales_of_outputs(scales, first, count, across)
    return block_lines(scales, first, count, across)


def times_tile(rows: Any, codes: Any, lines: Array) -> Array:
    """Rows times a tile of an E4M3 weight, which the matrix unit takes as it is.

    Args:
      rows: reference of [M, K] bfloat16.
      codes: reference of [outputs, K] E4M3.
      lines: their scales, see `lines_of`.

    Returns:
      [M, outputs] float32.
    """
    if rows.shape[0] <= FEW_ROWS:
        return by_spread_rows(spread(rows[...]), codes, lines)
    return by_scaled_rows(rows, codes, pl.ds(0, codes.shape[0]), lines)


def spread(rows: Array) -> Array:
    """Rows [M, K] bfloat16 to [8 M, K]: row 8 m + b has the inputs of blocks b, b + 8, ... of row m, and zeros."""
    count, depth = rows.shape
    shape = (SUBLANES, depth)
    block = jax.lax.broadcasted_iota(jnp.int32, shape, 1) >> (FP8_BLOCK[1].bit_length() - 1)
    own = (block & (SUBLANES - 1)) == jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    wide = rows.astype(jnp.float32)
    parts = [jnp.where(own, jnp.broadcast_to(wide[m : m + 1], shape), 0.0) for m in range(count)]
    return jnp.concatenate(parts, axis=0).astype(rows.dtype)


def by_spread_rows(wide: Any, codes: Any, scales: Array) -> Array:
    """Rows times an E4M3 weight, whose sums over each block of inputs are scaled instead of the rows.

    For few rows: the matrix unit has more of them than it needs, and all of its width for outputs.

    Args:
      wide: [8 M, K] bfloat16, see `spread`.
      codes: reference of [N, K] E4M3.
      scales: [K / 128, N] float32 of every output's blocks.

    Returns:
      [M, N] float32.
    """
    (columns, depth), count = codes.shape, wide.shape[0] // SUBLANES
    run, strip = SUBLANES * FP8_BLOCK[1], next(size for size in (2 * LANES, LANES) if columns % size == 0)
    found = []
    for start in range(0, columns, strip):
        here, total = slice(start, start + strip), jnp.zeros((SUBLANES * count, strip), jnp.float32)
        for k in range(0, depth, run):
            sums = product(wide[:, k : k + run], codes[here, k : k + run])
            lines = scales[k // FP8_BLOCK[1] : (k + run) // FP8_BLOCK[1], here]
            if len(lines) < SUBLANES:
                lines = jnp.concatenate([lines, jnp.zeros((SUBLANES - len(lines), strip), jnp.float32)])
            total += sums * jnp.concatenate([lines] * count)
        found.append(jnp.sum(total.reshape(count, SUBLANES, strip), axis=1))
    return jnp.concatenate(found, axis=1)


def scales_of_outputs(scales: Array, start: Any, count: int, across: bool = False) -> Array:
    """Scales [K / 128, count] float32 of each of `count` outputs from `start` on, as `block_lines` takes them.

    By a product with ones and zeros, exact for powers of two.
    """
    blocks = scales.shape[1 if across else 0]
    shape = (blocks, count)
    block = (start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)) >> (FP8_BLOCK[0].bit_length() - 1)
    mine = (block == jax.lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.bfloat16)
    scales = scales.astype(jnp.float32).astype(jnp.bfloat16)
    contracted = (((1 if across else 0,), (0,)), ((), ()))
    return jax.lax.dot_general(scales, mine, contracted, preferred_element_type=jnp.float32)


def block_lines(scales: Array, start: Any, count: int, across: bool = False) -> Array:
    """Scales of 128 x 128 blocks [N / 128, K / 128] for `count` outputs from `start` on: [count / 16, K / 128] float32.

    Each block's scales come eight times, once for every row of a register. By a product with ones and zeros, exact for
    powers of two, because registers cannot be cut at a row known only at run time. With `across`, the scales lie the
    other way round, [K / 128, N / 128].
    """
    shape = (count // FP8_BLOCK[0] * SUBLANES, scales.shape[1 if across else 0])
    # Shifts, since the sign that a division looks at lowers differently by chip, which a CPU host cannot tell.
    line = (start >> 7) + (jax.lax.broadcasted_iota(jnp.int32, shape, 0) >> 3)
    mine = (line == jax.lax.broadcasted_iota(jnp.int32, shape, 1)).astype(jnp.bfloat16)
    scales = scales.astype(jnp.float32).astype(jnp.bfloat16)
    if across:
        return product(mine, scales)
    return jnp.dot(mine, scales, preferred_element_type=jnp.float32)


def some_lines(lines: Any, first: Any, count: int) -> Array:
    """Of a reference to `block_lines`, those of `count` outputs from `first` on, a multiple of as many."""
    each = FP8_BLOCK[0] // SUBLANES
    return lines[pl.ds(pl.multiple_of(jax.lax.div(first, jnp.int32(each)), count // each), count // each), :]


def scale_blocks(codes: Array, lines: Array) -> Array:
    """E4M3 codes [R, C] times scales [R / 16, C] as from `block_lines`: [R, C] bfloat16."""
    count, width = codes.shape
    wide = codes.astype(jnp.float32).reshape(-1, FP8_BLOCK[0] // SUBLANES, SUBLANES, width)
    return (wide * lines.reshape(-1, 1, SUBLANES, width)).astype(jnp.bfloat16).reshape(count, width)


def repeat_lanes(scales: Array, block: int, start: int, count: int) -> Array:
    """Repeats 32-bit scales [R, K / block] over the `count` inputs from `start` on: [R, count].

    A gather within 128 lanes at a time; `jnp.repeat` compiles to five times the instructions of all the rest.
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, (scales.shape[0], LANES), 1)
    parts = []
    for k in range(start, start + count, LANES):
        base = k // block // LANES * LANES
        window = scales[:, base : base + LANES]
        window = jnp.pad(window, ((0, 0), (0, LANES - window.shape[1])))
        index = (lane >> (block.bit_length() - 1)) + (k // block - base)
        parts.append(jnp.take_along_axis(window, index, axis=1, mode="promise_in_bounds"))
    return jnp.concatenate(parts, axis=1)
