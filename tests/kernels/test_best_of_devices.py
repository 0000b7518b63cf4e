"""The choice among candidates of several devices by the TPU kernel, interpreted: against all of them, sorted."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from v4_jax.cache.entries import Entries
from v4_jax.kernels import choose
from v4_jax.kernels.indexer.devices import best_of_devices, chosen, supports
from v4_jax.layers.visible import Visible
from v4_jax.sharding.platform import interpreted

TOP = 128


def candidates(queries, devices, rng, *, levels=None):
    """Scores [queries, devices, K] and local numbers, -1 for some; scores of so many levels tie."""
    shape = (queries, devices, TOP)
    scores = rng.normal(size=shape) if levels is None else rng.integers(0, levels, shape) - levels // 2
    local = np.argsort(rng.random((queries, devices, 3000)), axis=-1)[..., :TOP].astype(np.int32)
    local[rng.random(shape) < 0.1] = -1
    local[0, :, 5:] = -1  # fewer than are wanted
    if queries > 1:
        local[1, 0] = -1  # nothing on a device
    return np.where(local < 0, -np.inf, scores).astype(np.float32), local


def best(scores, numbers):
    """Numbers of the best of each query, as sets."""
    found = []
    for score, number in zip(scores.reshape(len(scores), -1), numbers.reshape(len(numbers), -1), strict=True):
        order = np.lexsort((number, -score))
        found.append(
            {int(n) for n in number[order] if n >= 0}
            if (number >= 0).sum() <= TOP
            else {int(n) for n in number[order][:TOP]}
        )
    return found


@pytest.mark.parametrize("levels", [None, 3, 1], ids=["scores differ", "some tie", "all tie"])
@pytest.mark.parametrize(("queries", "devices"), [(1, 8), (3, 16), (20, 8)])
def test_against_a_sort(queries, devices, levels):
    scores, local = candidates(queries, devices, np.random.default_rng(queries), levels=levels)
    expected = best(scores, np.where(local < 0, -1, local * devices + np.arange(devices)[:, None]))
    everywhere = jnp.moveaxis(jnp.asarray(np.concatenate([scores.view(np.int32), local], axis=-1)), 1, 0)
    run = jax.jit(functools.partial(best_of_devices, top=TOP, interpret=True))
    for index in range(0, devices, 3):
        here, count, *bounds = run(everywhere, index)
        for some, filled, wanted in zip(np.asarray(here), np.asarray(count), expected, strict=True):
            assert filled == len({n for n in wanted if n % devices == index}) and (some[filled:] == -1).all()
            assert {int(n) * devices + index for n in some[:filled]} == {n for n in wanted if n % devices == index}
        for some, wanted in zip(np.asarray(chosen(everywhere, *bounds, TOP)), expected, strict=True):
            assert list(some) == sorted(wanted, reverse=True) + [-1] * (TOP - len(wanted))


@pytest.mark.parametrize(("axes", "top"), [(("x",), 256), (("x", "y"), 128), (("x", "y"), 100), (("x", "y"), 400)])
def test_every_device_gets_its_own(axes, top):
    """Both forms, of entries over one axis of a mesh and over two: what lies here is the same, and so is the choice.

    Scores are whole numbers, exact in both; some are equal. Of 400 that are wanted a device has 300.
    """
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    devices = 4 * len(axes)
    assert supports(top, devices)
    rng, rows, here = np.random.default_rng(1), 3, 300
    queries, keys = (
        jnp.asarray(rng.integers(-2, 3, (rows, size, 128)), jnp.float32) for size in (2 * 16, devices * here)
    )
    weights = jnp.asarray(rng.integers(0, 4, (rows, 2, 16)), jnp.float32)
    high = jnp.asarray([[here, here - 1], [7, 0], [250, 1]], jnp.int32)

    def call(keys):
        visible = Visible(jnp.zeros_like(high), high, jnp.int32(0), jnp.max(high))
        entries = Entries.uncached(keys).replace(axes=axes)
        found = choose.best_of_devices(queries.reshape(rows, 2, 16, 128), weights, entries, visible, top=top)
        return tuple(x[None] for x in found)

    def run():
        split = jax.shard_map(call, mesh=mesh, in_specs=P(None, axes), out_specs=P(axes), check_vma=False)
        return [np.asarray(x) for x in jax.jit(split)(keys)]

    plain = run()
    with interpreted():
        by_kernel = run()
    for found in (plain, by_kernel):
        assert (found[0] == found[0][:1]).all() and (np.sum(found[1] >= 0, axis=-1) == found[2]).all()
    np.testing.assert_array_equal(np.sort(by_kernel[0]), np.sort(plain[0]))
    np.testing.assert_array_equal(np.sort(by_kernel[1]), np.sort(plain[1]))
    np.testing.assert_array_equal(by_kernel[2], plain[2])
    assert plain[2].sum(axis=0)[0, 0] == top and plain[2].sum(axis=0)[1].tolist() == [7 * devices, 0]
