"""Collectives over any tuple of mesh axes that vanish when the tuple is empty, and the halo of a split sequence.

Everything here runs inside `jax.shard_map`. A tuple of axes counts its devices outermost axis first, as a
`PartitionSpec` entry does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Axes = tuple[str, ...]

# Devices that join shards at once. Of 64 and more the TPU compiler makes a sum of whole arrays that are zero elsewhere,
# and of the scattered sum of so many one that all receive: twice the bytes, and the zeros have to be written.
AT_ONCE = 32


def size(axes: Axes) -> int:
    """Devices along the axes; static."""
    return int(jax.lax.axis_size(axes)) if axes else 1


def index(axes: Axes) -> Array | int:
    """This device's number along the axes."""
    return jax.lax.axis_index(axes) if axes else 0


def psum(x: Any, axes: Axes) -> Any:
    """Sum over the devices, on every one of them."""
    return jax.lax.psum(x, axes) if axes else x


def pmax(x: Array, axes: Axes) -> Array:
    """Maximum over the devices, on every one of them."""
    return jax.lax.pmax(x, axes) if axes else x


def all_gather(x: Array, axes: Axes, dimension: int) -> Array:
    """The devices' shards along `dimension`, joined in order, on every one of them."""
    for some, groups in _steps(axes):
        x = jax.lax.all_gather(x, some, axis=dimension % x.ndim, tiled=True, axis_index_groups=groups)
    return x


def reduce_scatter(x: Array, axes: Axes, dimension: int) -> Array:
    """Sum over the devices, of which each keeps its own shard along `dimension`."""
    for some, groups in reversed(list(_steps(axes))):
        x = jax.lax.psum_scatter(x, some, scatter_dimension=dimension % x.ndim, axis_index_groups=groups, tiled=True)
    return x


def _steps(axes: Axes) -> Iterator[tuple[Axes, list[list[int]] | None]]:
    """Exchanges of at most so many devices each that together join the shards of all, neighbours first.

    Each is of the devices along some axes, or along one axis in groups.
    """
    if not axes:
        return
    if size(axes) <= AT_ONCE:
        yield axes, None
        return
    for axis in reversed(axes):
        devices = size((axis,))
        if devices <= AT_ONCE:
            yield (axis,), None
            continue
        near = max(n for n in range(1, math.isqrt(devices) + 1) if devices % n == 0)
        number = range(devices)
        yield (axis,), [list(number[first : first + near]) for first in range(0, devices, near)]
        yield (axis,), [list(number[first::near]) for first in range(near)]


def all_to_all(x: Array, axes: Axes, dimension: int) -> Array:
    """Hands each device its part of `dimension`, which has one for each of them: [devices, ...], by where it came from.

    The other dimensions of `x` follow, without this one.
    """
    return jax.lax.all_to_all(x, axes, split_axis=dimension, concat_axis=0)


def from_left(x: Array, first: Array, axes: Axes) -> Array:
    """The left neighbour's `x`; `first` on the first device: the halo of a sequence split in contiguous shards."""
    if not axes:
        return first
    moved = jax.lax.ppermute(x, axes, [(i, i + 1) for i in range(size(axes) - 1)])
    return jnp.where(index(axes) == 0, first, moved)


def mirrored(x: Array, axes: Axes) -> Array:
    """The `x` of the device that is as far from the last as this one is from the first."""
    if not axes:
        return x
    devices = size(axes)
    return jax.lax.ppermute(x, axes, [(i, devices - 1 - i) for i in range(devices)])


def rows_at(x: Array, wanted: Array, axes: Axes) -> Array:
    """Rows of a sequence split in contiguous shards, wherever they live, on every device.

    Args:
      x: [B, S, ...] this device's shard.
      wanted: [B, n] int32 indices into the whole sequence; the same on all devices.
      axes: mesh axes that split the sequence.

    Returns:
      [B, n, ...]; zeros where `wanted` is out of range.
    """
    local = wanted - index(axes) * x.shape[1]
    here = (local >= 0) & (local < x.shape[1])
    extra = (1,) * (x.ndim - 2)
    rows = jnp.take_along_axis(x, jnp.clip(local, 0, x.shape[1] - 1).reshape(*local.shape, *extra), axis=1)
    return psum(jnp.where(here.reshape(*here.shape, *extra), rows, 0), axes)
