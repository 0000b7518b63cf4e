"""Two processes of four devices == one process of eight."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.equivalence.tiny import TOLERANCE

SCRIPT = Path(__file__).with_name("one_of_two.py")
ROOT = SCRIPT.parents[2]


def start(devices: int, *arguments) -> subprocess.Popen:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


@pytest.mark.parametrize("mesh", ["seq=2,expert=2,tensor=2"])
def test_two_processes(mesh, tmp_path):
    """The sequence, its halos and its entries cross from one process to the other."""
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    finish(start(8, mesh, one))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    for process in [start(4, mesh, two, number, address) for number in range(2)]:
        finish(process)
    expected, found = np.load(one), np.load(two)
    assert len(expected.files) == 5
    for name in expected.files:
        np.testing.assert_allclose(found[name], expected[name], atol=TOLERANCE, rtol=0, err_msg=name)
