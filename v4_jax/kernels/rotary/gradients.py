"""Gradients of norm and rotation as one TPU operation, see `rotary.tpu`: what was turned is turned back, and

    d x = r (g - v mean(g v))      v = r x      r = 1 / sqrt(mean(x^2) + eps)

where g is the gradient times the norm's weight. A block of tokens is read and written once. Gradients of the weight add
up over a block, and are joined outside.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.rotary.reference import Steps
from v4_jax.kernels.rotary.tpu import HEADS, VMEM_BYTES, block_of, turned
from v4_jax.kernels.rotary.tpu import supports as rotates
from v4_jax.layers.rotary import Turn


def supports(shape: tuple[int, ...], dtype: Any, turn: Turn | None, steps: Steps) -> bool:
    """Whether `gradients` takes rows of such a shape and dtype: there are none of a rounding."""
    return steps.rounding == "none" and rotates(shape, dtype, turn)


def gradients(
    x: Array, weight: Array | None, turn: Turn | None, gradient: Array, steps: Steps, *, interpret: bool = False
) -> tuple[Array, Array | None]:
    """Gradients of `reference.norm_rotate` for its rows and its weight.

    Args:
      x: [B, S, C] or [B, S, H, C].
      weight: [C] of the norm, or None.
      turn: by how much the last channels of each token turn; None: not at all.
      gradient: of the result, in its shape.
      steps: what was done.
    """
    (batch, size), channels = x.shape[:2], x.shape[-1]
    heads = 1 if x.ndim == 3 else x.shape[2]
    tokens, width = batch * size, heads * channels
    block = block_of(tokens, width)
    blocks = pl.cdiv(tokens, block)
    rows = (heads, channels) if heads > 1 else (width,)

    def by_token(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((block, *shape), lambda i: (i, *(0 for _ in shape)))

    operands, specs = [x.reshape(tokens, width), gradient.reshape(tokens, *rows)], [by_token(width), by_token(*rows)]
    out, out_specs = [jax.ShapeDtypeStruct((tokens, width), x.dtype)], [by_token(width)]
    if weight is not None:
        operands.append(weight[None])
        specs.append(pl.BlockSpec((1, channels), lambda i: (0, 0)))
        out.append(jax.ShapeDtypeStruct((blocks, 1, channels), jnp.float32))
        out_specs.append(pl.BlockSpec((None, 1, channels), lambda i: (i, 0, 0)))
    if turn is not None:
        operands += [part.reshape(tokens, -1) for part in turn]
        specs += [by_token(turn.channels)] * 2
    found = pl.pallas_call(
        functools.partial(
            _kernel, steps=steps, norm=weight is not None, rotary=turn is not None, heads=heads, tokens=tokens
        ),
        grid=(blocks,),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=3 * x.nbytes, transcendentals=0),
        interpret=interpret,
        name="norm_rotate_gradients",
    )(*operands)
    of_weight = None if weight is None else jnp.sum(found[1], axis=(0, 1)).astype(weight.dtype)
    return found[0].reshape(x.shape), of_weight


def _kernel(*refs: Any, steps: Steps, norm: bool, rotary: bool, heads: int, tokens: int) -> None:
    """A block of tokens.

    Refs: rows [T, H * C], gradients [T, H, C], [weight [1, C],] [the turn's parts [T, R],] gradients of rows
    [T, H * C] [, of the weight [1, C]].
    """
    given = iter(refs)
    x, gradient = next(given), next(given)
    weight = next(given)[...].astype(jnp.float32) if norm else None
    turn = (next(given)[...], next(given)[...]) if rotary else None
    of_x = next(given)
    of_weight = next(given) if norm else None
    block, channels = x.shape[0], x.shape[1] // heads
    for first in range(0, heads, HEADS):
        count = min(HEADS, heads - first)
        lanes = slice(first * channels, (first + count) * channels)
        rows = x[:, lanes].astype(jnp.float32)
        if heads > 1:
            rows = rows.reshape(block, count, channels)
            own = gradient[:, first : first + count, :].astype(jnp.float32)
        else:
            own = gradient[...].astype(jnp.float32)
        if turn is not None:
            own = turned(own, *turn, inverse=True)
        if steps.eps is not None:
            mean = jnp.sum(rows * rows, axis=-1, keepdims=True) * (1 / channels)
            scale = jax.lax.rsqrt(mean + steps.eps)
            rows = rows * scale
            if weight is not None and of_weight is not None:
                of_weight[...] = _sum(own * rows, tokens) + (of_weight[...] if first else 0.0)
                own = own * weight
            along = jnp.sum(own * rows, axis=-1, keepdims=True) * (1 / channels)
            own = scale * (own - rows * along)
        if heads > 1:
            own = own.astype(of_x.dtype).astype(jnp.float32).reshape(block, count * channels)
        of_x[:, lanes] = own.astype(of_x.dtype)


def _sum(rows: Array, tokens: int) -> Array:
    """[1, C] sum over those rows [T, C] or [T, H, C] of a block that are tokens'."""
    number = pl.program_id(0) * rows.shape[0] + jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    rows = jnp.where(number < tokens, rows, 0.0)
    if rows.ndim == 3:
        rows = jnp.sum(rows, axis=0)
    return jnp.sum(rows, axis=0, keepdims=True)
