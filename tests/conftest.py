"""Fixtures for all tests."""

import os

# Programs here are tiny and most run once: compiling them takes the time. These switches change how code is generated,
# not what it computes, and cut that time to a third. They must be set before jax is imported.
_QUICK = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

DATA = Path(__file__).parent / "data"

# Small random checkpoints in the released layout, each with the outputs that independent implementations agree on.
CHECKPOINTS = ("flash-tiny", "pro-tiny", "flash-base-tiny", "released-tiny")


def tpu_devices(topology: str) -> list:
    """Devices to compile for, such as those of "v5p:2x2x1", where there is no TPU."""
    from jax.experimental import topologies

    from v4_jax.planning.compile import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


@pytest.fixture(params=CHECKPOINTS)
def released(request) -> Path:
    """Each of the released-layout directories in turn."""
    return DATA / request.param


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Where compiled programs are kept: many tests need the same few."""
    path = str(tmp_path_factory.mktemp("programs"))
    settings = {
        "jax_compilation_cache_dir": path,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield path
    for name, value in before.items():
        jax.config.update(name, value)
