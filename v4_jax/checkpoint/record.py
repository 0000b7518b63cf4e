"""What a training run trains beside a model that lies elsewhere, and which model that is.

run/adapters.json  of adapters of some of its matrices (`v4_jax.checkpoint.adapted`)
run/stages.json    of DSpark's stages on its trunk (`v4_jax.checkpoint.drafting`)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from v4_jax.adapters import Adapters
from v4_jax.checkpoint.fingerprint import fingerprint
from v4_jax.checkpoint.interface import Checkpoint
from v4_jax.checkpoint.released import read_json
from v4_jax.checkpoint.remote import url_of
from v4_jax.checkpoint.tensors import CheckpointError
from v4_jax.checkpoint.trained import ADAPTERS, STAGES, opened_step, step_fingerprint
from v4_jax.draft_stages import DraftStages
from v4_jax.files import complete

_NAMES: dict[type, str] = {Adapters: ADAPTERS, DraftStages: STAGES}
_VERSION = 1

Addition = Adapters | DraftStages


def folder_of(addition: Addition) -> str:
    """What a step's folder is called that holds what is trained."""
    return _NAMES[type(addition)]


def file_of(addition: Addition) -> str:
    """What the record in a run's directory is called."""
    return f"{folder_of(addition)}.json"


class Record(NamedTuple):
    """What a run's adapters, or stages, belong to.

    Attributes:
      model: the directory of their model, where it was when the run began.
      fingerprint: of its content.
      addition: what is trained beside it.
    """

    model: str
    fingerprint: str
    addition: Addition

    @classmethod
    def of(cls, model: str | Path, checkpoint: Checkpoint, addition: Addition) -> Record:
        """The record of an addition to a model that is open."""
        where = str(model) if url_of(model) else str(Path(model).absolute())
        return cls(where, _identity(where, checkpoint), addition)

    def write(self, run: Path) -> None:
        """Puts it into a run's directory."""
        values = {"format": f"v4-jax {folder_of(self.addition)}", "version": _VERSION}
        values |= {"model": self.model, "fingerprint": self.fingerprint}
        with complete(run / file_of(self.addition)) as working:
            working.write_text(json.dumps(values | dataclasses.asdict(self.addition), indent=2) + "\n")


def read_record(run: Path) -> Record | None:
    """The record in a run's directory; None where a run trains all weights.

    Raises:
      CheckpointError: it is no such record.
    """
    name = next((name for name in _NAMES.values() if (run / f"{name}.json").exists()), None)
    if name is None:
        return None
    file = run / f"{name}.json"
    found = read_json(file)
    try:
        if (found["format"], found["version"]) != (f"v4-jax {name}", _VERSION):
            raise KeyError
        addition: Addition = DraftStages()
        if name == ADAPTERS:
            addition = Adapters(int(found["rank"]), float(found["alpha"]), tuple(found["families"]))
        return Record(found["model"], found["fingerprint"], addition)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file} is no record of v4-jax {name}, version {_VERSION}") from None


def _check_base(base: Checkpoint, record: Record, run: Path) -> None:
    """Checks that a model is the one that a run began with.

    Raises:
      CheckpointError: its content has changed since.
    """
    if _identity(record.model, base) != record.fingerprint:
        raise CheckpointError(
            f"{record.model} is not the model that the {folder_of(record.addition)} of {run} were trained on: its "
            "content has changed"
        )


def open_addition(base: Checkpoint, record: Record, path: str | Path) -> tuple[Path, Path, str]:
    """What is trained, of the newest complete step of a run or of the one given.

    Args:
      base: the model that it belongs to, open.
      record: the run's.
      path: a run directory, or `checkpoints/STEP` in one.

    Returns:
      The run, the step's folder with what is trained, and a digest of that and of the model.

    Raises:
      CheckpointError: no complete step, or one that is damaged; or the model is another one than the run's.
    """
    run, step = opened_step(path)
    _check_base(base, record, run)
    folder = step / folder_of(record.addition)
    if not folder.is_dir():
        raise CheckpointError(f"{step} is damaged: it has no {folder.name}")
    content = f"{base.fingerprint} {step_fingerprint(run, folder)}"
    return run, folder, hashlib.sha256(content.encode()).hexdigest()


def _identity(model: str, checkpoint: Checkpoint) -> str:
    return checkpoint.fingerprint or "" if url_of(model) else fingerprint(model)
