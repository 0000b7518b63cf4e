"""Which model a directory holds, in a few bytes: enough to tell it from another one before any weights are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from v4_jax.checkpoint.trained import ADAPTERS, CHECKPOINTS, PARAMS, STAGES, followed, run_of, steps
from v4_jax.files import sampled_digest

_SAMPLES, _BLOCK = 16, 1 << 16  # of a large file: blocks, and bytes of each
_APART = {".git", ".cache"}  # folders
_TEXTS = {".md", ".png", ".txt", ".pdf", ".jsonl"}  # files that say nothing of the model, by suffix


def fingerprint(directory: str | Path) -> str:
    """A digest of a model's configuration, tokenizer and weights.

    Small files count whole. Of larger ones the size counts and 16 blocks of 64 KiB, spread evenly: another training of
    the same architecture has other values everywhere, but a single tensor that was edited may not be seen. `verify`
    compares every one.

    Args:
      directory: a released or converted model, a training run (its newest step counts), or one of a run's steps.

    Raises:
      OSError: a file cannot be read.
    """
    directory, found = Path(directory), hashlib.sha256()
    for root, path in _files(directory):
        found.update(f"{path.relative_to(root).as_posix()}\n{path.stat().st_size}\n".encode())
        found.update(sampled_digest(path, _SAMPLES, _BLOCK))
    return found.hexdigest()


def _files(directory: Path) -> Iterator[tuple[Path, Path]]:
    """The files that count, each with the folder that its name is relative to."""
    directory = followed(directory)
    run = run_of(directory)
    if run is None:
        folders = [(directory, directory.rglob("*"))]
    else:
        step = directory if directory != run else run / CHECKPOINTS / str(steps(run)[-1])
        folders = [(run, run.glob("*.json"))]
        folders += [(step / name, (step / name).rglob("*")) for name in (PARAMS, ADAPTERS, STAGES)]
    for root, paths in folders:
        for path in sorted(paths):
            if path.is_file() and path.suffix not in _TEXTS and not _APART & set(path.relative_to(root).parts):
                yield root, path
