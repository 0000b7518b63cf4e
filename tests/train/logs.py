"""A run's log, as tests read it, and programs that runs share."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from v4_jax.train.programs import Programs


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


def of_programs(settings):
    """What tells a run's programs from another's."""
    return settings.model_dump_json(exclude=_OF_NO_PROGRAM)


@contextlib.contextmanager
def shared_programs(key=of_programs):
    """Runs whose settings have the same key share their programs: tracing each run's anew would take most of the time.

    Args:
      key: of settings.
    """

    def sharing(name):
        make = getattr(Programs, name)

        def shared(self, stage):
            which = name, stage, key(self._settings), str(self._place)
            if which not in _PROGRAMS:
                _PROGRAMS[which] = make(self, stage)
            return _PROGRAMS[which]

        return shared

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_step", "_decide"):
            patch.setattr(Programs, name, sharing(name))
        yield
