"""The best of candidates that are spread over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.sharding.collectives import Axes, all_gather


def distributed_top_k(scores: Array, numbers: Array, top: int, axes: Axes) -> Array:
    """The best candidates of all devices, the same on each.

    Goes mesh axis by mesh axis, so that no device ever sorts more than one axis' worth of candidates.

    Args:
      scores: [..., k] float32 this device's candidates; -inf for none.
      numbers: [..., k] int32 which ones they are; -1 for none.
      top: how many to keep.
      axes: mesh axes over which the candidates are spread.

    Returns:
      [..., min(top, devices * k)] int32 numbers by falling score, the smaller number first among
      equals; -1 for none.
    """
    for axis in reversed(axes):
        bits = jax.lax.bitcast_convert_type(scores, jnp.int32)  # both travel at once
        bits, numbers = jnp.moveaxis(all_gather(jnp.stack([bits, numbers], axis=-2), (axis,), -1), -2, 0)
        scores = jax.lax.bitcast_convert_type(bits, jnp.float32)
        falling, numbers = jax.lax.sort((-scores, numbers), num_keys=2)
        scores, numbers = -falling[..., :top], numbers[..., :top]
    return jnp.where(scores > -jnp.inf, numbers, -1)
