"""How much memory this process has needed so far."""

from __future__ import annotations

import resource
import sys

import jax


def peak_memory() -> tuple[int, bool]:
    """The most bytes so far of any of this process's devices; of the process, where devices do not say.

    Returns:
      bytes, and whether they are a device's.
    """
    told = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if told and all(told):
        return max(filter(None, told)), True
    # On a processor the process's memory is the device's, weights included. Linux counts kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, False
