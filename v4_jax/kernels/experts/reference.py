"""Clamped SwiGLU experts (technical report, sections 2.1 and 4.2.3), each applied to all rows in turn."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.kernels.linear.reference import matmul
from v4_jax.number_formats import dequantise


class Experts(NamedTuple):
    """Expert weights, [E, out, in] each, or [layers, E, out, in] when shared by a scan over layers."""

    w1: Any
    w2: Any
    w3: Any


def swiglu(gate: Array, up: Array, limit: float) -> Array:
    """silu(min(gate, limit)) * clip(up, -limit, limit) in float32."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def experts(
    x: Array, chosen: Array, weights: Array, experts: Experts, layer: Any = None, *, first: Any = 0, limit: float
) -> Array:
    """Sums every row's experts.

    Args:
      x: [T, D] in the compute dtype.
      chosen: [T, K] int32 numbers of each row's experts; those outside `first` to `first + E` count as none.
      weights: [T, K] float32 what multiplies the hidden activation before its rounding.
      experts: the weights, [E, H, D] and [E, D, H]; may be block-scaled.
      layer: which layer of stacked weights to use, [layers, E, H, D] then.
      first: number of the first expert.
      limit: bound of gate and up.

    Returns:
      [T, D] float32.
    """
    if layer is not None:
        experts = jax.tree.map(lambda leaf: leaf[layer], experts)
    total = jnp.zeros(x.shape, jnp.float32)
    for number in range(experts.w1.shape[0]):
        w1, w2, w3 = (dequantise(jax.tree.map(lambda x, n=number: x[n], one), x.dtype) for one in experts)
        weight = jnp.sum(jnp.where(chosen == first + number, weights, 0), axis=1, keepdims=True)
        hidden = swiglu(matmul(x, w1, x.dtype), matmul(x, w3, x.dtype), limit) * weight
        total += matmul(hidden.astype(x.dtype), w2, x.dtype).astype(jnp.float32)
    return total
