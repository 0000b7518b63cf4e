"""How long collectives keep the links between chips, which a program's meshes and the wires of a slice decide.

A collective takes as long as its busiest link. What each device sends to others of its own choice, as rows to experts,
goes the shortest way, along one axis of the slice after another. What all members of a group come to hold or add up
goes round in rings along every axis on which the group has more than one place, all of them at once: a device's whole
interconnect works for it only where its group leads along all axes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from v4_jax.planning.hlo_collectives import Collective
from v4_jax.sharding.chips import Chip, Topology

WITHIN = 6  # links that the two halves of a chip count as: docs.cloud.google.com/tpu/docs/tpu7x


@dataclasses.dataclass(frozen=True)
class Links:
    """The wires between a program's devices.

    Attributes:
      topology: the slice.
      places: of each device, by its number in the program, the place of its chip along each axis.
    """

    topology: Topology
    places: tuple[tuple[int, ...], ...]

    @classmethod
    def between(cls, devices: Sequence[Any], topology: Topology) -> Links:
        """Those of `jax.Device`s in the order of a program's mesh, wherever in a pod the slice lies."""
        places = np.array([device.coords[: len(topology.shape)] for device in devices])
        return cls(topology, tuple(map(tuple, (places - places.min(axis=0)).tolist())))

    @property
    def device(self) -> Chip:
        """A device's share of its chip."""
        return self.topology.chip.per_device()

    def seconds(self, collective: Collective) -> float:
        """Seconds that a collective's busiest link works, each time that it runs."""
        one = self.topology.chip.ici_bandwidth / (2 * len(self.topology.shape))  # bytes per second of a link, one way
        if "permute" in collective.kind:
            return collective.nbytes * self._busiest(collective.groups) / one
        if "all-to-all" in collective.kind:
            pairs = [pair for group in collective.groups for pair in itertools.permutations(group, 2)]
            return collective.nbytes / collective.group * self._busiest(pairs) / one
        return collective.sent / one / min(map(self._links, collective.groups))

    def _busiest(self, messages: Sequence[Sequence[int]]) -> float:
        """How many messages the busiest link carries of those from device to device that are sent at once."""
        messages = [(source, target) for source, target in messages if source != target]
        if not messages:
            return 0.0
        places, shape = np.array(self.places), self.topology.shape
        at, goal = (places[list(ends)] for ends in zip(*messages, strict=True))
        inside = np.bincount(np.ravel_multi_index(at[(at == goal).all(axis=1)].T, shape), minlength=1)
        busiest = inside.max() / WITHIN
        for axis, (size, wraps) in enumerate(zip(shape, self.topology.wraps, strict=True)):
            ahead = goal[:, axis] - at[:, axis]
            if wraps:
                ahead = (ahead + size // 2) % size - size // 2
            both = wraps & (2 * ahead == -size)  # as far one way as the other: half of it goes each way
            for way in (1, -1):
                hops = np.where(both, size // 2, np.maximum(way * ahead, 0))
                carried = np.zeros(shape)
                for hop in range(hops.max()):
                    going, link = hops > hop, at.copy()
                    link[:, axis] = (link[:, axis] + way * hop) % size
                    np.add.at(carried, tuple(link[going].T), np.where(both, 0.5, 1.0)[going])
                busiest = max(busiest, carried.max())
            at[:, axis] = goal[:, axis]
        return float(busiest)

    def _links(self, group: Sequence[int]) -> float:
        """Links over which a device of a group that goes round in rings sends at once, less what other groups take."""
        chips = {self.places[device] for device in group}
        links = 0.0
        for axis, (size, wraps) in enumerate(zip(self.topology.shape, self.topology.wraps, strict=True)):
            positions = sorted({chip[axis] for chip in chips})
            if len(positions) > 1:  # rings of other groups go through the chips between
                stride = max(after - before for before, after in itertools.pairwise(positions))
                links += (2 if wraps and stride * len(positions) == size else 1) / stride
        groups = self.topology.chip.devices * len(chips) / len(group)  # on a chip
        return links / groups or WITHIN
