"""Rows that visit the devices which own what they need."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from v4_jax.sharding.dispatch import LANES, Choices, visit
from v4_jax.sharding.mesh import make_mesh

DEVICES, ROWS, TOP, WIDTH = 4, 24, 3, 2 * LANES


def work(x, extra, weight, fixed):
    """What places without a row yield is no number."""
    number, scale = extra
    return jnp.where(number[:, None] > 0, jnp.tanh(x) * scale[:, None] * weight * fixed, jnp.nan)


def run(x, owner, scale, weights, probe):
    mesh = make_mesh(f"expert={DEVICES}", jax.devices()[:DEVICES])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    def each(x, owner, scale, weights, probe):
        def call(x, scale, weight):
            choices = Choices(owner, (jnp.where(owner < DEVICES, owner + 1, 0), scale))
            return visit(work, WIDTH, ("expert",), ("expert",), x, choices, weight, jnp.float32(2))

        out, pull = jax.vjp(call, x, scale, weights[0])
        of_x, of_scale, of_weight = pull(probe)
        return out, of_x, of_scale, of_weight[None]

    return jax.jit(each)(x, owner, scale, weights, probe)


def test_results_and_gradients_are_those_of_no_exchange():
    """Several rounds to a crowded device, and choices of nobody."""
    rng = np.random.default_rng(0)
    count = DEVICES * ROWS
    x, probe = (rng.normal(size=(count, WIDTH)).astype(np.float32) for _ in range(2))
    owner = np.where(rng.random((count, TOP)) < 0.6, 2, rng.integers(0, DEVICES + 1, size=(count, TOP)))
    owner = owner.astype(np.int32)
    scale = rng.random((count, TOP)).astype(np.float32)
    weights = rng.normal(size=(DEVICES, WIDTH)).astype(np.float32)

    def here(x, scale, weights):
        found = 2 * jnp.tanh(x)[:, None] * scale[..., None] * weights[np.minimum(owner, DEVICES - 1)]
        return jnp.sum(jnp.where(owner[..., None] < DEVICES, found, 0), axis=1)

    out, pull = jax.vjp(here, x, scale, weights)
    for found, expected in zip(run(x, owner, scale, weights, probe), (out, *pull(probe)), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
