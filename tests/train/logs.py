"""A run's log, as tests read it."""

from __future__ import annotations

import os
import signal


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
