"""What counts as a spike of the loss, and how often a run goes back."""

import json
import math

import numpy as np

from v4_jax.train.stability import Recovery, SpikeDetector


def noisy(count, mean=3.0, deviation=0.05):
    return (mean + deviation * np.random.default_rng(0).standard_normal(count)).tolist()


def test_noise_is_no_spike():
    detector = SpikeDetector(6.0, 50)
    assert not any(detector.spiked(loss) for loss in noisy(2000))
    assert abs(detector.mean - 3) < 0.05 and 0.03 < math.sqrt(detector.variance) < 0.07


def test_a_jump_is_a_spike_and_does_not_count():
    detector = SpikeDetector(6.0, 50)
    for loss in noisy(200):
        detector.spiked(loss)
    before = detector.state()
    assert detector.spiked(3.5) and detector.spiked(3.5)
    assert detector.state() == before
    assert not detector.spiked(3.05)


def test_a_falling_loss_is_no_spike():
    detector = SpikeDetector(6.0, 50)
    assert not any(detector.spiked(10 * math.exp(-step / 50) + 2) for step in range(500))


def test_a_still_loss_leaves_room():
    """A loss that hardly moves has hardly a deviation."""
    detector = SpikeDetector(6.0, 10)
    for _ in range(50):
        detector.spiked(2.0)
    assert not detector.spiked(2.01) and detector.spiked(2.02)


def test_nothing_is_a_spike_before_the_window_is_full():
    detector = SpikeDetector(6.0, 10)
    assert not any(detector.spiked(loss) for loss in (3.0,) * 9 + (30.0,))


def test_infinities_always_are():
    for threshold in (None, 6.0):
        detector = SpikeDetector(threshold, 10)
        assert detector.spiked(math.nan) and detector.spiked(math.inf) and not detector.spiked(1e9)


def test_states_are_json():
    detector, recovery = SpikeDetector(6.0, 10), Recovery(5, 2)
    for loss in noisy(20):
        detector.spiked(loss)
    recovery.back(7, 5)
    again, recovered = SpikeDetector(6.0, 10), Recovery(5, 2)
    again.restore(json.loads(json.dumps(detector.state())))
    recovered.restore(json.loads(json.dumps(recovery.state())))
    assert (again, recovered) == (detector, recovery)


def test_recovery():
    """Anticipatory routing stays on for a while beyond the spike; going back without passing it has an end."""
    recovery = Recovery(hold=5, most=2)
    assert not recovery.anticipates(0)
    assert recovery.back(spike=20, to=15)
    assert recovery.anticipates(15) and recovery.anticipates(24) and not recovery.anticipates(25)
    assert recovery.back(spike=18, to=15)  # earlier than the last: not past it
    assert not recovery.back(spike=20, to=15)


def test_a_spike_further_on_counts_anew():
    recovery = Recovery(hold=5, most=1)
    assert recovery.back(20, 15) and recovery.back(21, 15) and recovery.back(40, 30) and not recovery.back(40, 30)
