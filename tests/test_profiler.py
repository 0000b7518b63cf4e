"""Which of many steps are traced."""

import contextlib

import pytest

from v4_jax import profiler


@pytest.mark.parametrize(
    ("first", "count", "steps", "traced"),
    [
        (2, 3, range(10), [2, 3, 4]),
        (0, 2, range(5), [0, 1]),
        (2, 3, range(4), [2, 3]),  # over before they all came
        (5, 4, range(7, 12), [7, 8]),  # a run that goes on in the middle
        (2, 2, [0, 1, 2, 3, 4, 2, 3, 4], [2, 3]),  # one that went back
        (2, 2, [5, 6], []),
    ],
)
def test_recorder(monkeypatch, tmp_path, first, count, steps, traced):
    active, found = [], []

    @contextlib.contextmanager
    def recorded(folder):
        active.append(folder)
        yield
        active.remove(folder)

    monkeypatch.setattr(profiler, "recorded", recorded)
    recorder = profiler.Recorder(tmp_path, first, count)
    for step in steps:
        recorder.at(step)
        found += [step] * len(active)
    recorder.close()
    assert found == traced and not active and recorder.done == bool(traced)
