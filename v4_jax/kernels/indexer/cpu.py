"""Index scores for XLA:CPU, head by head: a product that ends in a sum over its axis goes to a slow kernel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.kernels.attention.reference import products


def index_scores(queries: Array, weights: Array, keys: Array) -> Array:
    """See `reference.index_scores`."""
    per_head = products(queries, keys)
    heads = (jax.nn.relu(per_head[:, :, h]) * weights[:, :, h, None] for h in range(weights.shape[-1]))
    return functools.reduce(jnp.add, heads)
