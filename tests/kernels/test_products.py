"""Products with keys: shared or each query's own, and their gradients, by heads one by one or as products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels.attention.cpu import FEW_HEADS
from v4_jax.kernels.choose import products, weighted

B, Q, K, C = 2, 5, 7, 6


def _random(seed: int, *shape: int, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("heads", [1, FEW_HEADS, FEW_HEADS + 1])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_plain_sums(heads, own, dtype):
    keys = _random(0, *((B, Q, K, C) if own else (B, K, C)), dtype=dtype)
    queries, probe = _random(1, B, Q, heads, C, dtype=dtype), _random(2, B, Q, heads, K)
    shares, other = _random(3, B, Q, heads, K), _random(4, B, Q, heads, C)

    def ours(queries, shares, keys):
        return jnp.sum(products(queries, keys) * probe) + jnp.sum(weighted(shares, keys) * other)

    def plain(queries, shares, keys):
        queries, keys = queries.astype(jnp.float32), keys.astype(jnp.float32)
        shares = shares.astype(dtype).astype(jnp.float32)
        keys = keys if own else keys[:, None]
        logits = jnp.sum(queries[:, :, :, None] * keys[:, :, None], -1)
        sums = jnp.sum(shares[..., None] * keys[:, :, None], 3)
        return jnp.sum(logits * probe) + jnp.sum(sums * other)

    found, expected = (jax.value_and_grad(f, argnums=(0, 1, 2))(queries, shares, keys) for f in (ours, plain))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())
