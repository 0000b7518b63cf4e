"""Gradients of products with a weight for XLA:CPU.

A weight's gradient adds up over the rows. Where they have two axes, XLA:CPU brings them to the front and calls its fast
library; where they have one it does not.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import Array

from v4_jax.kernels.linear import reference


def matmul_gradients(operands: tuple[Array, Array], gradient: Array, dtype: Any) -> tuple[Array, Array]:
    """Gradients of x [T, in] and weight [out, in] from that of `reference.matmul`, [T, out]."""

    def product(x: Array, weight: Array) -> Array:
        return reference.matmul(x[None], weight, dtype)

    return jax.vjp(product, *operands)[1](gradient[None])
