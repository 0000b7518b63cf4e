"""Hyper-connections against the formulas of the technical report, written out per token with numpy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax import Config
from v4_jax.kernels.hyper_connections.reference import mix_streams, sinkhorn
from v4_jax.layers.hyper_connections import HyperConnection, StreamCollapse, apart, expand, joined, leave, nothing_left

CONFIG = dataclasses.replace(Config.tiny(), hidden_size=16, compress_ratios=(0, 0, 4, 128, 4, 128, 4, 0))


@pytest.fixture(scope="module")
def site():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "fn": jax.random.normal(keys[0], (24, 64)),
        "base": jax.random.normal(keys[1], (24,)),
        "scale": jnp.array([0.7, -0.4, 1.3]),
    }
    streams = jax.random.normal(keys[2], (1, 5, 4, 16))
    return params, streams, jax.random.normal(keys[3], (1, 5, 16))


def by_hand(params, streams, output):
    """Normed collapse and spread of each token in float64."""
    fn, base, scale = (np.asarray(params[name], np.float64) for name in ("fn", "base", "scale"))
    eps, inputs, new = 1e-6, [], []
    for x, z in zip(np.asarray(streams[0], np.float64), np.asarray(output[0], np.float64), strict=True):
        mixes = fn @ x.reshape(-1) / np.sqrt(np.mean(x**2) + eps)
        sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
        pre = sigmoid(mixes[:4] * scale[0] + base[:4]) + eps
        post = 2 * sigmoid(mixes[4:8] * scale[1] + base[4:8])
        comb = (mixes[8:] * scale[2] + base[8:]).reshape(4, 4)
        comb = np.exp(comb - comb.max(1, keepdims=True))
        comb = comb / comb.sum(1, keepdims=True) + eps
        comb = comb / (comb.sum(0, keepdims=True) + eps)
        for _ in range(19):
            comb = comb / (comb.sum(1, keepdims=True) + eps)
            comb = comb / (comb.sum(0, keepdims=True) + eps)
        y = pre @ x
        inputs.append(y / np.sqrt(np.mean(y**2) + eps) * NORM)
        new.append(np.outer(post, z) + np.einsum("jk,jd->kd", comb, x))
    return np.array(inputs), np.array(new)


NORM = np.linspace(0.5, 1.5, 16, dtype=np.float32)


def enter(params, streams, left=None):
    """The streams [B, S, hc * D], the site's input, and its mix."""
    return HyperConnection(config=CONFIG).apply({"params": params}, joined(streams), jnp.asarray(NORM), left)


def test_site_by_hand(site):
    params, streams, output = site
    same, collapsed, mix = enter(params, streams)
    np.testing.assert_array_equal(same, joined(streams))
    expected_input, expected_streams = by_hand(params, streams, output)
    np.testing.assert_allclose(collapsed[0], expected_input, atol=1e-5)
    np.testing.assert_allclose(apart(leave(same, output, mix, CONFIG), 4)[0], expected_streams, atol=1e-5)


def test_two_sites_by_hand(site):
    """The second one writes back what the first left behind."""
    params, streams, output = site
    _, _, mix = enter(params, streams)
    new, collapsed, _ = enter(params, streams, (output, mix))
    _, expected_streams = by_hand(params, streams, output)
    expected_input, _ = by_hand(params, jnp.asarray(expected_streams)[None], output)
    np.testing.assert_allclose(apart(new, 4)[0], expected_streams, atol=1e-5)
    np.testing.assert_allclose(collapsed[0], expected_input, atol=2e-5)


def test_residual_is_not_transposed(site):
    """The mixing matrix is asymmetric, and its transpose would be a different model."""
    params, streams, output = site
    _, _, mix = enter(params, streams)
    _, expected = by_hand(params, streams, output)
    residual = jnp.swapaxes(mix[4:].reshape(4, 4, 1, 5), 0, 1).reshape(16, 1, 5)
    new = leave(joined(streams), output, jnp.concatenate([mix[:4], residual]), CONFIG)
    assert np.abs(apart(new, 4)[0] - expected).max() > 0.05


def test_sinkhorn_is_doubly_stochastic():
    matrix = sinkhorn(jax.random.normal(jax.random.key(1), (4, 4, 2, 100)), 20, 1e-6)
    np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-4)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-3)
    assert matrix.min() > 0


@pytest.mark.parametrize("size", [1.0, 20.0])
def test_sinkhorn_and_its_gradient_are_those_of_the_normalisations(size):
    """Factors are iterated instead of the matrix, the backward pass is written down; also where softmax saturates."""

    def plain(logits):
        matrix = jax.nn.softmax(logits, axis=1) + 1e-6
        matrix = matrix / (matrix.sum(0) + 1e-6)
        for _ in range(19):
            matrix = matrix / (matrix.sum(1, keepdims=True) + 1e-6)
            matrix = matrix / (matrix.sum(0) + 1e-6)
        return matrix

    logits = size * jax.random.normal(jax.random.key(1), (4, 4, 2, 50))
    cotangent = jax.random.normal(jax.random.key(2), logits.shape)
    expected, pull = jax.vjp(plain, logits)
    found, own = jax.vjp(lambda x: sinkhorn(x, 20, 1e-6), logits)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(own(cotangent)[0], pull(cotangent)[0], atol=1e-5)


def test_gradients_of_mixed_streams():
    """Against those of the same sums as one einsum, for both parts and the weights."""
    keys = jax.random.split(jax.random.key(4), 4)
    parts = jax.random.normal(keys[0], (2, 7, 4 * 8)), jax.random.normal(keys[1], (2, 7, 8))
    weights = jax.random.normal(keys[2], (5, 3, 2, 7))

    def plain(parts, weights):
        streams = apart(jnp.concatenate(parts, axis=-1), 5)
        return joined(jnp.einsum("jkbs,bsjd->bskd", weights, streams))

    cotangent = jax.random.normal(keys[3], (2, 7, 3 * 8))
    expected, pull = jax.vjp(plain, parts, weights)
    found, own = jax.vjp(mix_streams, parts, weights)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), own(cotangent), pull(cotangent))


def test_collapse_by_hand(site):
    _, streams, _ = site
    keys = jax.random.split(jax.random.key(2), 2)
    params = {
        "fn": jax.random.normal(keys[0], (4, 64)),
        "base": jax.random.normal(keys[1], (4,)),
        "scale": jnp.array([0.6]),
    }
    out = StreamCollapse(config=CONFIG).apply({"params": params}, joined(streams))
    for x, y in zip(np.asarray(streams[0], np.float64), out[0], strict=True):
        mixes = np.asarray(params["fn"], np.float64) @ x.reshape(-1) / np.sqrt(np.mean(x**2) + 1e-6)
        pre = 1 / (1 + np.exp(-(mixes * 0.6 + np.asarray(params["base"], np.float64)))) + 1e-6
        np.testing.assert_allclose(y, pre @ x, atol=1e-5)


def test_bfloat16_streams_are_mixed_in_float32(site):
    params, streams, output = site
    low = streams.astype(jnp.bfloat16)
    _, collapsed, mix = enter(params, low)
    assert collapsed.dtype == jnp.bfloat16 and mix.dtype == jnp.float32
    exact, _ = by_hand(params, low.astype(jnp.float32), output)
    np.testing.assert_allclose(collapsed[0].astype(jnp.float32), exact, rtol=2**-7, atol=1e-6)


def test_expand_copies():
    x = jnp.arange(6.0).reshape(1, 2, 3)
    np.testing.assert_array_equal(expand(x, 4), joined(np.repeat(np.asarray(x)[:, :, None], 4, axis=2)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_left_leaves_streams_as_they_are(dtype):
    streams = joined(jax.random.normal(jax.random.key(0), (2, 3, 4, 16))).astype(dtype)
    found = leave(streams, *nothing_left(streams, CONFIG), CONFIG)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(streams, np.float32))
