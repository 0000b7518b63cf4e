"""A machine without TPUs on which libtpu is installed, for `v4-jax plan`, is not searched for them."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
from collections.abc import MutableMapping

NODES = ("/dev/accel*", "/dev/vfio/*")  # where Linux shows TPUs
_PLATFORMS = "JAX_PLATFORMS"


def leave_out_absent_tpus(environment: MutableMapping[str, str] = os.environ, nodes: tuple[str, ...] = NODES) -> None:
    """Tells JAX, which must not be imported yet, to use the processor alone where there is nothing else.

    libtpu would ask the network for its TPUs, and report on stderr, at length, that it finds none. Where anything hints
    at TPUs or GPUs, or the platforms are chosen, all stays as it is.

    Args:
      environment: of the process.
      nodes: patterns of the device files.
    """
    if _PLATFORMS in environment or importlib.util.find_spec("libtpu") is None:
        return
    hints = any(name.startswith("TPU_") for name in environment) or any(glob.glob(node) for node in nodes)
    if hints or importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins"):
        return
    environment[_PLATFORMS] = "cpu"
