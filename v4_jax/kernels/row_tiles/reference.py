"""What the kernels of this room compute, in plain JAX: the two are each other's inverse and transpose."""

from __future__ import annotations

from jax import Array

LANES = 128  # of a TPU's registers


def in_tiles(rows: Array) -> Array:
    """Rows [R, D] as [R, D / 128, 128]."""
    return rows.reshape(rows.shape[0], -1, LANES)


def from_tiles(tiles: Array) -> Array:
    """[R, n, 128] as rows [R, n * 128]."""
    return tiles.reshape(tiles.shape[0], -1)
