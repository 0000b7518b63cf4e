"""The devices of a command: one, or a mesh of all that one or several processes have."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable

import jax

from v4_jax.cache.cache import CacheDtype
from v4_jax.commands.shared.console import CommandError, only_errors, say
from v4_jax.commands.shared.meshes import choose_mesh
from v4_jax.commands.shared.options import Dtype
from v4_jax.config import Config
from v4_jax.placement import Place, alternatives, check_mesh
from v4_jax.planning.estimates import presets_of
from v4_jax.planning.mesh_choice import Demand
from v4_jax.sharding.axes import Preset, ShardingError
from v4_jax.sharding.mesh import make_mesh, parse_mesh, slices_of

MESH = "V4_JAX_MESH"  # of the environment: what --mesh is where it is not given
ONE, AUTO = "one", "auto"

_DEVICE_COUNT = "xla_force_host_platform_device_count"


def join(distributed: bool) -> None:
    """Makes the devices of all processes known to each. Only the first process writes to stdout and reports progress.

    JAX finds the others by itself on TPU slices, Slurm and Kubernetes; elsewhere the environment names them.

    Raises:
      CommandError: they are not found.
    """
    enough_threads()  # before anything asks for the devices
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


def wanted_mesh(mesh: str | None) -> str:
    """What an option or a setting says of the mesh, or else the environment: sizes of axes, "one", or "auto"."""
    return mesh or os.environ.get(MESH) or AUTO


def names_mesh(mesh: str | None) -> bool:
    """Whether sizes of axes are given."""
    return wanted_mesh(mesh) not in (ONE, AUTO)


def training_preset(config: Config, mesh: str) -> Preset:
    """The sharding preset of a run on a wanted mesh, which takes all devices."""
    if mesh == ONE:
        return "train"
    enough_threads()  # before anything asks for the devices
    if slices_of(jax.devices()) > 1:
        return "train-slices"
    (preset,) = presets_of("train", config, jax.device_count())
    return preset


def best_place(demand: Demand, legal: Callable[[dict[str, int]], bool] = lambda mesh: True) -> Place:
    """The best mesh that fits, or one device where there is no other; arguments and errors as of `choose_mesh`."""
    enough_threads()  # before anything asks for the devices
    chosen = choose_mesh(demand, legal) if jax.device_count() > 1 else None
    if chosen is None:
        return Place()
    return Place(make_mesh(chosen, jax.devices()[: math.prod(chosen.values())]), demand.preset)


def place(
    config: Config,
    mesh: str | None,
    preset: Preset,
    *,
    batch: int,
    dtype: Dtype,
    length: int = 1,
    context: int | None = None,
    cache: CacheDtype = "bfloat16",
) -> Place:
    """The mesh that `--mesh` names, after checking that the model and rows [batch, length] split over it.

    Args:
      config: the architecture.
      mesh: sizes of the axes, "one" device, or "auto", the best that fits. None is what V4_JAX_MESH of the environment
        says, or else auto, where the devices are several.
      preset: which mesh axes split what.
      batch: rows.
      dtype: format of the weights.
      length: tokens of a row and call.
      context: tokens that a row has room for; None where no mesh can be chosen, but one device.
      cache: format of the cache.

    Raises:
      CommandError: no such mesh can be made of these devices, the model does not split so, or none has room; the
        sentence says what is legal.
    """
    if mesh is None and context is not None:
        mesh = wanted_mesh(mesh)
    if mesh not in (None, ONE):
        enough_threads()  # before anything asks for the devices
    if mesh is None and jax.device_count() > 1 and jax.default_backend() != "cpu":
        say(f"note: using 1 of {jax.device_count()} devices; --mesh spreads the work over all of them")
    if mesh in (None, ONE):
        return Place()
    if mesh == AUTO:
        if context is None:
            raise CommandError("--mesh auto is not for this command; expected sizes of axes, or one")
        return best_place(Demand(config, context, batch, preset, dtype, cache))
    native = dtype == "native"
    try:
        sizes = parse_mesh(mesh)
    except ShardingError as error:
        raise CommandError(f"{error}; or one, or auto") from None
    try:
        made = make_mesh(sizes)
        check_mesh(config, made, preset, batch=batch, length=length, native=native)
    except ShardingError as error:
        legal = alternatives(config, jax.device_count(), preset, batch=batch, length=length, native=native)
        raise CommandError(f"--mesh {mesh}: {error}; {legal}") from None
    return Place(made, preset)
