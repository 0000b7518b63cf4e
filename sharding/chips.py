"""TPU generations: what a chip holds and how fast it is at best, by its vendor's figures, and names of topologies.

Sources: the Cloud TPU pages of each generation, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. Where a page
gives the interconnect for both directions together, half of that counts here. Nothing in this file was measured.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation.

    Attributes:
      name: as topologies are named.
      hbm_bytes: memory of a chip.
      flops: bfloat16 FLOPs per second of a chip.
      hbm_bandwidth: bytes per second between a chip and its memory.
      ici_bandwidth: bytes per second that a chip sends over all its links to other chips.
      devices: devices that a chip appears as to JAX, each with an equal share of everything.
      dimensions: axes of its interconnect.
      clock: cycles per second: peak FLOPs over those that a core's matrix units do in a cycle.
    """

    name: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    devices: int
    dimensions: int
    clock: float

    def per_device(self) -> Chip:
        """The share of one device."""
        n = self.devices
        shares = (self.hbm_bytes // n, self.flops / n, self.hbm_bandwidth / n, self.ici_bandwidth / n)
        return Chip(self.name, *shares, 1, self.dimensions, self.clock)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1200e9, 300e9, 2, 3, 1.05e9),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, 1, 2, 1.5e9),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, 1, 3, 1.75e9),
        Chip("v6e", 32 * GIB, 918e12, 1638e9, 400e9, 1, 2, 1.75e9),
        Chip("tpu7x", 192 * GIB, 2307e12, 7380e9, 600e9, 2, 3, 2.2e9),
    )
}

# What JAX calls their devices.
_OF_DEVICE_KIND = {
    "TPU v4": "v4",
    "TPU v5e": "v5e",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6e": "v6e",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}


def chip_of(device_kind: str) -> Chip | None:
    """The generation of a `jax.Device.device_kind`; None if it is no TPU that is known here."""
    return CHIPS.get(_OF_DEVICE_KIND.get(device_kind, ""))


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are wired together, such as v6e:2x4.

    Attributes:
      chip: the generation.
      shape: chips along each axis of the interconnect.
    """

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Topology:
        """A topology from its name.

        Raises:
          ValueError: an unknown generation, or a shape that it does not come in.
        """
        name, _, shape = text.partition(":")
        if name not in CHIPS:
            raise ValueError(f"topology {text!r}: expected one of {', '.join(CHIPS)} and a shape, such as v6e:2x4")
        chip = CHIPS[name]
        if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (chip.dimensions - 1), shape):
            example = "x".join(("2", "2", "4")[: chip.dimensions])
            raise ValueError(f"topology {text!r}: a {name} slice has {chip.dimensions} axes, as in {name}:{example}")
        return cls(chip, tuple(int(size) for size in shape.split("x")))

    @property
    def chips(self) -> int:
        """How many chips."""
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether the last chip along each axis is wired to the first: in two dimensions along a whole pod's 16, in
        three where the slice is made of whole cubes of 4."""
        if self.chip.dimensions == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * self.chip.dimensions

    @property
    def devices(self) -> int:
        """How many devices they appear as."""
        return self.chips * self.chip.devices

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def topology_of(devices: Sequence[Any]) -> Topology | None:
    """How devices are wired, where they are all of a block of whole TPU chips that are known here.

    Args:
      devices: `jax.Device`s.
    """
    chip = chip_of(devices[0].device_kind)
    if chip is None or any(device.device_kind != devices[0].device_kind for device in devices):
        return None
    axes = [set(places) for places in zip(*(device.coords for device in devices), strict=True)]
    sizes = [max(places) - min(places) + 1 for places in axes]
    topology = Topology(chip, tuple(sizes[: chip.dimensions]))
    flat = all(size == 1 for size in sizes[chip.dimensions :])
    places = {tuple(device.coords) for device in devices}
    whole = len(places) == topology.chips and len(devices) == topology.devices
    return topology if flat and whole else None
