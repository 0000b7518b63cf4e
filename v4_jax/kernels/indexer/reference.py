"""Index scores of entries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.kernels.attention.reference import products


def index_scores(queries: Array, weights: Array, keys: Array) -> Array:
    """Scores [B, Q, K]: sum over heads of relu(query . key) * weight, in float32 (technical report, section 2.3.1).

    Args:
      queries: [B, Q, heads, C].
      weights: [B, Q, heads] float32.
      keys: [B, K, C] shared by the queries, or [B, Q, K, C] with each query's own.
    """
    return jnp.sum(jax.nn.relu(products(queries, keys)) * weights[..., None], axis=2)
