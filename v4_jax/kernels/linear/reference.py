"""Products with a weight."""

from __future__ import annotations

from typing import Any

from jax import Array

from v4_jax.policy import einsum


def matmul(x: Array, weight: Array, dtype: Any) -> Array:
    """[..., in] times a [out, in] weight as released: [..., out] of `dtype`."""
    return einsum("...i,oi->...o", x, weight, dtype=dtype)


def grouped(x: Array, weight: Array, dtype: Any) -> Array:
    """[..., G, in] times G matrices one below the other, [G * out, in]: [..., G, out], each group by its own."""
    groups, size = x.shape[-2:]
    return einsum("...gi,goi->...go", x, weight.reshape(groups, -1, size), dtype=dtype)
