"""One iteration in plain JAX."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array

from v4_jax.policy import einsum


def step(y: Array, coefficients: Array) -> Array:
    """An iteration of matrices `y` [..., m, n], in their dtype: (a + b S + c S S) y of S = y y^T.

    Args:
      y: matrices, no taller than wide.
      coefficients: [3] float32 a, b and c (technical report, section 2.4).
    """
    a, b, c = coefficients
    product = functools.partial(einsum, dtype=y.dtype, accumulate=jnp.float32)
    squared = product("...mk,...nk->...mn", y, y).astype(y.dtype)
    cubic = b * squared.astype(jnp.float32) + c * product("...mk,...nk->...mn", squared, squared)
    factor = (cubic + a * jnp.eye(y.shape[-2])).astype(y.dtype)
    return product("...mk,...kn->...mn", factor, y).astype(y.dtype)
