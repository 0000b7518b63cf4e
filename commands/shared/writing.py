"""How a checkpoint is written from another, with progress and a closing line."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from v4_jax.checkpoint import Written, url_of
from v4_jax.checkpoint.released import INDEX, SINGLE, left_behind
from v4_jax.checkpoint.tensors import names_in
from v4_jax.commands.shared.console import CommandError, bad_input, progress_bar, say
from v4_jax.commands.shared.sizes import bytes_text


def write(action: Callable[..., Written], source: Path, target: Path, label: str) -> None:
    """Runs `checkpoint.convert` or `checkpoint.export`.

    Raises:
      CommandError: the source cannot be read, or the target cannot be written.
    """
    require_directory(source)
    started = time.perf_counter()
    with bad_input(), progress_bar(label) as report:
        written = action(source, target, progress=report)
    released = (source / INDEX).exists() or (source / SINGLE).exists()
    if released and (behind := left_behind(source)):
        say(f"note: left behind, as nothing here knows what they are: {names_in(behind, 10)}")
    seconds = max(time.perf_counter() - started, 1e-3)
    resumed = f", {written.resumed} parts of which an earlier run had finished" if written.resumed else ""
    say(
        f"wrote {written.path}: {written.tensors:,} tensors, {bytes_text(written.bytes)} in {seconds:.1f} s "
        f"({bytes_text(written.bytes / seconds)}/s){resumed}"
    )


def require_directory(path: Path) -> None:
    """Checks that there is a directory; those elsewhere are seen when they are opened.

    Raises:
      CommandError: there is none.
    """
    if not url_of(path) and not path.is_dir():
        raise CommandError(f"there is no directory {path}; expected a released or converted one, or a training run")
