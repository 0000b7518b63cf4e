"""Texts for recall: what is asked was told, once, where it is said to be."""

import re

import numpy as np
import pytest

from v4_jax.infer.evaluation import recall


def told(text, letters=2):
    return re.findall(rf"\b([A-Z]{{{letters}}})(\d\d) ", text)


@pytest.mark.parametrize(("length", "depth"), [(200, 0.0), (1000, 0.5), (5000, 0.93), (300, 1.0)])
def test_question(length, depth):
    for seed in range(20):
        asked = recall.question(np.random.default_rng(seed), length, depth, told=8)
        key, value = asked.record
        assert len(asked.text) == length and asked.text.endswith(key)
        assert asked.text[length - asked.distance :].startswith(value) and asked.text[
            : length - asked.distance
        ].endswith(key)
        found = told(asked.text)
        assert len(found) == 8 == len({key for key, _ in found}) and (key, value) in found
        position = length - asked.distance - len(key)
        assert position == pytest.approx(depth * (length - 7), abs=1)


@pytest.mark.parametrize("letters", [1, 2, 3])
def test_lesson(letters):
    """Every record is told before it is told again, always with the same value."""
    for seed in range(20):
        text = recall.lesson(np.random.default_rng(seed), 400, told=6, asked=20, letters=letters)
        found = told(text, letters)
        assert len(text) == 400 and len(found) == 26 and len(set(found)) == 6 == len({key for key, _ in found})


def test_texts_follow_the_seed():
    first, again, other = (recall.lesson(np.random.default_rng(s), 300, told=3, asked=5) for s in (1, 1, 2))
    assert first == again != other


def test_values_are_spread():
    """Nothing but the text tells a value: all are as likely."""
    rng = np.random.default_rng(0)
    values = [int(recall.question(rng, 60, 0.5, told=1).record.value) for _ in range(3000)]
    counts = np.bincount(values, minlength=recall.VALUES)
    assert counts.min() > 5 and counts.max() < 65


def test_what_cannot_be():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="30 records need more than the 26 keys of 1 letters"):
        recall.records(rng, 30, 1)
    with pytest.raises(ValueError, match="12 records take 60 characters; expected at most 50"):
        recall.lesson(rng, 50, told=4, asked=8)
