"""Meshes from text, `data=1,seq=4,expert=2,tensor=1`, and all shapes that a number of devices can take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from v4_jax.sharding.axes import MESH_AXES, ShardingError


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

    Of several TPU slices, `data` alone leads from one to another.

    Args:
      sizes: text for `parse_mesh`, or what it returns.
      devices: devices to use, all of them by default.

    Raises:
      ShardingError: the sizes do not multiply to the number of devices, or `data` to whole slices.
    """
    sizes = parse_mesh(sizes) if isinstance(sizes, str) else sizes
    devices = jax.devices() if devices is None else devices
    wanted = math.prod(sizes[axis] for axis in MESH_AXES)
    if wanted != len(devices):
        there = "there is 1 device" if len(devices) == 1 else f"there are {len(devices)} devices"
        raise ShardingError(f"mesh {format_mesh(sizes)} has {wanted} places, but {there}")
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    slices = slices_of(devices)
    if sizes["data"] % slices:
        raise ShardingError(
            f"mesh {format_mesh(sizes)} has data={sizes['data']}, but there are {slices} slices, and no other axis "
            f"leads from one to another; expected a multiple of {slices}"
        )
    # A mesh axis may take part of an axis of the wires: 8 devices of a 4x4 slice, say.
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        within, between = (sizes["data"] // slices, *shape[1:]), (slices, 1, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def slices_of(devices: Sequence[jax.Device]) -> int:
    """How many TPU slices the devices are of, between which everything is slow; 1 where they are no TPUs."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def format_mesh(sizes: Mapping[str, int]) -> str:
    """The text that `parse_mesh` reads back, without axes of size 1."""
    named = [f"{axis}={sizes[axis]}" for axis in MESH_AXES if sizes[axis] > 1]
    return ",".join(named) or f"{MESH_AXES[0]}=1"


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices in particular, for shapes and placements alone."""
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def mesh_shapes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to lay out so many devices along the mesh axes."""

    def shapes(devices: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
        if len(axes) == 1:
            yield {axes[0]: devices}
            return
        for size in (n for n in range(1, devices + 1) if devices % n == 0):
            for rest in shapes(devices // size, axes[1:]):
                yield {axes[0]: size, **rest}

    yield from shapes(devices, MESH_AXES)
