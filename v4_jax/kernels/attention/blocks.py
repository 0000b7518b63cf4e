"""A long chunk's queries as blocks, each a batch row of its own with its part of the window: what kernels walk over.

A kernel holds a row's keys in VMEM, which those of a chunk of any length would not fit. Blocks of a row share its
entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

WIDTH = 512  # queries of a block, where there are more; a window that is longer makes wider ones


class Blocks(NamedTuple):
    """How a chunk's queries are cut.

    Attributes:
      rows: of the batch.
      each: blocks of a row.
      width: queries of each block.
      size: queries of each row.
      past: keys before a query's own in its window.
    """

    rows: int
    each: int
    width: int
    size: int
    past: int

    @classmethod
    def of(cls, rows: int, size: int, keys: Any) -> Blocks:
        """Blocks of a chunk of so many queries, which see `keys` [B, past + size, C]; None: no window."""
        past = 0 if keys is None else keys.shape[1] - size
        width = min(size, max(WIDTH, past))
        return cls(rows, -(-size // width), width, size, past)

    @property
    def all(self) -> int:
        """Blocks of all rows."""
        return self.rows * self.each

    def cut(self, x: Array, fill: Any = 0) -> Array:
        """[B, size, ...] -> [B * each, width, ...]."""
        missing = self.each * self.width - self.size
        if missing:
            x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return x.reshape(self.all, self.width, *x.shape[2:])

    def joined(self, x: Array) -> Array:
        """[B * each, width, ...] -> [B, size, ...]."""
        return x.reshape(self.rows, self.each * self.width, *x.shape[2:])[:, : self.size]

    def windows(self, keys: Array) -> Array:
        """The keys that each block sees, [B * each, past + width, C], of all [B, past + size, C]."""
        if self.each == 1:
            return keys
        length, channels = self.each * self.width, keys.shape[2]
        keys = jnp.pad(keys, [(0, 0), (0, length - self.size), (0, 0)])
        shape = (self.all, self.width, channels)
        before, own = keys[:, :length].reshape(shape), keys[:, self.past :].reshape(shape)
        return jnp.concatenate([before[:, : self.past], own], axis=1)

    def of_windows(self, gradients: Array) -> Array:
        """The transpose of `windows`: what it makes of `windows`' gradients is that of the keys."""
        if self.each == 1:
            return gradients
        before, own = gradients[:, : self.past], gradients[:, self.past :]
        before = jnp.pad(before, [(0, 0), (0, self.width - self.past), (0, 0)])
        before, own = (x.reshape(self.rows, -1, x.shape[2]) for x in (before, own))
        room = [(0, 0), (0, self.past), (0, 0)]
        total = jnp.pad(before, room) + jnp.pad(own, [pair[::-1] for pair in room])
        return total[:, : self.past + self.size]

    def oldest(self, oldest: Array) -> Array:
        """[B, size], numbers of keys in the chunk's window, as numbers in the blocks' windows; queries that are none
        see none."""
        first = jnp.arange(self.size, dtype=jnp.int32) // self.width * self.width
        return self.cut(oldest - first, fill=self.past + self.width)
