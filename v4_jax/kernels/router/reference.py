"""The choice of experts by scores, and the weights of those chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def best_experts(affinities: Array, scores: Array, top: int, factor: float) -> tuple[Array, Array]:
    """The experts with the highest scores.

    Args:
      affinities: [..., E] float32, positive.
      scores: [..., E] float32; what has no gradient.
      top: how many to choose; among equal scores those of lower number.
      factor: what the weights of a token add up to.

    Returns:
      Their numbers [..., top] int32, the highest score first, and their weights, see `weights_of`.
    """
    chosen = jax.lax.top_k(scores, top)[1]
    return chosen, weights_of(affinities, chosen, factor)


def weights_of(affinities: Array, chosen: Array, factor: float) -> Array:
    """Affinities [..., E] of the experts `chosen` [..., top], in proportion, so that they add up to `factor`."""
    weights = jnp.take_along_axis(affinities, chosen, axis=-1)
    return weights / jnp.sum(weights, axis=-1, keepdims=True) * factor
