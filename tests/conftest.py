"""Fixtures for all tests."""

import os

# Programs here are tiny and most run once: compiling them takes the time. These switches change how code is generated,
# not what it computes, and cut that time to a third. They must be set before jax is imported.
_QUICK = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

DATA = Path(__file__).parent / "data"

# Small random checkpoints in the released layout, each with the outputs that independent implementations agree on.
CHECKPOINTS = ("flash-tiny", "pro-tiny", "flash-base-tiny", "released-tiny")


@pytest.fixture(params=CHECKPOINTS)
def released(request) -> Path:
    """Each of the released-layout directories in turn."""
    return DATA / request.param
