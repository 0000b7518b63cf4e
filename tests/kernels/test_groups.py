"""Grouped work equals the plain loop over groups, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels.grouped_matmul.groups import map_groups
from v4_jax.layers.linear import linear
from v4_jax.number_formats import E2M1, dequantise, quantise

SIZES = [
    [5, 0, 1, 7, 0, 3],
    [0, 0, 16, 0, 0, 0],
    [0, 0, 0, 0, 0, 0],
    [300, 129, 0, 128, 127, 1],
    [1, 1, 1, 1, 1, 1],
]


def gated(rows, weight):
    x, scale = rows
    return jnp.tanh(linear(x, weight, jnp.float32)) * scale[:, None]


def case(sizes, extra=4):
    keys = jax.random.split(jax.random.key(sum(sizes)), 3)
    count = sum(sizes) + extra
    rows = (jax.random.normal(keys[0], (count, 12)), jax.random.normal(keys[1], (count,)))
    return rows, jax.random.normal(keys[2], (len(sizes), 9, 12)), jnp.array(sizes, jnp.int32)


def plain(rows, weights, sizes):
    out, first = [], 0
    for group, size in enumerate(sizes):
        part = jax.tree.map(lambda x, first=first, size=size: x[first : first + size], rows)
        out.append(gated(part, weights[group]))
        first += size
    out.append(jnp.zeros((rows[0].shape[0] - first, weights.shape[1])))
    return jnp.concatenate(out)


@pytest.mark.parametrize("sizes", SIZES)
def test_forward(sizes):
    rows, weights, counts = case(sizes)
    out = map_groups(gated, rows, weights, counts, width=9)
    np.testing.assert_allclose(out, plain(rows, weights, sizes), atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_backward(sizes):
    rows, weights, counts = case(sizes)
    probe = jax.random.normal(jax.random.key(9), (rows[0].shape[0], 9))
    found = jax.grad(lambda r, w: jnp.sum(map_groups(gated, r, w, counts, width=9) * probe), (0, 1))(rows, weights)
    expected = jax.grad(lambda r, w: jnp.sum(plain(r, w, sizes) * probe), (0, 1))(rows, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_stacked_layers_read_the_named_layer():
    rows, weights, counts = case([3, 0, 4])
    stack = jnp.stack([weights * 0, weights, weights * 2])
    for layer, scale in ((0, 0), (1, 1), (2, 2)):
        out = map_groups(gated, rows, stack, counts, layer=jnp.int32(layer), width=9)
        np.testing.assert_allclose(out, plain(rows, weights * scale, [3, 0, 4]), atol=1e-5)


def test_quantised_groups():
    rows, _, counts = case([3, 0, 4])
    rows = (jax.random.normal(jax.random.key(1), (11, 64)), rows[1])
    weights = quantise(jax.random.normal(jax.random.key(2), (3, 9, 64)), E2M1)
    out = map_groups(gated, rows, weights, counts, width=9)
    np.testing.assert_allclose(out, plain(rows, dequantise(weights, jnp.float32), [3, 0, 4]), atol=1e-5)
