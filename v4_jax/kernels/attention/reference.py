"""Products of queries with keys, and of attention with the keys as values: shared by all queries, or each one's own."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from v4_jax.policy import einsum

MASKED = -1e30  # finite, so that a query with nothing to see stays free of NaN


def products(queries: Array, keys: Array) -> Array:
    """Float32 products [B, Q, H, K] of queries [B, Q, H, C] with keys: [B, K, C] shared, or [B, Q, K, C] of each."""
    return einsum(f"bqhc,{letters(keys)}->bqhk", queries, keys, dtype=queries.dtype, accumulate=jnp.float32)


def weighted(shares: Array, keys: Array) -> Array:
    """Float32 sums [B, Q, H, C] of keys, as in `products`, each times its share [B, Q, H, K], in the keys' dtype."""
    return einsum(f"bqhk,{letters(keys)}->bqhc", shares, keys, dtype=keys.dtype, accumulate=jnp.float32)


def letters(keys: Array) -> str:
    """The einsum letters of shared keys, or of each query's own."""
    return "bqkc" if keys.ndim == 4 else "bkc"
