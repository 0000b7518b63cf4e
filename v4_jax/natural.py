"""Division of natural numbers, for which TPUs have no instruction: a shift or a mask where n is a power of two.

`x // n` on signed arrays is a dozen operations there, each of which costs what any small operation costs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def quotient(x: Array, n: int) -> Array:
    """`x // n` of int32 numbers that are not negative; of others, any number."""
    if n & (n - 1):
        return jax.lax.div(x, jnp.full_like(x, n))
    return jax.lax.shift_right_logical(x, jnp.full_like(x, n.bit_length() - 1))


def remainder(x: Array, n: int) -> Array:
    """`x % n` of int32 numbers that are not negative; of others, any number."""
    if n & (n - 1):
        return jax.lax.rem(x, jnp.full_like(x, n))
    return x & (n - 1)
