"""Training runs: the parameters of a step that `train` saved, presented as the released tensors they would become.

    run/run.json                  marks the directory
    run/config.json               the architecture, with tokenizer and generation files beside it
    run/checkpoints/STEP/params/  float32 parameters (int32 hash tables) as one Orbax tree, shaped like `v4_jax.init`'s
    run/best                      a link to the step with the highest score, where steps are evaluated

A run that trains adapters, or DSpark's stages, has these in their place; see `v4_jax.checkpoint.adapted`, `drafting`.

A step has its final name only when it is complete, so what else lies in `checkpoints` is left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from v4_jax.checkpoint.in_memory import InMemory
from v4_jax.checkpoint.orbax_arrays import StoredArray, nested, open_arrays
from v4_jax.checkpoint.released import companions, read_config, read_json
from v4_jax.checkpoint.tensors import CheckpointError

RUN = "run.json"
CHECKPOINTS = "checkpoints"
BEST = "best"
PARAMS = "params"
ADAPTERS = "adapters"
STAGES = "stages"
RECORD = {"format": "v4-jax training run", "version": 1}


# Unless saved with `orbax_arrays.chunking`, a chunk may hold many experts, which are asked for one by one: without
# a cache each would decode all of it.
_CACHE_BYTES = 1 << 30


def followed(path: str | Path) -> Path:
    """A path, absolute; where it is a run's link to its best step, that step's own."""
    path = Path(path).absolute()
    return path.parent / path.readlink() if path.name == BEST and path.is_symlink() else path


def mark_best(run: Path, step: int | None) -> None:
    """Makes a run's link point to a step, at once; None takes it away. Where there can be no links, there is none."""
    link, working = run / BEST, run / f".{BEST}"
    with contextlib.suppress(OSError):
        working.unlink(missing_ok=True)
        if step is None:
            link.unlink(missing_ok=True)
        else:
            working.symlink_to(Path(CHECKPOINTS, str(step)))
            working.replace(link)


def run_of(path: str | Path) -> Path | None:
    """The training run that a path is, or whose step it is; None if it is neither."""
    path = followed(path)
    if (path / RUN).exists():
        return path
    run = path.parent.parent
    return run if path.parent.name == CHECKPOINTS and (run / RUN).exists() else None


def steps(run: Path) -> list[int]:
    """The complete steps of a run, the newest last."""
    folder = run / CHECKPOINTS
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in found if path.name.isdecimal() and path.is_dir())


class Trained(InMemory):
    """A step of a training run, opened. Array metadata is read at once, array data when asked for."""

    def __init__(self, path: str | Path):
        """Opens the newest complete step of a run, or the one given, and matches it against the declarations.

        Args:
          path: a run directory, or `checkpoints/STEP` or `best` in one.

        Raises:
          CheckpointError: no complete step, or one that is damaged or does not fit the run's configuration.
        """
        run, step = opened_step(path)
        config, hf_config = read_config(run)
        params = step / PARAMS
        if not params.is_dir():
            raise CheckpointError(f"{step} is damaged: it has no {PARAMS}")
        leaves = {key: _Leaf(f"{step}: {key}", store) for key, store in open_arrays(params, cache_bytes=_CACHE_BYTES)}
        try:
            super().__init__(config, nested(leaves))
        except CheckpointError as error:
            raise CheckpointError(f"{step} does not fit {run / 'config.json'}: {error}") from None
        self.label, self.hf_config, self.files = str(step), hf_config, companions(run)
        self.fingerprint = step_fingerprint(run, params)


def opened_step(path: str | Path) -> tuple[Path, Path]:
    """A run, and the directory of the step that a path means: the run's newest, or its own.

    Raises:
      CheckpointError: it is no training run, or has no such complete step.
    """
    path = followed(path)
    run = run_of(path)
    if run is None:
        raise CheckpointError(f"{path} has no {RUN}, expected a training run or one of its steps")
    if (record := read_json(run / RUN)) != RECORD:
        raise CheckpointError(f"{run / RUN} holds {record}, expected {RECORD}")
    return run, _step(run, path)


def _step(run: Path, path: Path) -> Path:
    """The directory of the step that was asked for: the path's own, or the newest."""
    complete = steps(run)
    if not complete:
        raise CheckpointError(f"{run / CHECKPOINTS} holds no complete step yet, expected directories 1, 2, ...")
    if path == run:
        return run / CHECKPOINTS / str(complete[-1])
    if path.name not in map(str, complete):
        raise CheckpointError(f"{path} is no complete step of the run, which has {', '.join(map(str, complete))}")
    return path


def step_fingerprint(run: Path, folder: Path) -> str:
    """Changes when what a step has in a folder is written anew: its database's root has a new version then."""
    root, step = folder / "manifest.ocdbt", folder.parent
    digest = hashlib.sha256((run / "config.json").read_bytes())
    digest.update(f"{step.name} {root.stat().st_mtime_ns} ".encode() + root.read_bytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """An array on disk that stands in for a parameter: what is indexed is read."""

    name: str
    store: StoredArray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.store.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.store.dtype

    def __getitem__(self, place: tuple[int, ...]) -> np.ndarray:
        return self.store.read(place, self.name)
