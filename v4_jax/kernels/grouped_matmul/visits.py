"""Which pairs of a group and a tile of rows share rows, where rows are sorted by group: what a kernel's grid walks.

`grouped_matmul.tpu` has a list of its own, of fewer scalars, for a grid that is as long as the list: what this one has
beyond it costs 60 to 130 bundles a step, which steps on few rows are too short for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Visits(NamedTuple):
    """The pairs, in row order: a tile in which groups meet is visited by each of them.

    Attributes:
      group: [V] int32 of each visit; from `total` on the last one's.
      tile: [V] int32 likewise.
      first: [G] int32 first row of each group.
      last: [G] int32 one beyond its last.
      total: [1] int32 how many visits there are.
    """

    group: Array
    tile: Array
    first: Array
    last: Array
    total: Array

    def own(self, visit: Any, shape: tuple[int, int]) -> Array:
        """Which rows of a visit's tile its group has, [T, 1] or [1, T], where the fields are references in a kernel."""
        group, (down, across) = self.group[visit], shape
        row = self.tile[visit] * max(shape) + jax.lax.broadcasted_iota(jnp.int32, shape, 0 if down >= across else 1)
        return (self.first[group] <= row) & (row < self.last[group])


def list_visits(sizes: Array, count: int, tile: int, *, least: int = 0) -> Visits:
    """Lists the visits; V is the most there can be: each tile once, and once more for each boundary between groups.

    Args:
      sizes: [G] int32 rows of each group; their sum is at most `count`.
      count: rows.
      tile: rows of a tile.
      least: visits of a group without rows: 0, or 1 where something is to be written for each.
    """
    tiles, groups = -(-count // tile), sizes.shape[0]
    last = jnp.cumsum(sizes.astype(jnp.int32))
    first = last - sizes
    of_group = jnp.where(sizes > 0, (last - 1) // tile - first // tile + 1, least)
    ends = jnp.cumsum(of_group)
    most = tiles + (groups if least else min(count, groups)) - 1
    visit = jnp.minimum(jnp.arange(most, dtype=jnp.int32), jnp.maximum(ends[-1] - 1, 0))
    group = jnp.minimum(jnp.sum(ends <= visit[:, None], axis=1, dtype=jnp.int32), groups - 1)
    place = (first // tile - (ends - of_group))[group] + visit
    return Visits(group, jnp.clip(place, 0, tiles - 1), first, last, ends[-1:])
