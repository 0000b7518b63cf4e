"""Fixtures for all tests."""

import functools
import gc
import os
from pathlib import Path

# Programs here are tiny and most run once: compiling them takes the time. These switches change how code is generated,
# not what it computes, and cut that time to a third: no optimisation, and code in one piece, as each worker has a core.
# They must be set before jax is imported.
_QUICK = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if _QUICK not in os.environ.get("XLA_FLAGS", ""):  # a worker inherits them, and programs are kept by their flags
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()


# Compiled programs are kept under the checkout: tests, workers, processes that tests start, and runs share them.
PROGRAMS = Path(__file__).parents[1] / ".cache" / "programs"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(PROGRAMS)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Nor is anything written to the user's own cache directory; and one device is used where no mesh is asked for, though
# there are eight.
os.environ["XDG_CACHE_HOME"] = str(PROGRAMS.parent / "user")
os.environ["V4_JAX_MESH"] = "one"

import pytest  # noqa: E402

# Tracing makes small objects by the million and hardly any garbage: collections at Python's usual pace took a fifth of
# the time.
gc.set_threshold(100_000, 50, 100)

DATA = Path(__file__).parent / "data"

# Small random checkpoints in the released layout, each with the outputs that independent implementations agree on.
CHECKPOINTS = ("flash-tiny", "pro-tiny", "flash-base-tiny", "released-tiny", "dspark-tiny")


@functools.cache
def tpu_devices(topology: str) -> list:
    """Devices to compile for, such as those of "v5p:2x2x1", where there is no TPU."""
    from jax.experimental import topologies

    from v4_jax.planning.kernels import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


# A compiled program keeps several pieces of memory mapped, and Linux gives a process 65,530: beyond, it crashes.
MOST_MAPPED = 20_000


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Lets go of compiled programs after a module, once there are many; those still needed are read again."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPED:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(params=CHECKPOINTS)
def released(request) -> Path:
    """Each of the released-layout directories in turn."""
    return DATA / request.param
