"""Directories that appear under their name only when complete, and that an interrupted run can be asked to finish.

Work goes on in `.<name>.partial` beside the target. An exception, a signal or a power cut leaves it there with the
parts that were finished; the next run with the same source takes up where it ended.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from v4_jax.checkpoint.interface import Checkpoint
from v4_jax.checkpoint.remote import url_of
from v4_jax.checkpoint.tensors import CheckpointError
from v4_jax.files import try_lock

_RECORD = ".source.json"


class Written(NamedTuple):
    """What `convert` or `export` wrote.

    Attributes:
      path: the directory.
      tensors: released tensors in it.
      bytes: bytes of their data.
      resumed: parts that an earlier, interrupted run had finished.
    """

    path: Path
    tensors: int
    bytes: int
    resumed: int


@contextlib.contextmanager
def building(target: str | Path, checkpoint: Checkpoint, kind: str) -> Iterator[Path]:
    """Yields the working directory of a target; gives it the target's name when the block ends well.

    Args:
      target: directory to make; must not exist.
      checkpoint: what it is made from; an unfinished copy of anything else is refused, never mixed.
      kind: what is being made, so that an unfinished conversion is not finished as an export.

    Raises:
      CheckpointError: the target exists, another process makes it, an unfinished copy of another source is in the
        way, or the disk is full.
    """
    if url := url_of(target):
        raise CheckpointError(f"{url} cannot be written: expected a directory of this machine, to be copied from there")
    target = Path(target).absolute()
    if target.exists():
        raise CheckpointError(f"{target} already exists: choose another name, or remove it first")
    working = target.with_name(f".{target.name}.partial")
    with _held(working):
        _claim(working, {"kind": kind, "source": checkpoint.fingerprint})
        try:
            yield working
            os.rename(working, target)
        except (OSError, ValueError) as error:
            if _is_disk_full(error):
                raise disk_full(working) from error
            raise
    (target / _RECORD).unlink()


def copy_companions(checkpoint: Checkpoint, working: Path) -> None:
    """Writes `config.json` and copies the files that travel with the weights."""
    for name, file in checkpoint.files.items():
        (working / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, working / name)
    text = json.dumps(checkpoint.hf_config, indent=2, ensure_ascii=False)
    (working / "config.json").write_text(text + "\n", encoding="utf-8")


def require_space(working: Path, nbytes: int, part: str) -> None:
    """Refuses to begin a part that cannot fit: running into the end of a disk would only cost time.

    Raises:
      CheckpointError: fewer bytes are free than the part needs.
    """
    free = shutil.disk_usage(working).free
    needed = nbytes + nbytes // 50  # headers and indices
    if free < needed:
        raise disk_full(working, f"{part} needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; ")


def disk_full(working: Path, detail: str = "") -> CheckpointError:
    """The error for a disk without space."""
    return CheckpointError(
        f"the disk of {working.parent} is full: {detail}finished parts are kept in {working}, so free some space and "
        "run the same command again, or remove it"
    )


@contextlib.contextmanager
def _held(working: Path) -> Iterator[None]:
    """Makes the working directory if there is none, and holds it: two processes that write the same parts spoil both.

    Raises:
      CheckpointError: another process has it.
    """
    working.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(working, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise CheckpointError(f"{working} is being written by another process; expected one process a target")
        yield
    finally:
        os.close(descriptor)


def _claim(working: Path, record: dict[str, str | None]) -> None:
    """Takes over a working directory that is empty, or that was made from the same source."""
    file = working / _RECORD
    if record["source"] is None:  # parameters in memory cannot be told from others: begin anew
        for part in working.iterdir():
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink()
    if any(working.iterdir()):
        try:
            found = json.loads(file.read_text())
        except (OSError, json.JSONDecodeError):
            found = None
        if found != record:
            raise CheckpointError(
                f"{working} holds an unfinished copy of another checkpoint (or of this one before it changed): "
                "remove it, or choose another target"
            )
        return
    # Under a temporary name first: a record cut short would make the directory unusable.
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(record))
    os.replace(partial, file)


def _is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full; TensorStore only says so in words."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
