"""Which compressed entries queries see: a range of each query's row."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Visible(NamedTuple):
    """Which entries queries see, in local numbers of those that lie on this device.

    Attributes:
      low: [B, Q] first visible entry.
      high: [B, Q] one past the last visible entry.
      least: the least `low` of all queries that are attended side by side, these among them.
      most: the greatest `high` of them: what lies beyond need not be looked at.
    """

    low: Array
    high: Array
    least: Array
    most: Array

    def mask(self, first: Array, size: int, wanted: Array) -> Array:
        """[B, Q, size] which of the entries from `first` on are visible and not before `wanted`."""
        number = first + jnp.arange(size, dtype=jnp.int32)
        return (number >= wanted) & (number >= self.low[..., None]) & (number < self.high[..., None])

    def any(self, wanted: Array, size: int) -> Array:
        """Whether anybody may see any of the entries from `wanted` on."""
        return (self.most > wanted) & (self.least < wanted + size)
