"""How fast something was, and what memory it took, as every verb says it."""

from __future__ import annotations

import resource
import sys

import jax

from v4_jax.commands.shared.sizes import bytes_text


def rate_text(tokens: int, seconds: float) -> str:
    """Tokens, seconds, and how many a second that is."""
    return f"{tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):,.1f} tokens/s)"


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


def memory_text() -> str:
    """The same, in words."""
    peak, of_device = peak_memory()
    return f"memory at most {bytes_text(peak)}{' of a device' if of_device else ''}"
