"""Matrix products with weights that may be block-scaled."""

from __future__ import annotations

from typing import Any

from jax import Array

from v4_jax.kernels import choose
from v4_jax.number_formats import Weight, dequantise


def linear(x: Array, weight: Weight, dtype: Any) -> Array:
    """[..., in] times a released-layout [out, in] weight: [..., out] of `dtype`.

    A block-scaled weight is expanded here, for this product alone.
    """
    return choose.matmul(x, dequantise(weight, dtype), dtype)
