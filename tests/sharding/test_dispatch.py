"""Rows that visit the devices which own what they need: by lines, as on TPUs, it is what the plain exchange does."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from v4_jax.sharding import dispatch
from v4_jax.sharding.dispatch import LANES, Choices, visit
from v4_jax.sharding.mesh import make_mesh

DEVICES, ROWS, TOP, WIDTH = 4, 24, 3, 2 * LANES


def work(x, extra, weight):
    """What places without a row yield is no number."""
    number, scale = extra
    return jnp.where(number[:, None] > 0, jnp.tanh(x) * scale[:, None] * weight, jnp.nan)


def run(x, owner, scale, weights, probe):
    mesh = make_mesh(f"expert={DEVICES}", jax.devices()[:DEVICES])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    def each(x, owner, scale, weights, probe):
        def call(x, scale, weight):
            choices = Choices(owner, (jnp.where(owner < DEVICES, owner + 1, 0), scale))
            return visit(work, WIDTH, ("expert",), ("expert",), x, choices, weight)

        out, pull = jax.vjp(call, x, scale, weights[0])
        of_x, of_scale, of_weight = pull(probe)
        return out, of_x, of_scale, of_weight[None]

    return jax.jit(each)(x, owner, scale, weights, probe)


def test_by_lines_as_plainly(monkeypatch):
    """Several rounds to a crowded device, choices of nobody, and places that come back with no numbers in them."""
    rng = np.random.default_rng(0)
    count = DEVICES * ROWS
    x, probe = (rng.normal(size=(count, WIDTH)).astype(np.float32) for _ in range(2))
    owner = np.where(rng.random((count, TOP)) < 0.6, 2, rng.integers(0, DEVICES + 1, size=(count, TOP)))
    scale = rng.random((count, TOP)).astype(np.float32)
    weights = rng.normal(size=(DEVICES, WIDTH)).astype(np.float32)
    operands = (x, owner.astype(np.int32), scale, weights, probe)
    expected = run(*operands)
    chosen = []

    def by_platform(*operands, default, tpu):
        if tpu.__name__ != "ragged":  # which XLA:CPU has not
            chosen.append(tpu.__name__)
            return tpu(*operands)
        moved, (x, _, got) = default(*operands), operands
        room = x.shape[0] // DEVICES
        there = (jnp.arange(room) < got[:, None]).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(there, moved, jnp.nan)

    monkeypatch.setattr(dispatch, "by_platform", by_platform)
    found = run(*operands)
    assert {"there_by_lines", "back_by_lines"} <= set(chosen)
    for a, b in zip(found, expected, strict=True):
        assert np.isfinite(np.asarray(b)).all()
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_results_are_those_of_no_exchange():
    rng = np.random.default_rng(1)
    count = DEVICES * ROWS
    x = rng.normal(size=(count, WIDTH)).astype(np.float32)
    owner = rng.integers(0, DEVICES + 1, size=(count, TOP)).astype(np.int32)
    scale = rng.random((count, TOP)).astype(np.float32)
    weights = rng.normal(size=(DEVICES, WIDTH)).astype(np.float32)
    expected = np.zeros_like(x)
    for choice in range(TOP):
        real = owner[:, choice] < DEVICES
        weight = weights[np.minimum(owner[:, choice], DEVICES - 1)]
        expected += np.where(real[:, None], np.tanh(x) * scale[:, choice, None] * weight, 0)
    np.testing.assert_allclose(run(x, owner, scale, weights, x)[0], expected, atol=1e-5)
