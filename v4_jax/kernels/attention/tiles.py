"""Queries in tiles, over which gradients of what all of them see add up in VMEM: the grid of kernels of training.

The grid is (batch rows, halves of the tiles, tiles of a half). Halves have sums of their own, for chips with two cores,
where there are not two batch rows to share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl


class Tiles(NamedTuple):
    """How the queries of some batch rows are cut.

    Attributes:
      batch: rows.
      queries: of each row.
      size: queries of a tile.
    """

    batch: int
    queries: int
    size: int

    @property
    def number(self) -> int:
        """Tiles of a row."""
        return -(-self.queries // self.size)

    @property
    def halves(self) -> int:
        """Shares of a row's tiles that have sums of their own."""
        return min(self.number, 2) if self.batch % 2 else 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """The kernel's; its last tiles may be none, see `here`."""
        return self.batch, self.halves, -(-self.number // self.halves)

    def cut(self, x: Array, rows: int = 1) -> tuple[Array, pl.BlockSpec]:
        """What queries have, [batch, queries, ...] in so many rows each, made up to whole tiles, and its spec."""
        missing = self.number * self.size - self.queries
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x
        x = x.reshape(self.batch, self.number * self.size * rows, -1)
        return x, self._spec(rows, x.shape[2])

    def out(self, width: int, dtype: Any, rows: int = 1) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """What becomes of queries, shaped as `cut` makes what they have, and its spec."""
        shape = (self.batch, self.number * self.size * rows, width)
        return jax.ShapeDtypeStruct(shape, dtype), self._spec(rows, width)

    def _spec(self, rows: int, width: int) -> pl.BlockSpec:
        each = self.grid[2]

        def place(b: Any, h: Any, t: Any, *_: Any) -> Any:
            return b, jnp.minimum(h * each + t, self.number - 1), 0

        return pl.BlockSpec((None, self.size * rows, width), place)

    def held(self, x: Array, length: int, dtype: Any, shared: int = 1) -> tuple[Array, pl.BlockSpec]:
        """What all queries see, [batch / shared, E, C], made up to a length, and its spec: the whole is in VMEM."""
        x = jnp.pad(x.astype(dtype), ((0, 0), (0, length - x.shape[1]), (0, 0)))
        once = pl.Buffered(1)  # it changes with the batch's row alone
        return x, pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (jax.lax.div(b, shared), 0, 0), pipeline_mode=once)

    def sums(self, length: int, size: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """Float32 sums over the tiles of a half, [batch, halves, length, size], and their spec."""
        shape = jax.ShapeDtypeStruct((self.batch, self.halves, length, size), jnp.float32)
        spec = pl.BlockSpec((None, None, length, size), lambda b, h, *_: (b, h, 0, 0), pipeline_mode=pl.Buffered(1))
        return shape, spec


def here() -> Any:
    """Which of its row's tiles a grid step is for; from `Tiles.number` on it is none."""
    return pl.program_id(1) * pl.num_programs(2) + pl.program_id(2)


def dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Products of tiles [N, C] over one axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
