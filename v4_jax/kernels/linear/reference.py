"""Products with a weight."""

from __future__ import annotations

from typing import Any

from jax import Array

from v4_jax.policy import einsum


def matmul(x: Array, weight: Array, dtype: Any) -> Array:
    """[..., in] times a [out, in] weight as released: [..., out] of `dtype`."""
    return einsum("...i,oi->...o", x, weight, dtype=dtype)
