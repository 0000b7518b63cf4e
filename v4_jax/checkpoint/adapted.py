"""Training runs of adapters: the model that they belong to with their newest updates in it, as the released tensors.

    run/adapters.json               whose adapters they are, and of which matrices
    run/checkpoints/STEP/adapters/  their factors, float32: the tree of `v4_jax.adapters.Adapters.declarations`

Everything else is as in any training run (`v4_jax.checkpoint.trained`). The model stays where it is and is not copied:
its tensors are read there, and those that have an update are merged and rounded to their format as they are read.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np

from v4_jax.adapters import A, Adapters, B
from v4_jax.checkpoint.block_formats import dequantise, scale_name
from v4_jax.checkpoint.in_memory import rounded
from v4_jax.checkpoint.interface import Checkpoint
from v4_jax.checkpoint.mapping import Entry, Role, entries, leaves
from v4_jax.checkpoint.mapping import Path as LeafPath
from v4_jax.checkpoint.orbax_arrays import StoredArray, open_arrays
from v4_jax.checkpoint.record import Record, file_of, open_addition
from v4_jax.checkpoint.released import companions
from v4_jax.checkpoint.tensors import CheckpointError, names_in
from v4_jax.parameters import is_parameter, named


class Merged(Checkpoint):
    """A model with the updates of a step in it. The model's own tensors are handed out bit for bit.

    Attributes:
      record: what the adapters are adapters of.
      adapted: released name -> shapes of both factors, of each matrix that has an update.
    """

    def __init__(self, base: Checkpoint, record: Record, path: str | Path):
        """Opens the adapters of the newest complete step of a run, or of the one given.

        Args:
          base: the model that they belong to, open.
          record: the run's.
          path: a run directory, or `checkpoints/STEP` in one.

        Raises:
          CheckpointError: no complete step, or one that is damaged; or the model is another one than the run's.
        """
        super().__init__()
        run, folder, self.fingerprint = open_addition(base, record, path)
        assert isinstance(record.addition, Adapters)
        self._base, self.record, self._scale = base, record, np.float32(record.addition.scale)
        self._factors = _factors(folder, record.addition, base)
        self.label, self.formats = str(folder.parent), base.formats
        self.config, self.hf_config = base.config, base.hf_config
        self.tensors, self.ignored, self.notes, self.files = base.tensors, base.ignored, base.notes, companions(run)
        self._entries = entries(base.config, base.formats)
        self._names = {(one.path, one.place): name for name, one in self._entries.items() if one.role != "scales"}
        self.adapted: dict[str, tuple[tuple[int, ...], ...]] = {
            name: tuple(factor.shape[len(place) :] for factor in self._factors[path])
            for (path, place), name in self._names.items()
            if path in self._factors
        }
        self._last = threading.local()  # loading reads with several threads, each a tensor of its own

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Reads a tensor or a rectangle of it; see `Checkpoint.read`."""
        entry = self._entries[name]
        if entry.path not in self._factors:
            return self._count(self._base.read(name, rows, columns))
        return self._count(self._tensor(entry)[entry.role][rows, columns])

    def unrounded(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray | None:
        """Reads a rectangle of merged values, or what the model has; see `Checkpoint.unrounded`."""
        entry = self._entries[name]
        if entry.path not in self._factors:
            return self._base.unrounded(name, rows, columns)
        return self._count(self._values(entry)[rows, columns])

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The factors a [rank, in] and b [out, rank] of an adapted matrix, float32."""
        entry = self._entries[name]
        a, b = (factor.read(entry.place, name) for factor in self._factors[entry.path])
        return a, b

    def close(self) -> None:
        """Closes the model."""
        self._last = threading.local()
        self._base.close()

    def _values(self, entry: Entry) -> np.ndarray:
        """A merged matrix in float32."""
        place = entry.path, entry.place
        if getattr(self._last, "place", None) != place:
            name = self._names[place]
            a, b = self.factors(name)
            values = self._of_base(name, entry) + self._scale * (b @ a)
            self._last.place, self._last.values, self._last.tensor = place, values, None
        return self._last.values

    def _of_base(self, name: str, entry: Entry) -> np.ndarray:
        """The model's own values, as exactly as it has them."""
        values = self._base.unrounded(name)
        form = self.formats.block(leaves(self.config)[entry.path].storage)
        if values is None and form is not None:
            return dequantise(self._base.read(name), self._base.read(scale_name(name)), form)
        return np.asarray(self._base.read(name) if values is None else values, np.float32)

    def _tensor(self, entry: Entry) -> dict[Role, np.ndarray]:
        """A merged matrix as stored."""
        values, name = self._values(entry), self._names[entry.path, entry.place]
        if self._last.tensor is None:
            storage = leaves(self.config)[entry.path].storage
            if (form := self.formats.block(storage)) is not None and form.name == "nvfp4":
                raise CheckpointError(
                    f"{name} has an adapter and is held in NVFP4, which is read and not made: expected --format bf16"
                )
            self._last.tensor = rounded(name, values, self._entries[name], storage, self.formats)
        return self._last.tensor


def _factors(folder: Path, adapters: Adapters, base: Checkpoint) -> dict[LeafPath, tuple[StoredArray, StoredArray]]:
    """The factors of each adapted leaf.

    Raises:
      CheckpointError: they are not those of the declarations.
    """
    declared: Any = jax.tree_util.tree_leaves_with_path(adapters.declarations(base.config), is_leaf=is_parameter)
    wanted = {named(path).replace("/", "."): tuple(parameter.shape) for path, parameter in declared}
    found = dict(open_arrays(folder))
    shapes = {key: array.shape for key, array in found.items()}
    if different := sorted(key for key in {*wanted, *shapes} if wanted.get(key) != shapes.get(key)):
        raise CheckpointError(f"{folder.parent} does not fit its record in {file_of(adapters)}: {names_in(different)}")
    paths = {key.rpartition(".")[0] for key in wanted}
    return {tuple(path.split(".")): (found[f"{path}.{A}"], found[f"{path}.{B}"]) for path in paths}
