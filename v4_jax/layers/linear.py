"""Matrix products with weights that may be block-scaled.

A block-scaled weight is expanded for the product alone, or, on TPUs, read as it is stored (`kernels/linear`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import Array

from v4_jax.kernels import choose
from v4_jax.number_formats import Weight


def linear(x: Array, weight: Weight, dtype: Any) -> Array:
    """[..., in] times a released-layout [out, in] weight: [..., out] of `dtype`."""
    return choose.products_with(x, [weight], dtype)[0]


def linears(x: Array, weights: Sequence[Weight], dtype: Any) -> list[Array]:
    """`linear` with several weights of the same input, which may thus go in one operation."""
    return choose.products_with(x, weights, dtype)


def grouped_linear(x: Array, weight: Weight, dtype: Any) -> Array:
    """[..., G, in] times G matrices that lie one below the other, [G * out, in]: [..., G, out] of `dtype`.

    Each group of inputs meets its own matrix.
    """
    return choose.grouped_product(x, weight, dtype)
