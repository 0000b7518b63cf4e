"""The mesh of a command that was not told one: the best that fits, remembered by model and devices."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from v4_jax import __version__
from v4_jax.commands.shared.compilation_cache import user_directory
from v4_jax.commands.shared.console import CommandError, say, working
from v4_jax.commands.shared.sizes import bytes_text, format_size
from v4_jax.files import complete
from v4_jax.planning.mesh_choice import Choice, Demand, device_memory, fewest_devices, largest_context, rank
from v4_jax.sharding.axes import MESH_AXES
from v4_jax.sharding.mesh import format_mesh, slices_of

_HELD = {
    "decode": "weights and cache",
    "train": "masters and moments",
    "sft": "weights and adapters",
    "dspark": "weights and stages",
}
_OPTION = dict.fromkeys(_HELD, "mesh") | {"decode": "--mesh"}


def choose_mesh(demand: Demand, legal: Callable[[dict[str, int]], bool] = lambda mesh: True) -> dict[str, int] | None:
    """Sizes of the mesh's axes, said in one line; None where no mesh is legal, which is said, too.

    Args:
      demand: what the devices are to hold.
      legal: what else is asked of a mesh.

    Raises:
      CommandError: none fits; the sentence says what would.
    """
    devices = jax.devices()
    kind, count, memory = devices[0].device_kind, len(devices), device_memory(devices)
    slices = slices_of(devices)

    def possible(mesh: dict[str, int]) -> bool:
        return mesh["data"] % slices == 0 and legal(mesh)

    kept = _file(demand, kind, count) if jax.process_count() == 1 else None  # several would have to agree
    choice = _read(kept) if kept else None
    if choice is None or not choice.fits(memory) or not possible(choice.mesh):
        with working("choosing a mesh"):
            ranked = [one for one in _ranked(demand, kind, count) if possible(one.mesh)]
        if not ranked:
            say(f"note: using 1 of {count} devices: no mesh splits the model and {_rows(demand)} evenly")
            return None
        choice = next((one for one in ranked if one.fits(memory)), None)
        if choice is None:
            raise CommandError(_no_room(demand, min(one.needed for one in ranked), kind, count, memory))
        if kept:
            _write(kept, choice)
    used = math.prod(choice.mesh.values())
    say(
        f"mesh: {format_mesh(choice.mesh)}, {'all' if used == count else f'{used} of'} {count} devices, "
        f"{bytes_text(choice.needed)} of {_HELD[demand.task]} on each ({_OPTION[demand.task]}=one is one device)"
    )
    return choice.mesh


def _ranked(demand: Demand, kind: str, count: int) -> list[Choice]:
    """The legal meshes of all devices; where there are none, and one process has all, of half of them, and so on."""
    while count > 1:
        if ranked := rank(demand, kind, count):
            return ranked
        if jax.process_count() > 1 or count % 2:
            break
        count //= 2
    return []


def _rows(demand: Demand) -> str:
    return "1 row" if demand.rows == 1 else f"{demand.rows} rows"


def _no_room(demand: Demand, needed: int, kind: str, count: int, memory: int) -> str:
    """What fits in place of what does not."""
    would = []
    with working("looking for what would fit"):
        if context := largest_context(demand, kind, count, memory):
            would.append(f"a context of {format_size(context)}")
        # More virtual devices share the same memory.
        if jax.default_backend() != "cpu" and (more := fewest_devices(demand, kind, count, memory)):
            would.append(f"{more} such devices")
    if demand.dtype != "native" and demand.task == "decode":
        would.append("perhaps --dtype native")
    fits = ", or ".join(would) or "nothing less of this model"
    return (
        f"no mesh of {count} devices has room for {_rows(demand)} of {format_size(demand.context)} tokens: "
        f"{_HELD[demand.task]} take {bytes_text(needed)} of each at least, and each has {bytes_text(memory)}, of which "
        f"some is for temporaries; what would fit: {fits} (a mesh that is given is tried in any case)"
    )


def _file(demand: Demand, kind: str, count: int) -> Path | None:
    """Where a choice is remembered; None if there is no place for it."""
    what = [__version__, demand.config.to_hf(), *_plain(demand)]
    key = hashlib.sha256(json.dumps([kind, count, *what], sort_keys=True).encode()).hexdigest()[:32]
    with contextlib.suppress(RuntimeError):
        return user_directory(os.environ) / "meshes" / f"{key}.json"
    return None


def _plain(demand: Demand) -> list[Any]:
    """All of it but the architecture."""
    names = (field.name for field in dataclasses.fields(demand) if field.name != "config")
    return [getattr(demand, name) for name in names]


def _read(path: Path) -> Choice | None:
    """What was chosen before; None if nothing was, or it cannot be read."""
    try:
        found = json.loads(path.read_text())
        mesh = {axis: int(found["mesh"][axis]) for axis in MESH_AXES}
        return Choice(mesh, int(found["needed"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, choice: Choice) -> None:
    with contextlib.suppress(OSError):  # it is chosen again, then
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete(path) as working_path:
            working_path.write_text(json.dumps({"mesh": choice.mesh, "needed": choice.needed}))
