"""Rows that visit the devices which own what they need."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from v4_jax.sharding import dispatch
from v4_jax.sharding.dispatch import Choices, capacity, visit
from v4_jax.sharding.exchange import LANES
from v4_jax.sharding.mesh import make_mesh
from v4_jax.sharding.platform import interpreted

DEVICES, OWN, ROWS, TOP, WIDTH = 4, 3, 24, 3, 2 * LANES
GROUPS = DEVICES * OWN


def work(x, extra, sizes, weights, fixed):
    """Rows come as tiles, sorted by group; what lies beyond them is no number."""
    scale = extra["scale"] * extra["sign"]
    tiles, x = x.shape, x.reshape(len(x), -1)
    group = jnp.sum(jnp.cumsum(sizes) <= jnp.arange(len(x))[:, None], axis=1)
    found = jnp.tanh(x) * scale[:, None] * weights[jnp.minimum(group, OWN - 1)] * fixed
    return jnp.where((group < OWN)[:, None], found, jnp.nan).reshape(tiles)


def run(x, group, scale, weights, probe):
    mesh = make_mesh(f"expert={DEVICES}", jax.devices()[:DEVICES])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    def each(x, group, scale, weights, probe):
        sign = jnp.where(group % 2, 1, -1)  # which has no gradient

        def call(x, scale, weights):
            choices = Choices(group, {"scale": scale, "sign": sign})
            return visit(work, WIDTH, OWN, ("expert",), ("expert",), x, choices, weights, jnp.float32(2))

        out, pull = jax.vjp(call, x, scale, weights)
        return out, *pull(probe)

    return jax.jit(each)(x, group, scale, weights, probe)


@pytest.mark.parametrize(
    ("context", "waves"),
    [(contextlib.nullcontext, 1), (interpreted, 1), (interpreted, 2)],
    ids=["one loop", "first before it", "two waves"],
)
@pytest.mark.parametrize("chosen", [True, False])
def test_results_and_gradients_are_those_of_no_exchange(context, waves, chosen, monkeypatch):
    """Several rounds to a crowded device, groups that a round cuts, and choices of nobody, or of nobody at all; with
    all rounds in a loop, with the first before it, and with that in two waves."""
    monkeypatch.setattr(dispatch, "MANY", ROWS * TOP // OWN // waves)
    rng = np.random.default_rng(0)
    count = DEVICES * ROWS
    x, probe = (rng.normal(size=(count, WIDTH)).astype(np.float32) for _ in range(2))
    crowded = rng.integers(2 * OWN, 3 * OWN, size=(count, TOP))
    group = np.where(rng.random((count, TOP)) < 0.6, crowded, rng.integers(0, GROUPS + 2, size=(count, TOP)))
    group = np.minimum(group, GROUPS).astype(np.int32) if chosen else np.full((count, TOP), GROUPS, np.int32)
    assert not chosen or np.sum((group >= 2 * OWN) & (group < 3 * OWN)) > capacity(ROWS * TOP, DEVICES)
    scale = rng.random((count, TOP)).astype(np.float32)
    weights = rng.normal(size=(GROUPS, WIDTH)).astype(np.float32)

    def here(x, scale, weights):
        signed = scale * np.where(group % 2, 1, -1)
        found = 2 * jnp.tanh(x)[:, None] * signed[..., None] * weights[np.minimum(group, GROUPS - 1)]
        return jnp.sum(jnp.where(group[..., None] < GROUPS, found, 0), axis=1)

    out, pull = jax.vjp(here, x, scale, weights)
    with context():
        results = run(x, group, scale, weights, probe)
    for found, expected in zip(results, (out, *pull(probe)), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
