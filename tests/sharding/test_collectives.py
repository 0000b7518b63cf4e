"""Shards of many devices, joined and added up in steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from v4_jax.sharding import collectives
from v4_jax.sharding.mesh import make_mesh, parse_mesh


@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        ("expert=8", ("expert",)),
        ("expert=6", ("expert",)),
        ("expert=7", ("expert",)),  # no groups
        ("data=2,expert=4", ("data", "expert")),
        ("data=4,expert=2", ("expert", "data")),
        ("data=8", ("data", "seq")),
        ("data=2,seq=2,expert=2", ("data", "expert")),
    ],
)
@pytest.mark.parametrize("dimension", [0, -1])
def test_steps_are_one_exchange(mesh, axes, at_once, dimension, monkeypatch):
    """The same shards in the same places, both ways, and the same gradients."""
    sizes = parse_mesh(mesh)
    devices = int(np.prod(list(sizes.values())))
    mesh = make_mesh(sizes, jax.devices()[:devices])
    shape = [3, 5, 3]
    shape[dimension] = 2 * devices
    x = jnp.asarray(np.random.default_rng(0).integers(-9, 9, shape), jnp.float32)
    spec = P(*[axes if d == dimension % 3 else None for d in range(3)])

    def both(x):
        weigh = jnp.arange(1.0, 1 + devices)[collectives.index(axes)]
        joined = collectives.all_gather(x, axes, dimension)
        return joined[None], collectives.reduce_scatter(joined * weigh, axes, dimension)

    def run(x):
        call = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=(P(axes), spec), check_vma=False)
        return call(x)

    def found():
        out = run(x)
        return out, jax.grad(lambda x: sum(jnp.sum(y**2) for y in run(x)))(x)

    expected = found()
    monkeypatch.setattr(collectives, "AT_ONCE", at_once)
    jax.tree.map(np.testing.assert_array_equal, found(), expected)


def test_no_more_devices_than_said_join_at_once(monkeypatch):
    mesh = make_mesh(parse_mesh("expert=8"), jax.devices()[:8])
    monkeypatch.setattr(collectives, "AT_ONCE", 4)

    def run(x):
        return collectives.reduce_scatter(collectives.all_gather(x, ("expert",), 0), ("expert",), 0)

    call = jax.shard_map(run, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    text = str(jax.make_jaxpr(call)(jnp.zeros(16)))
    assert text.count("all_gather[") == text.count("reduce_scatter[") == 2
    assert text.count("axis_index_groups=None") == 0
