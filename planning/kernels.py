"""Cycles of a program's Pallas kernels by the compiler's estimate, each compiled alone.

The compiler writes cycles beside its own operations, and those of kernels only into a folder of profiles, if it is told
to before it starts. It then takes several times as long for everything that it compiles, and can crash on a kernel that
it otherwise compiles. So kernels go to a process of their own, one after another, and one that crashes it, or whose
analysis does not end, stays without an estimate; so does one whose work depends on data in a way that it did not tell.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v4_jax.planning.hlo import Computation, Instruction
from v4_jax.planning.turns import inner_jaxprs, shortened, tells_all, tells_visits, with_turns

STEPS = (4, 8)  # of a grid that are counted, from which follows what all of them take
WHOLE = 16  # steps of a grid at most that are all counted: some do more than others
PATIENCE = 120  # seconds for one kernel; the analysis of some has not been seen to end
AT_ONCE = 12  # kernels that a process takes: what they leave behind in its memory adds up to gigabytes

# What libtpu must find when it is loaded to compile for chips that are not this process's; the rest keeps it quiet.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# Without the first, the analysis refuses bitcasts between 16-bit types that the compiler itself takes.
_OPTIONS = "--xla_tpu_check_llo_types=false --xla_jf_dump_static_llo_profile_to="

# What a kernel is known by: its name, and its operands and results as the compiler writes them, without layouts.
Likeness = tuple[str, ...]


class Cycles(NamedTuple):
    """What a kernel takes.

    Attributes:
      first: if all that it visits it visits for the first time.
      later: if it visits nothing for the first time; the same for kernels to which it is the same.
    """

    first: int
    later: int


def likeness(computation: Computation, kernel: Instruction) -> Likeness:
    """What two calls of the same kernel have in common.

    Args:
      computation: what the kernel is called in.
      kernel: the call.
    """
    operands = (shape for name in kernel.operands for shape in computation.instructions[name].shapes)
    shapes = (f"{shape.dtype}{list(shape.dimensions)}" for shape in (*operands, *kernel.shapes))
    return (kernel.name.partition(".")[0], *shapes)


def cycles(closed: Any, topology: str, mesh: Mesh) -> dict[Likeness, Cycles]:
    """Cycles of every Pallas kernel that the compiler can estimate.

    Args:
      closed: the program's jaxpr.
      topology: what it is compiled for, such as "v6e:2x4".
      mesh: its devices.
    """
    with tempfile.TemporaryDirectory() as folder:
        for number, equation in enumerate(_distinct(closed.jaxpr)):
            for first in (1, 0) if tells_visits(equation) else (1,):
                counted = with_turns(equation, first=bool(first))
                if not tells_all(counted):
                    continue
                bounds = len(equation.invars) - len(counted.invars)
                few, have, whole = shortened(counted, WHOLE)
                lengths = [shortened(counted, steps) for steps in STEPS] if have < whole else [(few, have, whole)]
                by_steps = {have: (few, whole) for few, have, whole in lengths}
                for have, (few, whole) in by_steps.items():
                    name = f"{number} {first} {bounds} {have} {whole}.kernel"
                    Path(folder, name).write_bytes(_exported(few, mesh))
        found = defaultdict[Likeness, dict[int, dict[int, tuple[int, int]]]](lambda: defaultdict(dict))
        left, before = _left(folder), -1
        while left and left != before:  # after a crash the next process takes the next kernel; one may come to none
            options = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {_OPTIONS}{folder}"
            with (
                open(Path(folder, "cycles"), "w+") as answers,
                subprocess.Popen(
                    [sys.executable, "-m", __name__, folder, topology],
                    env=os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": options},
                    stdout=answers,
                    stderr=subprocess.DEVNULL,
                ) as process,
            ):
                _watch(process, folder)
            for line in Path(folder, "cycles").read_text().splitlines():
                if line.startswith("{"):
                    one = json.loads(line)
                    found[tuple(one["likeness"])][one["first"]][one["steps"]] = one["all"], one["cycles"]
            left, before = _left(folder), left
        return {known: _of_visits(counted) for known, counted in found.items()}


def _left(folder: str) -> int:
    """Kernels of a folder that no process has begun with."""
    return len(list(Path(folder).glob("*.kernel")))


def _watch(process: subprocess.Popen[bytes], folder: str) -> None:
    """Waits for the compiler's process, and ends it where it stays with one kernel."""
    before, since = -1, time.monotonic()
    while process.poll() is None:
        if (left := _left(folder)) != before:
            before, since = left, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            process.kill()
        time.sleep(0.2)


def _of_visits(counted: dict[int, dict[int, tuple[int, int]]]) -> Cycles:
    """Of a kernel that was counted with and without first visits, or in one way, which then stands for both."""
    first, later = (_of_all_steps(counted.get(which) or counted[1 - which]) for which in (1, 0))
    return Cycles(first, later)


def _of_all_steps(counted: dict[int, tuple[int, int]]) -> int:
    """Cycles of a whole grid, from those of some of its steps: what begins and ends a grid is in each of them once.

    Args:
      counted: by steps counted, those of the whole grid, and the cycles.
    """
    few, many = min(counted), max(counted)
    steps, cycles = counted[many]
    each = cycles / many if few == many else (cycles - counted[few][1]) / (many - few)
    return round(cycles + (steps - many) * each)


def _distinct(jaxpr: Any) -> Iterator[Any]:
    """The Pallas calls of a jaxpr and all within, one of each that are alike."""
    seen = set()
    for equation in _kernels(jaxpr):
        key = (str(equation.params["name"]), *(str(variable.aval) for variable in equation.invars), str(equation))
        if key not in seen:
            seen.add(key)
            yield equation


def _kernels(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in inner_jaxprs(equation):
            yield from _kernels(inner)


def _exported(equation: Any, mesh: Mesh) -> bytes:
    """A Pallas call as a program that another process can compile."""

    def call(*operands: Any) -> Any:
        return equation.primitive.bind(*operands, **equation.params)

    call.__name__ = str(equation.params["name"])  # what the compiler calls the operation, when there is no other name
    shapes = [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in equation.invars]
    with jax.sharding.set_mesh(Mesh(np.array(mesh.devices.flat[:1]), ("one",))):
        return bytes(jax.export.export(jax.jit(call), platforms=["tpu"])(*shapes).serialize())


def main() -> None:
    """Compiles the kernels of a folder, and writes a line of JSON for each: its likeness and its cycles."""
    from jax.experimental import topologies

    folder, topology = sys.argv[1:]
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    mesh = Mesh(np.array([device]), ("one",))
    place = NamedSharding(mesh, P())
    for path in sorted(Path(folder).glob("*.kernel"))[:AT_ONCE]:
        content = path.read_bytes()
        path.unlink()  # whatever comes of it, it is not begun again
        for old in Path(folder).glob("*.textproto"):
            old.unlink()
        kernel = jax.export.deserialize(bytearray(content))
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=place) for aval in kernel.in_avals]
        # Some find less room in VMEM alone than among others; they have been counted by then.
        with jax.sharding.set_mesh(mesh), contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(kernel.call).lower(*shapes).compile()
        _, first, bounds, steps, all_steps = map(int, path.stem.split())
        if counted := _profile(Path(folder), kernel.fun_name):
            arrays = map(_as_written, (*kernel.in_avals, *kernel.out_avals))
            known = (kernel.fun_name, *["s32[]"] * bounds, *arrays)
            one = {"likeness": known, "first": first, "steps": steps, "all": all_steps, "cycles": counted}
            print(json.dumps(one), flush=True)


def _as_written(aval: Any) -> str:
    """An array's type as the compiler writes it, such as "bf16[8, 128]"."""
    short = (("_", ""), ("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "s"), ("bool", "pred"))
    name = str(aval.dtype)
    for long, brief in short:
        name = name.replace(long, brief)
    return f"{name}{list(aval.shape)}"


def _profile(folder: Path, name: str) -> int | None:
    """Cycles from the compiler's profile of a kernel."""
    for path in folder.glob(f"{name}*_static_llo_profile.textproto"):
        if found := re.search(r"estimated_cycles: (\d+)", path.read_text()):
            return int(found[1])
    return None


if __name__ == "__main__":
    main()
