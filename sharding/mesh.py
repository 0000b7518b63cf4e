"""Meshes from text: `data=1,seq=4,expert=2,tensor=1`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from sharding.axes import MESH_AXES, ShardingError


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of all mesh axes from `axis=size` pairs; axes that are not named have size 1.

    Raises:
      ShardingError: an unknown or repeated axis, or a size that is not a positive whole number.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in MESH_AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ShardingError(
                f"mesh {text!r}: found {part.strip()!r}, expected each of {', '.join(MESH_AXES)} at most once with a "
                "positive size, as in data=1,seq=4,expert=2,tensor=1"
            )
        sizes[name] = int(size)
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def make_mesh(sizes: str | dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, seq, expert and tensor, laid out so that inner axes are near each other.

    Args:
      sizes: text for `parse_mesh`, or what it returns.
      devices: devices to use, all of them by default.

    Raises:
      ShardingError: the sizes do not multiply to the number of devices.
    """
    sizes = parse_mesh(sizes) if isinstance(sizes, str) else sizes
    devices = jax.devices() if devices is None else devices
    wanted = math.prod(sizes[axis] for axis in MESH_AXES)
    if wanted != len(devices):
        shown = ",".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)
        raise ShardingError(f"mesh {shown} has {wanted} places, but there are {len(devices)} devices")
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)
