"""Products that come side by side: the TPU kernel, interpreted, does to each what `norm_rotate` does to it alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels.linear.reference import made_up
from v4_jax.kernels.rotary import parts, reference
from v4_jax.kernels.rotary.reference import Projection, Settle, Steps
from v4_jax.layers.rotary import turn


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("rounding", ["none", "keys"])
@pytest.mark.parametrize("tokens", [1, 6, 32])
def test_each_as_alone(tokens, rounding):
    widths = {"latent": 256, "keys": 512, "values": 384, "weights": 16}
    turned = turn(jnp.arange(tokens, dtype=jnp.int32)[:, None], np.geomspace(1, 1e-3, 32).astype(np.float32))
    thens = {
        "latent": Settle(1 + normal(1, 256) / 8, None, Steps(1e-6)),
        "keys": Settle((1 + normal(2, 512) / 8).astype(jnp.bfloat16), turned, Steps(1e-6, rounding)),
    }
    dtypes = {"values": jnp.float32}
    weights = {name: jax.ShapeDtypeStruct((width, 128), jnp.bfloat16) for name, width in widths.items()}
    projections = [
        Projection(weight, dtypes.get(name, jnp.bfloat16), then=thens.get(name)) for name, weight in weights.items()
    ]
    assert parts.supports(projections)
    sums = normal(3, tokens, sum(made_up(p.weight) for p in projections))
    given = [p.then for p in projections]
    found = parts.settle(sums, projections, given, interpret=True)
    expected = reference.settle(sums, projections, given)
    for one, other, projection in zip(found, expected, projections, strict=True):
        assert one.shape == other.shape == (tokens, projection.weight.shape[0]) and one.dtype == projection.dtype
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        if projection.then is None:
            np.testing.assert_array_equal(one, other)
        elif rounding == "keys":  # a value between two of a coarse format may go either way
            assert np.mean(abs(one - other) > 2.0**-7 * (1 + abs(other))) < 1e-3
        else:
            np.testing.assert_allclose(one, other, rtol=2.0**-7, atol=2.0**-7)


def test_what_is_not_taken():
    odd = Projection(jax.ShapeDtypeStruct((96, 128), jnp.bfloat16), jnp.bfloat16, then=Settle(None, None, Steps(1e-6)))
    assert not parts.supports([odd]) and parts.supports([odd._replace(then=None)])
