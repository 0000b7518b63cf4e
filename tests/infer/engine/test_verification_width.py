"""Drafts are verified where they are worth their place, and what that changes is the time alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.infer.engine.test_dspark import guessable
from tests.infer.engine.test_scheduler import served
from tests.infer.engine.test_speculative import assert_same, make_engine, requests
from v4_jax.infer.engine.verification_width import best_width, expected_tokens, step_widths


def test_the_widths_there_are():
    assert step_widths(5, 8, True) == (1, 3, 6) and step_widths(1, 8, True) == (1, 2)
    assert step_widths(5, 1, True) == step_widths(5, 8, False) == (6,) and step_widths(0, 8, False) == (1,)


def test_expected_tokens_by_hand():
    """Chances multiply along a row; rows that do not take part, or take fewer drafts, count for that much less."""
    chances = np.array([[0.5, 0.8, 0.1], [0.9, 0.9, 0.9], [0.2, 0.2, 0.2], [0.7, 0.7, 0.7]])
    confidence = jnp.asarray(np.log(chances / (1 - chances)), jnp.float32)
    going, offered = jnp.asarray([True, True, True, False]), jnp.asarray([3, 1, 0, 3])
    found = expected_tokens(confidence, going, offered, (1, 2, 4))
    np.testing.assert_allclose(found, [3, 3 + 0.5 + 0.9, 3 + 0.5 + 0.9 + 0.4 + 0.04], rtol=1e-6)


@pytest.mark.parametrize(
    ("seconds", "rows", "width"),
    [
        ((1.0, 1.0, 1.0), 3, 2),  # the weights are read anyway
        ((1.0, 1.2, 2.0), 3, 1),
        ((1.0, 3.0, 6.0), 3, 0),  # every place is paid for
        ((1.0, 3.0, 6.0), 1, 2),  # one row alone
    ],
)
def test_the_width_with_most_tokens_a_second(seconds, rows, width):
    going = jnp.arange(3) < rows
    expected = expected_tokens(jnp.zeros((3, 5)), going, jnp.full(3, 5), (1, 3, 6))
    assert int(best_width(expected, jnp.asarray(seconds), going)) == width


@pytest.fixture(scope="module")
def model():
    return guessable(0.03, 0.1)


@pytest.fixture(scope="module")
def engine(model):
    made = make_engine(model, "dspark")
    made.compile()
    return made


def test_costs_are_measured_once(engine):
    seconds = np.asarray(engine._seconds)
    assert seconds.shape == (3,) and (seconds > 0).all() and (seconds < 60).all()


@pytest.mark.parametrize("width", range(3))
def test_the_same_tokens_at_each_width(model, engine, width, monkeypatch):
    """Those of an engine that verifies all drafts, whatever widths its neighbours are worth."""
    expected = served(make_engine(model, "none"), requests())
    prices = np.full(3, 1e30, np.float32)
    prices[width] = 1
    monkeypatch.setattr(engine, "_seconds", jnp.asarray(prices))
    before, steps = engine.acceptance, engine.draft_steps
    assert_same(served(engine, requests()), expected)
    right = sum(after.accepted - one.accepted for after, one in zip(engine.acceptance, before, strict=True))
    # A row's first token comes from its prompt; its last step may yield more than it asked for.
    wanted = sum(one.max_tokens - 1 for one in requests())
    assert wanted <= engine.draft_steps - steps + right <= wanted + len(requests()) * engine.draft_depth
    offered = [after.offered - one.offered for after, one in zip(engine.acceptance, before, strict=True)]
    many, few = offered[0], offered[-1]
    # Rows that run alone at the end verify everything.
    if width == 2:
        assert many == few > 100
    else:
        assert few < 40 and (many == few if width == 0 else many > 60)


def test_confident_drafts_are_verified_and_others_are_not(model, engine, monkeypatch):
    """By the confidence head, where a place costs half of a token."""
    monkeypatch.setattr(engine, "_seconds", jnp.asarray([1.0, 2.0, 3.5]))
    stages, found = model.params["dspark"], []
    for confidence in (-8.0, 8.0):
        # Of the token before the draft, which is one of 16, and of nothing else.
        head = jnp.zeros_like(stages["confidence"]).at[0, -16:].set(confidence)
        monkeypatch.setattr(engine, "_params", model.params | {"dspark": stages | {"confidence": head}})
        before = engine.acceptance[-1].offered
        served(engine, requests())
        found.append(engine.acceptance[-1].offered - before)
    unsure, sure = found
    assert unsure < 40 < 100 < sure
