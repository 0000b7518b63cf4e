"""Compiling for TPUs that are not there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.conftest import tpu_devices
from tests.kernels.bundles import Bundles

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


def pytest_collection_modifyitems(items):
    """Skips these tests where they cannot run."""
    if importlib.util.find_spec("libtpu") is None:
        why = "libtpu is not installed"
    elif jax.default_backend() == "tpu":
        why = "other topologies need a host without TPUs"
    else:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session", autouse=True)
def bundles():
    """Counts of the kernels' instructions."""
    counts = Bundles()
    yield counts
    counts.write()


@pytest.fixture(params=TOPOLOGIES)
def build(request, bundles):
    """Compiles a function of shapes, as they come, for one chip of a topology, and counts its kernels' instructions."""
    mesh = jax.sharding.Mesh(np.array(tpu_devices(request.param)[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def build(function, *shapes, donated=()):
        bundles.start()
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        compiled = jax.jit(function, donate_argnums=donated).lower(*placed).compile()
        bundles.finish(request.node.name, compiled.as_text())
        return compiled

    return build
