"""RMS normalisation, statistics in float32."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def rms_norm(x: Array, weight: Array | None, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; computed in float32, returned in the dtype of `x`."""
    values = x.astype(jnp.float32)
    values = values * (jnp.mean(values * values, axis=-1, keepdims=True) + eps) ** -0.5
    if weight is not None:
        values = values * weight.astype(jnp.float32)
    return values.astype(x.dtype)
