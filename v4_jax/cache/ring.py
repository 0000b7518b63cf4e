"""Rings: a row's last tokens, newest over oldest. Windows are rings of keys, open blocks rings of projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array

from v4_jax.cache.rows import StoredRows, batch_rows
from v4_jax.layout import SHORT, Layout
from v4_jax.natural import remainder
from v4_jax.sharding.collectives import Axes, from_left, rows_at
from v4_jax.sharding.split import Split

# Places of a ring beyond the tokens that are ever read back: so that a short chunk can be stored first, and rolled back
# later, without having overwritten what came before it.
SPARE = SHORT - 1

MOST_ROLLED_BACK = SHORT  # tokens; rings also have a place for the newest token, which is not read back from them


class Ring(struct.PyTreeNode):
    """One layer's last tokens, each at place `position mod size`.

    Attributes:
      rows: the role's rows, all layers.
      layer: which of them this is.
      start: [B] int32 tokens stored so far.
      dtype: dtype that is read.
    """

    rows: StoredRows
    layer: Any
    start: Array
    dtype: Any = struct.field(pytree_node=False)

    def advance(self, tokens: Array, layout: Layout, past: int, split: Split) -> tuple[Callable[[], Array], StoredRows]:
        """Stores a chunk, and offers what came before it.

        Args:
          tokens: [B, S, C] rows of the chunk, or of this device's shard of it.
          layout: which of them are valid.
          past: how many earlier tokens to read.
          split: how the sequence is split.

        Returns:
          A function that reads the `past` tokens before the chunk (on a split sequence, before this device's shard)
          [B, past, C], oldest first, zeros before a row's first token; and the role's rows with the chunk stored.
        """
        if not split.sequence and tokens.shape[1] + past <= self.rows.shape[2]:
            # Nothing that is read gets overwritten: storing first lets the compiler update the stack in place, where
            # reading first would make it copy all layers' rows in every layer.
            stored = self.replace(rows=self.append(tokens, layout, ()))
            return lambda: stored.history(past), stored.rows
        before = halo(tokens, self.history(past), split)
        return lambda: before, self.append(tokens, layout, split.sequence)

    def history(self, count: int) -> Array:
        """The last `count` tokens [B, count, C], oldest first, zeros before a row's first token."""
        positions = self.start[:, None] - count + jnp.arange(count)
        places = remainder(positions + self.rows.shape[2], self.rows.shape[2])  # none is further back than that
        rows = self.rows.read(self.layer, batch_rows(self.start, 1), places, self.dtype)
        # A place may still hold an earlier row's token: it must not matter, not even if it is NaN.
        return jnp.where(positions[..., None] >= 0, rows, 0)

    def append(self, tokens: Array, layout: Layout, axes: Axes) -> StoredRows:
        """The role's rows with a chunk stored; `axes` split its sequence."""
        size, chunk, total = self.rows.shape[2], tokens.shape[1], layout.total[:, None]
        if chunk <= size and not axes:
            index = jnp.broadcast_to(jnp.arange(chunk), tokens.shape[:2])
        else:  # only the last ones survive, and no two may meet in one place
            index = total - size + jnp.arange(size, dtype=jnp.int32)
            tokens = rows_at(tokens, index, axes)
        places = jnp.where((index >= 0) & (index < total), remainder(self.start[:, None] + index, size), size)
        return self.rows.write(self.layer, batch_rows(self.start, 1), places, tokens)


def halo(tokens: Array, first: Array, split: Split) -> Array:
    """The tokens [B, n, C] before this device's shard [B, S, C]: its left neighbour's last, or `first` [B, n, C]."""
    return from_left(tokens[:, tokens.shape[1] - first.shape[1] :], first, split.sequence)
