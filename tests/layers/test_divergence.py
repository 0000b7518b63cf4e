"""Reverse divergence from a teacher, block by block, against a plain float64 computation and its slopes; on meshes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import OnMesh, three
from v4_jax.layers import head as blocks
from v4_jax.layers.divergence import FullTeacher, TopTeacher, reverse_divergence, top_scores

TOKENS, WIDTH, OTHER, VOCABULARY = 37, 16, 24, 50


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def coarse(scores, ids):
    """Log-probabilities [T, k + 1] of some tokens and of all others together."""
    others = np.exp(scores)
    np.put_along_axis(others, ids, 0, 1)
    rest = np.log(np.maximum(others.sum(1, keepdims=True), 1e-300))
    return np.concatenate([np.take_along_axis(scores, ids, 1), rest], 1)


def plain(hidden, table, weights, theirs, ids=None):
    """The weighted divergence, over arrays of [tokens, vocabulary]."""
    ours = log_softmax(hidden @ table.T)
    if ids is not None:
        ours = coarse(ours, ids)
    return np.sum(weights * np.sum(np.exp(ours) * (ours - theirs), axis=1))


@pytest.fixture(scope="module")
def inputs():
    """Student's hidden states and head, weights, teacher's hidden states and head: float64."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=TOKENS)
    weights[::5] = 0
    sizes = (TOKENS, WIDTH), (VOCABULARY, WIDTH), (TOKENS, OTHER), (VOCABULARY, OTHER)
    hidden, table, other, others = (rng.normal(size=size) for size in sizes)
    hidden[3] *= 20  # as good as sure of one token
    return hidden, table, weights, other, others


@pytest.mark.parametrize("k", [None, 4, VOCABULARY])
@pytest.mark.parametrize("tokens", [8, 1000])
def test_against_plain_float64(inputs, monkeypatch, tokens, k):
    """The sum, and its slope along directions in which everything changes at once."""
    monkeypatch.setattr(blocks, "LOGITS", tokens * VOCABULARY)
    hidden, table, weights, other, others = inputs
    single = [jnp.asarray(x, jnp.float32) for x in inputs]
    theirs, ids = log_softmax(other @ others.T), None
    if k is None:
        teacher = FullTeacher(*single[3:])
    else:
        ids, scores = (np.asarray(x) for x in top_scores(*single[3:], k))
        np.testing.assert_array_equal(ids, np.argsort(-theirs, axis=1)[:, :k])
        theirs = coarse(theirs, ids)
        if k < VOCABULARY:
            np.testing.assert_allclose(scores, theirs, atol=1e-4)
        teacher = TopTeacher(jnp.asarray(ids), jnp.asarray(scores))
    of = functools.partial(plain, weights=weights, theirs=theirs, ids=ids)
    program = jax.jit(
        jax.value_and_grad(lambda h, t, teacher, w: 0.7 * reverse_divergence(h, t, teacher, w), argnums=(0, 1))
    )
    found, gradients = program(*single[:2], teacher, single[2])
    np.testing.assert_allclose(found, 0.7 * of(hidden, table), rtol=2e-5)
    np.testing.assert_allclose(reverse_divergence(*single[:2], teacher, single[2]), found / 0.7, rtol=1e-5)
    for seed in range(8):
        rng, step = np.random.default_rng(seed), 1e-5
        towards = [rng.normal(size=x.shape) for x in (hidden, table)]
        ends = [of(*(x + sign * step * to for x, to in zip((hidden, table), towards, strict=True))) for sign in (1, -1)]
        slope = 0.7 * (ends[0] - ends[1]) / (2 * step)
        parts = [np.sum(np.asarray(g, np.float64) * to) for g, to in zip(gradients, towards, strict=True)]
        size = sum(float(np.linalg.norm(g)) for g in gradients)
        assert abs(sum(parts) - slope) < 1e-5 * size


def test_all_tokens_are_as_good_as_the_whole_distribution(inputs):
    single = [jnp.asarray(x, jnp.float32) for x in inputs]
    full = reverse_divergence(*single[:2], FullTeacher(*single[3:]), single[2])
    top = reverse_divergence(*single[:2], TopTeacher(*top_scores(*single[3:], VOCABULARY)), single[2])
    np.testing.assert_allclose(top, full, rtol=1e-5)
    own = reverse_divergence(*single[:2], FullTeacher(*single[:2]), jnp.ones(TOKENS))
    np.testing.assert_allclose(own, 0, atol=1e-4)


def test_no_array_of_tokens_and_vocabulary(inputs, monkeypatch):
    """Of neither model: the largest arrays are those of one block."""
    monkeypatch.setattr(blocks, "LOGITS", 8 * VOCABULARY)
    hidden, table, weights, *teacher = (jnp.asarray(x, jnp.float32) for x in inputs)
    gradient = jax.jit(jax.value_and_grad(lambda *x: reverse_divergence(*x), argnums=(0, 1)))
    program = gradient.lower(hidden, table, FullTeacher(*teacher), weights).as_text()
    assert f"tensor<{VOCABULARY}x8xf32>" in program
    shapes = (TOKENS, VOCABULARY), (VOCABULARY, TOKENS), (5, VOCABULARY, 8), (5, 8, VOCABULARY)
    for shape in shapes:
        assert f"tensor<{'x'.join(map(str, shape))}x" not in program


@pytest.mark.parametrize("kind", ["full", "top", "scores"])
def test_on_a_mesh(kind):
    """Vocabulary, rows and the heads' widths split: the same sum, the same gradient of everything; of scores, too."""
    tiny, mesh = three(), OnMesh(three(), "data=2,expert=2,tensor=2", "train")
    rng = np.random.default_rng(1)
    c = tiny.config
    streams = jnp.asarray(rng.normal(size=(4, 8, c.hc_mult, c.hidden_size)), jnp.float32)
    weights = jnp.asarray(rng.uniform(size=(4, 8)), jnp.float32)
    hidden, head = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((4, 8, 24), (c.vocab_size, 24)))
    targets = jnp.asarray(rng.integers(0, c.vocab_size, (4, 8)), jnp.int32)
    found = []
    for model, params in ((tiny.model, tiny.params), (mesh.model, mesh.params)):
        call = functools.partial(jax.jit(model.apply, static_argnames=("k", "method")), {"params": params})
        if kind == "full":
            teacher = {"hidden": hidden, "head": head}
        else:
            teacher = dict(zip(("ids", "scores"), call(streams[::-1], k=5, method="top_scores"), strict=True))

        def loss(params, streams, model=model, teacher=teacher):
            if kind == "scores":
                scores = model.apply({"params": params}, streams, targets, method="log_probabilities")
                return jnp.sum(weights * jnp.exp(scores / 4))
            return model.apply({"params": params}, streams, weights, **teacher, method="divergence")

        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), allow_int=True))(params, streams)
        found.append((value, gradients[0]["head"], gradients[0]["norm"], gradients[1], teacher))
    assert float(found[0][0]) > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *found)
