"""Entries that devices share, joined on each."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from v4_jax.cache.entries import Entries
from v4_jax.cache.rows import StoredRows
from v4_jax.sharding.mesh import make_mesh, parse_mesh

DEVICES = 2


@pytest.mark.parametrize("kind", ["plain", "words"])
@pytest.mark.parametrize(("room", "limit"), [(64, 5), (64, 30), (64, 128), (61, 7), (61, 122)])
@pytest.mark.parametrize("paged", [False, True])
def test_joined_entries_by_their_numbers(kind, room, limit, paged):
    """Whether they come in order or a device's after another's, and however many of them travel."""
    mesh = make_mesh(parse_mesh(f"seq={DEVICES}"), jax.devices()[:DEVICES])
    rng = np.random.default_rng(0)
    form = {"kind": kind} if kind == "words" else {"dtype": jnp.dtype("bfloat16")}
    values = jnp.asarray(rng.normal(size=(2, limit, 256)), jnp.bfloat16)
    page, layers = 4 if room % 4 == 0 else 1, 3
    places = (layers, 1, 2 * room) if paged else (layers, 2, room)  # for each of two rows
    table = jnp.asarray(rng.permutation(2 * room // page).reshape(2, -1), jnp.int32) if paged else None
    wanted = jnp.asarray(rng.integers(0, limit, size=(2, 3, 7)), jnp.int32)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P()), out_specs=P("seq"), check_vma=False)
    def run(values, wanted):
        rows = StoredRows.empty(places, 256, **form)
        entries = Entries(rows, jnp.int32(1), jnp.bfloat16, ("seq",), table=table, page=page if paged else 0)
        numbers = jnp.broadcast_to(jnp.arange(limit, dtype=jnp.int32), values.shape[:2])
        joined = entries.write(numbers, values).all_gather(jnp.int32(limit), ("seq",))
        assert joined.count == DEVICES * room and joined.parts == (DEVICES if kind == "words" else 1)
        return joined.gather(wanted)[None], joined.block(jnp.int32(0), 4)[None]

    found, first = run(values, wanted)
    for device in range(DEVICES):
        np.testing.assert_array_equal(found[device], jnp.take_along_axis(values[:, None], wanted[..., None], 2))
        np.testing.assert_array_equal(first[device], values[:, :4])
