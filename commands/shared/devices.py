"""The devices of a command: one, or a mesh of all that one or several processes have."""

from __future__ import annotations

import contextlib
import os
import re

import jax

from v4_jax.commands.shared.console import CommandError, only_errors, say
from v4_jax.commands.shared.options import Preset
from v4_jax.config import Config
from v4_jax.placement import Place, alternatives, check_mesh
from v4_jax.sharding.axes import ShardingError
from v4_jax.sharding.mesh import make_mesh, parse_mesh

_DEVICE_COUNT = "xla_force_host_platform_device_count"


def join(distributed: bool) -> None:
    """Makes the devices of all processes known to each. Only the first process writes to stdout and reports progress.

    JAX finds the others by itself on TPU slices, Slurm and Kubernetes; elsewhere the environment names them.

    Raises:
      CommandError: they are not found.
    """
    if not distributed:
        return
    try:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
        )
    except (RuntimeError, ValueError) as error:
        raise CommandError(
            f"--distributed found no other processes ({str(error).splitlines()[0]}); expected a TPU slice, Slurm or "
            "Kubernetes, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment"
        ) from None
    if jax.process_index():
        only_errors()


def virtual(count: int) -> None:
    """Makes the processor look like so many devices, unless jax uses it already or XLA_FLAGS says how many.

    Args:
      count: devices.
    """
    if _DEVICE_COUNT not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    enough_threads()


def enough_threads() -> None:
    """Lets virtual devices wait for each other.

    XLA:CPU starts collectives that do not depend on one another in any order, and each keeps a thread until all devices
    have come to it. With no more threads than cores, every thread of a small machine may end up waiting (seen in
    training on two devices and two cores). XLA takes the number of threads from NPROC when it first sees the processor.
    """
    flag = re.search(rf"{_DEVICE_COUNT}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    count = int(flag[1]) if flag else jax.config.values["jax_num_cpu_devices"]
    if count > 1:
        os.environ.setdefault("NPROC", str(8 * count))


def _number(variable: str) -> int | None:
    value = os.environ.get(variable)
    return int(value) if value and value.isdecimal() else None


def place(config: Config, mesh: str | None, preset: Preset, *, batch: int, native: bool, length: int = 1) -> Place:
    """The mesh that `--mesh` names, after checking that the model and rows [batch, length] split over it.

    Raises:
      CommandError: no such mesh can be made of these devices, or the model does not split so; the sentence says what
        is legal.
    """
    if mesh is None:
        if jax.device_count() > 1 and jax.default_backend() != "cpu":  # virtual CPU devices are one processor
            say(f"note: using 1 of {jax.device_count()} devices; --mesh spreads the work over all of them")
        return Place()
    try:
        sizes = parse_mesh(mesh)
    except ShardingError as error:
        raise CommandError(str(error)) from None
    enough_threads()
    try:
        made = make_mesh(sizes)
        check_mesh(config, made, preset, batch=batch, length=length, native=native)
    except ShardingError as error:
        legal = alternatives(config, jax.device_count(), preset, batch=batch, length=length, native=native)
        raise CommandError(f"--mesh {mesh}: {error}; {legal}") from None
    return Place(made, preset)
