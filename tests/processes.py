"""Scripts as processes of their own, with virtual devices, alone or as one of several that know each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(script: Path, devices: int, *arguments) -> subprocess.Popen:
    """Starts a script that sees so many CPU devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    """Waits for a process that ends well; what it wrote."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def start_two(script: Path, devices: int, *arguments) -> list[subprocess.Popen]:
    """Two processes of so many devices each; the script gets its number and the coordinator's address as well."""
    address = free_address()
    return [start(script, devices, *arguments, number, address) for number in range(2)]


def one_of_two(number: int, coordinator: str) -> dict[str, str]:
    """Variables of the environment by which a command with `--distributed` finds the other of two."""
    return dict(JAX_COORDINATOR_ADDRESS=coordinator, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(number))


def free_address() -> str:
    """Where a coordinator can listen."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"
