"""One iteration in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def step(y: Array, coefficients: Array) -> Array:
    """An iteration of matrices `y` [..., m, n], in their dtype: (a + b S + c S S) y of S = y y^T.

    Args:
      y: matrices, no taller than wide.
      coefficients: [3] float32 a, b and c (technical report, section 2.4).
    """
    a, b, c = coefficients
    squared = _product("...mk,...nk->...mn", y, y).astype(y.dtype)
    cubic = b * squared.astype(jnp.float32) + c * _product("...mk,...nk->...mn", squared, squared)
    factor = (cubic + a * jnp.eye(y.shape[-2])).astype(y.dtype)
    return _product("...mk,...kn->...mn", factor, y).astype(y.dtype)


def _product(spec: str, a: Array, b: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)
