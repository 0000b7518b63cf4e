"""How a checkpoint is written from another, with progress and a closing line."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from v4_jax.checkpoint import Written, url_of
from v4_jax.commands.shared.console import CommandError, bad_input, progress_bar, say

_GB = 1e9


def write(action: Callable[..., Written], source: Path, target: Path, label: str) -> None:
    """Runs `checkpoint.convert` or `checkpoint.export`.

    Raises:
      CommandError: the source cannot be read, or the target cannot be written.
    """
    require_directory(source)
    started = time.perf_counter()
    with bad_input(), progress_bar(label) as report:
        written = action(source, target, progress=report)
    seconds = time.perf_counter() - started
    resumed = f", {written.resumed} parts of which an earlier run had finished" if written.resumed else ""
    say(
        f"wrote {written.path}: {written.tensors:,} tensors, {written.bytes / _GB:,.3f} GB in {seconds:.1f} s "
        f"({written.bytes / _GB / seconds:,.2f} GB/s){resumed}"
    )


def require_directory(path: Path) -> None:
    """Checks that there is a directory; those elsewhere are seen when they are opened.

    Raises:
      CommandError: there is none.
    """
    if not url_of(path) and not path.is_dir():
        raise CommandError(f"there is no directory {path}; expected a released or converted one, or a training run")
