"""The form of the platform that a program is compiled for runs; all forms give the reference's numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels import choose
from v4_jax.kernels.choose import forms
from v4_jax.kernels.indexer import cpu as indexer_cpu
from v4_jax.kernels.indexer import reference as indexer
from v4_jax.kernels.linear import cpu as linear_cpu
from v4_jax.kernels.linear import reference as linear
from v4_jax.sharding.platform import by_platform

B, Q, H, K, C = 2, 5, 3, 7, 6


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lowered_for(platform: str, function, *operands) -> str:
    return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def test_the_programs_platform_decides():
    """A CPU host that compiles for TPUs takes the TPU's form; a platform without one takes the default."""

    def chosen(x):
        return by_platform(x, default=jnp.sin, cpu=jnp.cos, tpu=jnp.tanh)

    x = random(0, 3)
    np.testing.assert_allclose(jax.jit(chosen)(x), np.cos(x), rtol=1e-6)
    for platform, own in (("cpu", "cosine"), ("tpu", "tanh"), ("cuda", "sine")):
        text = lowered_for(platform, chosen, x)
        assert [name for name in ("stablehlo.cosine", "stablehlo.tanh", "stablehlo.sine") if f"{name} " in text] == [
            f"stablehlo.{own}"
        ]


def test_gradients_are_those_of_the_platforms_form():
    chosen = forms.with_gradients(lambda x: 2 * x, cpu=lambda operands, gradient: (3 * gradient,))
    assert jax.value_and_grad(lambda x: chosen(x))(1.0) == (2, 3)
    kernel = forms.without_gradients(lambda x: 2 * x, cpu=lambda x: 3 * x)
    assert kernel(1.0) == 3 and jax.value_and_grad(lambda x: kernel(x))(1.0) == (2, 2)


@pytest.mark.parametrize("form", [indexer.index_scores, indexer_cpu.index_scores, choose.index_scores])
@pytest.mark.parametrize("own", [False, True])
def test_index_scores(form, own):
    """Values and gradients against sums written out."""
    queries, weights = random(1, B, Q, H, C), random(2, B, Q, H)
    keys, probe = random(3, *((B, Q, K, C) if own else (B, K, C))), random(4, B, Q, K)
    each = keys if own else np.broadcast_to(keys[:, None], (B, Q, K, C))
    per_head = np.sum(queries[:, :, :, None] * each[:, :, None], -1)
    np.testing.assert_allclose(
        form(queries, weights, keys), np.sum(np.maximum(per_head, 0) * weights[..., None], 2), atol=1e-5
    )
    pull = jax.jit(lambda *operands: jax.vjp(form, *operands)[1](probe))
    of_queries, of_weights, of_keys = pull(queries, weights, keys)
    through = (per_head > 0) * weights[..., None] * probe[:, :, None]  # [B, Q, H, K]
    np.testing.assert_allclose(of_weights, np.sum(np.maximum(per_head, 0) * probe[:, :, None], -1), atol=1e-5)
    np.testing.assert_allclose(of_queries, np.einsum("bqhk,bqkc->bqhc", through, each), atol=1e-5)
    expected = np.einsum("bqhk,bqhc->bqkc", through, queries)
    np.testing.assert_allclose(of_keys, expected if own else expected.sum(1), atol=1e-5)


@pytest.mark.parametrize("form", [linear.matmul, choose.matmul])
def test_matmul(form):
    x, weight, probe = random(1, 4, C), random(2, K, C), random(3, 4, K)
    np.testing.assert_allclose(form(x, weight, jnp.float32), x @ weight.T, atol=1e-5)
    gradients = jax.vjp(lambda x, weight: form(x, weight, jnp.float32), x, weight)[1](probe)
    for of_x, of_weight in (gradients, linear_cpu.matmul_gradients((x, weight), probe, jnp.float32)):
        np.testing.assert_allclose(of_x, probe @ weight, atol=1e-5)
        np.testing.assert_allclose(of_weight, probe.T @ x, atol=1e-5)
