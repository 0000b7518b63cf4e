"""Which mesh of the devices that are there a model is served on, where nobody says; and what would fit where none does.

What a plan ranks for TPUs that need not be there (`v4_jax.planning.estimates`) is ranked here for devices at hand: by
estimate, without compiling anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from v4_jax.cache.cache import CacheDtype
from v4_jax.config import Config
from v4_jax.planning.compile import Workload
from v4_jax.planning.estimates import HEADROOM, candidates
from v4_jax.planning.measure import free_bytes
from v4_jax.sharding.axes import MESH_AXES
from v4_jax.sharding.chips import CHIPS, Topology, chip_of

MOST_DEVICES = 1024  # that are looked at for what would fit


@dataclasses.dataclass(frozen=True)
class Demand:
    """What devices are to hold and do.

    Attributes:
      config: the architecture, with what drafts.
      context: tokens that a row has room for.
      rows: rows that are generated at the same time.
      preset: the sharding preset.
      dtype: format of the weights.
      cache: format of the cache; training has none.
      task: what the devices do: "decode", or "train", "sft" or "dspark", where rows are those of a microbatch.
    """

    config: Config
    context: int
    rows: int
    preset: str
    dtype: Literal["native", "bfloat16", "float32"]
    cache: CacheDtype = "bfloat16"
    task: Literal["decode", "train", "sft", "dspark"] = "decode"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mesh, and what it takes of each device by estimate.

    Attributes:
      mesh: sizes of the mesh axes.
      needed: bytes of weights and cache; in training, of masters and moments.
    """

    mesh: dict[str, int]
    needed: int

    def fits(self, memory: int) -> bool:
        """Whether so many bytes of a device have room for it, and for temporaries."""
        return self.needed <= (1 - HEADROOM) * memory


def device_memory(devices: Sequence[Any]) -> int:
    """Bytes that each device has for a model: a known chip's by its vendor, of others what is free; for all processes.

    Args:
      devices: `jax.Device`s.
    """
    if chip := chip_of(devices[0].device_kind):
        return chip.per_device().hbm_bytes
    own = [device for device in devices if device.process_index == jax.process_index()]
    free = free_bytes(Mesh(np.array(own), ("devices",)))
    memory = _proportions(devices[0].device_kind).hbm_bytes if free is None else free
    if jax.process_count() > 1:  # all must choose the same
        memory = int(multihost_utils.broadcast_one_to_all(np.int64(memory >> 20))) << 20
    return memory


def rank(demand: Demand, kind: str, devices: int) -> list[Choice]:
    """All legal meshes, the fastest step first by estimate; whether they fit is for `Choice.fits`.

    Of a kind of devices that is not known here only the order matters, for which a TPU's proportions stand.

    Args:
      demand: what they are to hold.
      kind: `device_kind` of the devices.
      devices: how many.
    """
    workload = Workload(
        config=demand.config,
        task=demand.task,
        context=demand.context,
        batch=demand.rows,
        chunk=1 if demand.task == "decode" else demand.context,
        mesh=dict.fromkeys(MESH_AXES, 1),
        preset=demand.preset,
        dtype="native" if demand.dtype == "native" else "bfloat16",
        topology=Topology(_proportions(kind), (devices,)),
    )
    # Estimates of a cache are bfloat16's, and those of weights are bfloat16's or the release's; of training, float32's.
    wide = demand.dtype == "float32" and demand.task != "train"
    weights, cache = 1 + wide, 1 + (demand.cache == "float32")
    found = candidates(workload, (demand.preset,))
    floors = sorted(found, key=lambda one: one.order[2:])
    return [Choice(one.workload.mesh, weights * one.weights + cache * one.cache) for one in floors]


def largest_context(demand: Demand, kind: str, devices: int, memory: int) -> int | None:
    """The largest half, quarter, ... of the context that fits; None if none does."""
    context = demand.context // 2
    while context >= 128:
        less = dataclasses.replace(demand, context=context)
        if any(choice.fits(memory) for choice in rank(less, kind, devices)):
            return context
        context //= 2
    return None


def fewest_devices(demand: Demand, kind: str, devices: int, memory: int) -> int | None:
    """Twice as many devices, four times, ...: how many hold it; None if `MOST_DEVICES` do not."""
    count = 2 * devices
    while count <= MOST_DEVICES:
        if any(choice.fits(memory) for choice in rank(demand, kind, count)):
            return count
        count *= 2
    return None


def _proportions(kind: str) -> Any:
    """One device's figures."""
    return (chip_of(kind) or CHIPS["v6e"]).per_device()
