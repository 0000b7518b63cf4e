"""Training runs of DSpark's stages: the model whose trunk they were trained on, with them in place of what drafted.

    run/config.json               the architecture, stages included
    run/stages.json               which model the trunk is
    run/checkpoints/STEP/stages/  the stages, float32: the tree of `v4_jax.draft_stages.DraftStages.declarations`

Everything else is as in any training run (`v4_jax.checkpoint.trained`). The model stays where it is and is not copied:
the tensors of its trunk are handed out as they are, and those of the stages rounded to the formats that it has.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from v4_jax.checkpoint.in_memory import rounded
from v4_jax.checkpoint.interface import Checkpoint, rectangle
from v4_jax.checkpoint.mapping import Entry, entries, leaves
from v4_jax.checkpoint.orbax_arrays import open_arrays
from v4_jax.checkpoint.record import Record, open_addition
from v4_jax.checkpoint.released import companions, read_config
from v4_jax.checkpoint.tensors import CheckpointError, names_in
from v4_jax.draft_stages import DSPARK

REPLACED_RULE = "what drafted before the stages"


class WithStages(Checkpoint):
    """A model's trunk with the stages of a step. The trunk's tensors are handed out bit for bit.

    Attributes:
      record: which model the trunk is.
    """

    def __init__(self, base: Checkpoint, record: Record, path: str | Path):
        """Opens the stages of the newest complete step of a run, or of the one given.

        Args:
          base: the model that they were trained on, open.
          record: the run's.
          path: a run directory, or `checkpoints/STEP` in one.

        Raises:
          CheckpointError: no complete step, or one that is damaged; or the model is another one than the run's.
        """
        super().__init__()
        run, folder, self.fingerprint = open_addition(base, record, path)
        self.config, _ = read_config(run)
        if self.config.trunk() != base.config.trunk():
            raise CheckpointError(f"{run / 'config.json'} has another trunk than {record.model}")
        self._base, self.record, self.formats = base, record, base.formats
        self.label, self.files, self.notes = str(folder.parent), companions(run), base.notes
        self._entries = entries(self.config, self.formats)
        self.tensors = {name: entry.info for name, entry in self._entries.items()}
        replaced = tuple(name for name, entry in entries(base.config, base.formats).items() if not _in_trunk(entry))
        self.ignored = {**base.ignored, **({REPLACED_RULE: replaced} if replaced else {})}
        ours = self.config.to_hf()
        changed = {key for key in ours if key.startswith("dspark_")} | {"compress_ratios", "num_nextn_predict_layers"}
        self.hf_config = {**base.hf_config, **{key: ours[key] for key in sorted(changed)}}
        self._stages = {tuple(key.split(".")): array for key, array in open_arrays(folder)}
        wanted = {path: tuple(leaf.shape) for path, leaf in leaves(self.config).items() if path[0] == DSPARK}
        shapes = {path: array.shape for path, array in self._stages.items()}
        if different := sorted(".".join(p) for p in {*wanted, *shapes} if wanted.get(p) != shapes.get(p)):
            raise CheckpointError(f"{folder.parent} does not fit {run / 'config.json'}: {names_in(different)}")
        self._last = threading.local()  # loading reads with several threads, each a tensor of its own

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Reads a tensor or a rectangle of it; see `Checkpoint.read`."""
        entry = self._entries[name]
        if _in_trunk(entry):
            return self._count(self._base.read(name, rows, columns))
        wanted = entry.path, entry.place
        if getattr(self._last, "place", None) != wanted:  # codes and scales are asked for one after the other
            storage = leaves(self.config)[entry.path].storage
            self._last.tensor = rounded(name, self._values(name, entry), entry, storage, self.formats)
            self._last.place = wanted
        return self._count(rectangle(self._last.tensor[entry.role], rows, columns))

    def unrounded(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray | None:
        """Reads a rectangle of what was trained, or what the model has; see `Checkpoint.unrounded`."""
        entry = self._entries[name]
        if _in_trunk(entry):
            return self._base.unrounded(name, rows, columns)
        return self._count(rectangle(self._values(name, entry), rows, columns))

    def close(self) -> None:
        """Closes the model."""
        self._last = threading.local()
        self._base.close()

    def _values(self, name: str, entry: Entry) -> np.ndarray:
        """One layer's or expert's share of what was trained, float32."""
        return self._stages[entry.path].read(entry.place, f"{self.label}: {name}")


def _in_trunk(entry: Entry) -> bool:
    return not entry.part.startswith("mtp.")
