"""`--profile DIR`: a trace of an engine's first rounds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from v4_jax.commands.shared.console import CommandError, bad_input, say
from v4_jax.infer.engine.requests import Event
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.profiler import Recorder

ROUNDS = 64  # that are traced: of a chunk and a step each, which is enough to see and little enough to read


def check_profile(folder: Path | None) -> None:
    """Makes the directory of a trace, before hours of work for it.

    Raises:
      CommandError: it cannot be made, or is a file.
    """
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--profile {folder} is a file; expected a directory, or a name to make one of")
    with bad_input("--profile: "):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def profiled(engine: Engine, folder: Path | None) -> Iterator[None]:
    """Traces the first rounds in which an engine has something to do, and says where to; nothing without a folder."""
    if folder is None:
        yield
        return
    recorder, rounds = Recorder(folder, 0, ROUNDS), 0
    plain = engine.round

    def traced() -> list[Event]:
        nonlocal rounds
        if not engine.idle:
            recorder.at(rounds)
            rounds += 1
        events = plain()
        if rounds == ROUNDS:
            finish()
        return events

    def finish() -> None:
        if not recorder.done and rounds:
            recorder.close()
            say(f"profile: {min(rounds, ROUNDS)} rounds in {folder}")

    engine.round = traced  # type: ignore[method-assign]
    try:
        yield
    finally:
        finish()
