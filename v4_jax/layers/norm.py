"""RMS normalisation, statistics in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array


# No barrier stands before the second computation, and it fuses with its readers. In the scan over layers nothing can
# merge it with the first; elsewhere the compiler may, and keeps more.
@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def rms_norm(x: Array, weight: Array | None, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; computed in float32, returned in the dtype of `x`.

    The backward pass computes it again from `x`, in its dtype; nothing wider need be kept.
    """
    values = x.astype(jnp.float32)
    values = values * (jnp.mean(values * values, axis=-1, keepdims=True) + eps) ** -0.5
    if weight is not None:
        values = values * weight.astype(jnp.float32)
    return values.astype(x.dtype)
