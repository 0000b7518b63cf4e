"""The TPU kernel that chooses experts, interpreted, and its reference; ties fall to the lower number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels import choose
from v4_jax.kernels.router import reference
from v4_jax.kernels.router.tpu import ROWS, best_experts, supports
from v4_jax.sharding.platform import interpreted


def affinities_of(*shape, seed=0):
    return jax.random.uniform(jax.random.key(seed), shape, minval=0.1, maxval=3.0)


def check(affinities, scores, top, factor=1.5):
    chosen, weights = best_experts(affinities, scores, top, factor, interpret=True)
    expected, shares = reference.best_experts(affinities, scores, top, factor)
    np.testing.assert_array_equal(chosen, expected)
    assert chosen.dtype == jnp.int32 and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, shares, rtol=top * 2.0**-23)  # a sum of `top`, a division, a product


@pytest.mark.parametrize("lead", [(1, 1), (3, 5), (ROWS,)])
@pytest.mark.parametrize(("count", "top"), [(128, 1), (256, 6), (384, 8)])
def test_any_shape(lead, count, top):
    affinities = affinities_of(*lead, count)
    check(affinities, affinities + jax.random.normal(jax.random.key(1), (count,)), top)


def test_ties_fall_to_the_lower_number():
    scores = jnp.round(affinities_of(4, 256))
    assert len(np.unique(scores)) < 5
    check(affinities_of(4, 256, seed=1), scores, 6)
    check(affinities_of(1, 256), jnp.zeros((1, 256)), 6)


def test_scores_of_any_sign_and_size():
    affinities = affinities_of(2, 128)
    check(affinities, affinities - 100, 5)
    check(jnp.full((1, 128), jnp.finfo(jnp.float32).tiny), affinities[:1], 6)


def test_chosen_for_few_tokens_on_tpus_and_not_for_gradients():
    affinities, top = affinities_of(2, 3, 128), 4

    def weights(affinities):
        scores = jax.lax.stop_gradient(affinities)
        return choose.best_experts(affinities, scores, top, 1.0)[1]

    def loss(affinities):
        return jnp.sum(weights(affinities) ** 2)

    plain = jax.grad(loss)(affinities)
    with interpreted():
        assert "pallas_call" in str(jax.make_jaxpr(weights)(affinities))
        np.testing.assert_array_equal(jax.grad(loss)(affinities), plain)
    assert (np.count_nonzero(plain, axis=-1) == top).all()


def test_unsupported_is_refused_by_name():
    assert not supports(jnp.zeros((ROWS + 1, 128))) and not supports(jnp.zeros((1, 96)))
    with pytest.raises(NotImplementedError, match=f"at most {ROWS} tokens"):
        best_experts(jnp.zeros((ROWS + 1, 128)), jnp.zeros((ROWS + 1, 128)), 2, 1.0)
