"""Norm, rotation and rounding of projected rows as one TPU operation.

XLA makes some fifteen operations of a norm, a rotation of interleaved pairs and a rounding in blocks, with a copy where
heads move from lanes to rows of their own. In one token's step each of them costs more than the work itself, and in a
chunk each takes its way through memory. Here a block of tokens is read and written once.

Channels lie on lanes. A pair's channels are neighbours, so that a rotation is two turns of the register by one lane;
blocks that share a scale are parts of a register, of which the largest is found under a mask.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.rotary.reference import Steps
from v4_jax.kernels.vectors import vector, vector_spec
from v4_jax.layer_stack import stack_of
from v4_jax.layers.rotary import Turn
from v4_jax.number_formats import E2M1, E4M3, INDEX_BLOCK, KV_BLOCK, round_to, shared_scale

LANES = 128
HEADS = 16  # at a time
BLOCK_BYTES = 4 << 20  # of a block of tokens in float32
VMEM_BYTES = 48 << 20


def supports(shape: tuple[int, ...], dtype: Any, turn: Turn | None) -> bool:
    """Whether `norm_rotate` takes rows of such a shape [..., C] and dtype."""
    rotary = 0 if turn is None else turn.channels
    return bool(math.prod(shape)) and dtype in (jnp.bfloat16, jnp.float32) and not shape[-1] % LANES and rotary <= LANES


def norm_rotate(x: Array, weight: Array | None, turn: Turn | None, steps: Steps, *, interpret: bool = False) -> Array:
    """See `reference.norm_rotate`, for rows that `supports` takes; not differentiable."""
    (batch, size), channels = x.shape[:2], x.shape[-1]
    heads = 1 if x.ndim == 3 else x.shape[2]
    tokens, width = batch * size, heads * channels
    block = block_of(tokens, width)
    by_token = functools.partial(along, block)
    operands, specs, layer = [x.reshape(tokens, width)], [by_token(width)], 0
    if weight is not None:
        stack, layer = stack_of(weight)
        operands.append(stack)
        specs.append(vector_spec(stack, number))
    if turn is not None:
        operands += [part.reshape(tokens, -1) for part in turn]
        specs += [by_token(turn.channels)] * 2
    out = (width,) if heads == 1 else (heads, channels)
    found = pl.pallas_call(
        functools.partial(_norm_rotate, steps=steps, norm=weight is not None, rotary=turn is not None, heads=heads),
        grid_spec=over_tokens(pl.cdiv(tokens, block), specs, by_token(*out)),
        out_shape=jax.ShapeDtypeStruct((tokens, *out), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=2 * x.nbytes, transcendentals=0),
        interpret=interpret,
        name="norm_rotate",
    )(jnp.asarray(layer, jnp.int32).reshape(1), *operands)
    return found.reshape(x.shape)


def block_of(tokens: int, width: int) -> int:
    """Tokens of a block: all, or a multiple of what a register of 16-bit numbers holds."""
    return min(tokens, max(16, BLOCK_BYTES // (4 * width) // 16 * 16))


def along(block: int, *shape: int) -> pl.BlockSpec:
    """A block of tokens of an array [tokens, *shape]."""
    return pl.BlockSpec((block, *shape), lambda i, layer: (i, *(0 for _ in shape)))


def number(i: Any, layer: Any) -> Any:
    """The number of the parameters' layer, from what an index map is given."""
    del i
    return layer[0]


def over_tokens(blocks: int, in_specs: list[pl.BlockSpec], out_spec: pl.BlockSpec) -> Any:
    """A grid over blocks of tokens, with the number of the parameters' layer for a scalar."""
    return pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(blocks,), in_specs=in_specs, out_specs=out_spec)


def _norm_rotate(layer: Any, *refs: Any, steps: Steps, norm: bool, rotary: bool, heads: int) -> None:
    given = iter(refs)
    x = next(given)
    weight = vector(next(given), layer[0]) if norm else None
    turn = (next(given)[...], next(given)[...]) if rotary else None
    out = next(given)
    channels = x.shape[1] // heads
    for first in range(0, heads, HEADS):
        count = min(HEADS, heads - first)
        rows = x[:, first * channels : (first + count) * channels].astype(jnp.float32)
        if heads > 1:
            rows = rows.reshape(x.shape[0], count, channels)
        rows = settled(rows, weight, turn, steps, out.dtype)
        if heads > 1:
            out[:, first : first + count, :] = rows.astype(out.dtype)
        else:
            out[...] = rows.astype(out.dtype)


def settled(rows: Array, weight: Array | None, turn: tuple[Array, Array] | None, steps: Steps, dtype: Any) -> Array:
    """`reference.norm_rotate` inside a kernel: rows [N, C] or [N, H, C] float32, with values of `dtype` in and out.

    The norm's `weight` is [1, C], the turn's parts [N, R].
    """

    if steps.eps is not None:
        mean = jnp.sum(rows * rows, axis=-1, keepdims=True) * (1 / rows.shape[-1])
        rows = rows * jax.lax.rsqrt(mean + steps.eps)
        rows = rounded(rows if weight is None else rows * weight, dtype)
    if turn is not None:
        rows = rounded(turned(rows, *turn), dtype)
    if steps.rounding == "keys":
        rotary = 0 if turn is None else turn[0].shape[-1]
        rows = in_blocks(rows, E4M3, KV_BLOCK, rows.shape[-1] - rotary)
    if steps.rounding == "index":
        rows = in_blocks(rounded(_hadamard(rows), dtype), E2M1, INDEX_BLOCK, rows.shape[-1])
    return rows


def rounded(x: Array, dtype: Any) -> Array:
    """Float32 numbers rounded to those of another dtype."""
    return x if dtype == jnp.float32 else x.astype(dtype).astype(jnp.float32)


def turned(rows: Array, cos: Array, sin: Array, inverse: bool = False) -> Array:
    """Rotates the last channels of rows [N, C] or [N, H, C] float32 by cosines and sines [N, R], see `Turn`."""
    rest = LANES - cos.shape[-1]
    if rest:
        cos = jnp.concatenate([jnp.ones((cos.shape[0], rest), jnp.float32), cos], axis=1)
        sin = jnp.concatenate([jnp.zeros((sin.shape[0], rest), jnp.float32), sin], axis=1)
    if rows.ndim == 3:
        cos, sin = cos[:, None, :], sin[:, None, :]
    tail, axis = rows[..., -LANES:], rows.ndim - 1
    lane = jax.lax.broadcasted_iota(jnp.int32, tail.shape, axis)
    partner = jnp.where((lane & 1) == 0, _rolled(tail, LANES - 1), _rolled(tail, 1))
    tail = tail * cos - partner * sin if inverse else tail * cos + partner * sin
    return tail if rows.shape[-1] == LANES else jnp.concatenate([rows[..., :-LANES], tail], axis=axis)


def _rolled(x: Array, by: int) -> Array:
    return pltpu.roll(x, by, x.ndim - 1)


def in_blocks(rows: Array, dtype: Any, size: int, channels: int) -> Array:
    """Rounds the first `channels` of rows [..., C] float32 to `dtype` and back, `size` of them under one scale."""
    parts = []
    for start in range(0, rows.shape[-1], LANES):
        part = rows[..., start : start + LANES]
        if start < channels:
            lane = jax.lax.broadcasted_iota(jnp.int32, part.shape, part.ndim - 1)
            magnitude, largest = jnp.abs(part), jnp.zeros(part.shape, jnp.float32)
            for first in range(0, min(LANES, channels - start), size):
                own = (lane >= first) & (lane < first + size)
                most = jnp.max(jnp.where(own, magnitude, 0.0), axis=-1, keepdims=True)
                largest = jnp.where(own, most, largest)
            scale = shared_scale(largest, dtype)
            coarse = round_to(part / scale, dtype) * scale
            part = coarse if channels - start >= LANES else jnp.where(lane < channels - start, coarse, part)
        parts.append(part)
    return jnp.concatenate(parts, axis=-1)


def _hadamard(rows: Array) -> Array:
    """Rows [N, C] or [N, H, C] times the orthonormal Walsh-Hadamard matrix; the matrix unit takes bfloat16 exactly."""
    size = rows.shape[-1]
    own, other = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    common = own & other
    for shift in (16, 8, 4, 2, 1):
        common = common ^ (common >> shift)
    signs = (1 - 2 * (common & 1)).astype(jnp.float32)
    flat = jnp.dot(
        rows.reshape(-1, size), signs, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return flat.reshape(rows.shape) * np.float32(size**-0.5)
