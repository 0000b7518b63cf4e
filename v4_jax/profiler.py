"""Traces of jax's profiler, for XProf and Perfetto: of a piece of work, or of some of many steps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Traces the devices, without a word of what Python does."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with _quiet():
        jax.profiler.start_trace(str(folder), profiler_options=options)
    try:
        yield
    finally:
        with _quiet():
            jax.profiler.stop_trace()


class Recorder:
    """Traces some of many steps.

    Args:
      folder: where to.
      first: the number of the first.
      count: how many.

    Attributes:
      done: whether all that can be there is.
    """

    def __init__(self, folder: Path, first: int, count: int) -> None:
        self._folder, self._first, self._end = folder, first, first + count
        self._trace = contextlib.ExitStack()
        self._active = self.done = False

    def at(self, number: int) -> None:
        """Begins or ends with what comes: a step of this number."""
        inside = self._first <= number < self._end
        if inside and not self._active and not self.done:
            self._trace.enter_context(recorded(self._folder))
            self._active = True
        elif self._active and not inside:
            self.close()

    def close(self) -> None:
        """Ends the trace, whether all of its steps came or not."""
        self.done = self.done or self._active
        self._active = False
        self._trace.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps libtpu from telling a user without TPUs, on stderr and at length, that it finds none to trace.

    Errors are exceptions, and are told after.
    """
    if jax.default_backend() == "tpu":
        yield
        return
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
