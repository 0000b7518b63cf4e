"""Chosen entries' numbers, packed together by products with zeros and ones, which are exact in bfloat16."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from v4_jax.kernels.indexer.cut import LANES, SUBLANES, Cut, entry_numbers, rank_of
from v4_jax.kernels.indexer.threshold import kept

SLOTS = 512  # places that are packed at once
NOTHING = -(2**23)  # bits of -inf
ROOM = 16  # rows of the table beside the entries, for digits


def pack(
    t: Any,
    ranks: Any,
    thresholds: Any,
    limits: Any,
    wanted: Any,
    start: Any,
    numbers: Any,
    scores: Any,
    top: int,
    cut: Cut,
) -> None:
    """Writes the numbers, and the scores' bits, of what query t keeps.

    Entries form a table: row 8 * chunk + sublane, column the lane within the chunk. The j-th place takes an entry of
    the column in which the count of kept entries passes j, and of that column's kept entries the right one.
    """
    depth, breadth = SUBLANES * cut.chunks, cut.chunk
    threshold, limit = (_repeat(x[t], breadth) for x in (thresholds, limits))
    chunks = [ranks[t, :, c * breadth : (c + 1) * breadth] for c in range(cut.chunks)]
    number = entry_numbers(breadth, cut)
    flags = []
    for c, rank in enumerate(chunks):
        own = kept(rank, number + (start + c * cut.group) * cut.keys, threshold, limit)
        flags.append(own.astype(jnp.float32))
    heights = functools.reduce(jnp.add, flags)
    heights = jnp.sum(heights, axis=0, keepdims=True)  # [1, breadth]
    before = sums_before(heights)

    lane = jax.lax.broadcasted_iota(jnp.int32, (1, breadth), 1).astype(jnp.float32)
    digits = [part for x in (lane, before) for part in (x - 256 * jnp.floor(x / 256), jnp.floor(x / 256))]
    lines = [*flags, *digits, jnp.zeros((ROOM - len(digits), breadth), jnp.float32)]
    width, shifts = depth + ROOM, range(0, 32, 8) if scores is not None else ()
    for shift in shifts:  # of the scores, a byte at a time
        lines += [((rank >> shift) & 255).astype(jnp.float32) for rank in chunks]
    table = jnp.concatenate(lines, axis=0).astype(jnp.bfloat16)
    whole = table.shape[0]

    def column(count: int) -> Array:
        return jax.lax.broadcasted_iota(jnp.int32, (count, whole), 1)

    def byte_of(column: Array) -> Array:
        """Which byte of scores a row of the table has, counted from 1; 0 for none."""
        bytes_ = ((column >= begin).astype(jnp.int32) for begin in range(width, whole, depth))
        return functools.reduce(jnp.add, bytes_, jnp.zeros(column.shape, jnp.int32))

    def row_of(column: Array) -> Array:
        """The row of the chosen that a row of the table belongs to; of digits, none."""
        own = column - jnp.where(column < depth, 0, width + (byte_of(column) - 1) * depth)
        return jnp.where((column >= depth) & (column < width), -1, own)

    line, own_row = jax.lax.broadcasted_iota(jnp.int32, (width, whole), 0), row_of(column(width))
    up_to, before_row = ones((line <= own_row) & (line < depth)), ones((line < own_row) & (line < depth))
    slots = numbers.shape[1]
    size = next(size for size in (SLOTS, 2 * LANES, LANES) if slots % size == 0)
    # Row 0 adds up the rows of the chosen; rows 1 and 2 read the digits of the lane, and those from 3 on the bytes.
    row, own = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, whole), 0), column(SUBLANES)
    read = ((row == 0) & (own < depth)) | ((row > 0) & (row < 3) & (own == depth + row - 1))
    read = ones(read | ((row > 2) & (row == 2 + byte_of(own))))
    k = jnp.minimum(_repeat(wanted[t], size), top)[:1]

    for place in range(0, slots, size):
        j = place + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0).astype(jnp.float32)
        own = ones((before <= j) & (j < before + heights))  # [size, breadth]
        found = contract(own, table)  # [size, whole] the column that each place's entry is in
        rank = j - (found[:, depth + 2 : depth + 3] + 256 * found[:, depth + 3 : depth + 4])
        chosen = found[:, :width].astype(jnp.bfloat16)
        passed = jnp.dot(chosen, up_to, preferred_element_type=jnp.float32) <= rank
        value = jnp.where(column(size) < depth, passed.astype(jnp.float32), found)
        if shifts:
            begun = jnp.dot(chosen, before_row, preferred_element_type=jnp.float32) <= rank
            value = jnp.where((column(size) < width) | (begun & ~passed), value, 0.0)
        place_of = contract(read, value.astype(jnp.bfloat16)).astype(jnp.int32)
        line, lane_of = place_of[:1], place_of[1:2] + 256 * place_of[2:3]
        step = start + (line >> 3) * cut.group + (lane_of >> cut.shift)
        number = (SUBLANES * step + (line & 7)) * cut.columns + (lane_of & (cut.columns - 1))
        here = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) + place < k
        numbers[pl.ds(t, 1), place : place + size] = jnp.where(here, number, -1)
        if scores is not None:
            bits = functools.reduce(jnp.bitwise_or, [place_of[3 + i : 4 + i] << s for i, s in enumerate(shifts)])
            scores[pl.ds(t, 1), place : place + size] = jnp.where(here, rank_of(bits), NOTHING)


def _repeat(register: Array, count: int) -> Array:
    """[8, 128], the same in all lanes, to [8, count]."""
    return jnp.concatenate([register] * (count // LANES), axis=1)


def ones(mask: Array) -> Array:
    """1 and 0 for a mask, in bfloat16."""
    return mask.astype(jnp.float32).astype(jnp.bfloat16)


def contract(a: Array, b: Array) -> Array:
    """a [M, K] times b [N, K] in bfloat16: [M, N] float32."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def sums_before(heights: Array) -> Array:
    """Sums [1, N] of all heights [1, N] before each; heights are whole numbers up to 256."""
    shape = (LANES, LANES)
    line, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    up_to = ones(line <= column)
    carry, sums = jnp.zeros((SUBLANES, 1), jnp.float32), []
    for i in range(0, heights.shape[1], LANES):
        own = jnp.broadcast_to(heights[:, i : i + LANES], (SUBLANES, LANES))
        total = jnp.dot(own.astype(jnp.bfloat16), up_to, preferred_element_type=jnp.float32) + carry
        sums.append(total - own)
        carry = total[:, LANES - 1 :]
    return jnp.concatenate(sums, axis=1)[:1]
