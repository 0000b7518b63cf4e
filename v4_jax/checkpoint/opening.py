"""Opening any kind of checkpoint by what it is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from v4_jax.adapters import Adapters
from v4_jax.checkpoint.adapted import Merged
from v4_jax.checkpoint.converted import MANIFEST, Converted
from v4_jax.checkpoint.drafting import WithStages
from v4_jax.checkpoint.in_memory import InMemory
from v4_jax.checkpoint.interface import Checkpoint
from v4_jax.checkpoint.record import read_record
from v4_jax.checkpoint.released import Released
from v4_jax.checkpoint.remote import url_of
from v4_jax.checkpoint.trained import Trained, run_of
from v4_jax.config import Config

logger = logging.getLogger("v4_jax")

# Whatever can be read as a checkpoint: a directory, one that is open, or a configuration with its parameters.
Source = str | Path | Checkpoint | tuple[Config, Any]


def open_checkpoint(path: str | Path, *, strict: bool = True) -> Checkpoint:
    """Opens a released directory, one made by `convert`, or a training run; use it in a `with` statement.

    Args:
      path: the directory; of a training run, either its own (the newest complete step is read), `checkpoints/STEP` or
        `best`; a released one may lie elsewhere, as `gs://bucket/directory` or `hf://org/name[@revision]`.
      strict: whether its tensors must be exactly those of its configuration; those of a training run always must.

    Raises:
      CheckpointError: it cannot be read, or does not hold what it should.
    """
    if url_of(path):
        return Released(path, strict=strict)
    if run := run_of(path):
        record = read_record(run)
        if record is None:
            return Trained(path)
        made = Merged if isinstance(record.addition, Adapters) else WithStages
        return made(open_checkpoint(record.model), record, path)
    kind = Converted if (Path(path) / MANIFEST).exists() else Released
    return kind(path, strict=strict)


@contextlib.contextmanager
def opened(source: Source, *, strict: bool = True) -> Iterator[Checkpoint]:
    """A source as an open checkpoint, closed afterwards if it was opened here."""
    if isinstance(source, Checkpoint):
        yield source
        return
    checkpoint = InMemory(*source) if isinstance(source, tuple) else open_checkpoint(source, strict=strict)
    with checkpoint:
        for note in checkpoint.notes:
            logger.warning("%s: %s", checkpoint.label, note)
        yield checkpoint
