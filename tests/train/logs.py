"""A run's log, as tests read it, and programs that runs share."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from v4_jax.train.loop import Trainer


class Metrics:
    """A log that remembers, and asks the run to stop after a step."""

    def __init__(self, stop=None):
        self.found, self.stop = {}, stop

    def write(self, step, metrics, over_at):
        self.found[step] = metrics
        if step == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)

    def rewind(self, step):
        pass


_PROGRAMS = {}  # of all modules that one process runs
_OF_NO_PROGRAM = {"run", "data", "checkpoints", "evaluate", "stability", "log"}


@contextlib.contextmanager
def shared_programs():
    """Runs of the same settings share their programs: tracing each run's anew would take most of the time."""

    def sharing(name):
        make = getattr(Trainer, name)

        def shared(self, *which):
            key = (name, which, self._settings.model_dump_json(exclude=_OF_NO_PROGRAM), str(self._place))
            if key not in _PROGRAMS:
                _PROGRAMS[key] = make(self, *which)
            return _PROGRAMS[key]

        return shared

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_program", "_decide"):
            patch.setattr(Trainer, name, sharing(name))
        yield
