"""The compressor's step: the TPU kernel, interpreted, against plain JAX, token by token and in short chunks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax import Config
from v4_jax.cache.entries import Entries, projection_width, span
from v4_jax.cache.ring import SPARE, Ring
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels.compressor.tpu import supports
from v4_jax.layers.compressor import Compressor
from v4_jax.layers.linear import project
from v4_jax.layout import Layout
from v4_jax.policy import Policy
from v4_jax.sharding.platform import interpreted

CONFIG = dataclasses.replace(Config.tiny(), hidden_size=32, head_dim=256, qk_rope_head_dim=64)
LAYERS, LAYER, ROWS, PLACES = 2, 1, 3, 32
CHUNKS = [1, 1, 4, 9, 3, 1, 6, 2, 1, 1]


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


class Case:
    """A compressor, its ring and its entries."""

    def __init__(self, ratio, width, policy, *, paged=False, words=False):
        self.ratio, self.policy, self.paged = ratio, Policy.of(policy), paged
        self.module = Compressor(
            config=CONFIG, policy=self.policy, ratio=ratio, width=width, index=width == 128, prefix="x.", name="x"
        )
        dtype = self.policy.compute_dtype
        size = span(ratio) + SPARE
        channels = projection_width(ratio, width)
        self.ring = StoredRows.empty((LAYERS, ROWS, size), channels)
        shape = (LAYERS, 1, ROWS * PLACES) if paged else (LAYERS, ROWS, PLACES)
        form = dict(kind="words") if words else dict(dtype=dtype)
        self.entries = StoredRows.empty(shape, width, **form)
        weights = dict(wkv=random(1, channels // 2, 32), wgate=random(2, channels // 2, 32))
        params = weights | dict(ape=random(3, ratio, channels // 2), norm=1 + random(4, width) / 8)
        self.params = {"params": params}
        pages = jnp.array([[2, 5, 1, -1], [0, 3, 4, 7], [8, 9, 6, 10]], jnp.int32)
        self.table = jnp.pad(pages, ((0, 0), (0, 12)), constant_values=-1) if paged else None

    def run(self, ring, entries, start, y, lengths):
        layout = Layout.of(y.shape[:2], start=start, lengths=lengths).scheduled(CONFIG)
        blocks = Ring(ring, LAYER, start, jnp.float32)
        page = PLACES // 4 if self.paged else 0
        held = Entries(entries, LAYER, self.policy.compute_dtype, table=self.table, page=page)
        assert supports(blocks, held, self.module.width)

        def compress(module, y):
            return module(*project(y, module.projections()), layout, blocks, held)

        found = self.module.apply(self.params, y, method=compress)
        assert found.fresh is None
        return found.open_blocks, found.stored


def rows_of(entries, policy):
    return np.asarray(entries.decode(entries.arrays, jnp.float32), np.float64)


@pytest.mark.parametrize(
    "case",
    [
        dict(ratio=4, width=256, policy="float32"),
        dict(ratio=4, width=128, policy="float32", paged=True),
        dict(ratio=128, width=256, policy="float32"),
        dict(ratio=4, width=256, policy="bfloat16", words=True),
        dict(ratio=4, width=256, policy="bfloat16", words=True, paged=True),
        dict(ratio=4, width=128, policy="released"),
        dict(ratio=128, width=256, policy="released"),
    ],
    ids=lambda case: "-".join(str(value) for value in case.values()),
)
def test_as_plain_jax(case):
    """Rows of different phase and length; blocks that end, and what a ring held before its row began."""
    case = Case(**case)
    dtype = case.policy.compute_dtype
    start = jnp.array([0, case.ratio - 3, 2 * case.ratio + 1], jnp.int32)
    # What a row's ring holds from before the row began must not matter, not even if it is no number.
    known = random(5, *case.ring.arrays[0].shape).at[:, 0].set(jnp.nan)
    states = [(case.ring.replace(arrays=(known,)), case.entries)] * 2
    plain = jax.jit(case.run)

    def kernel(*arguments):
        with interpreted():
            return case.run(*arguments)

    kernel = jax.jit(kernel)
    tolerance = 2e-5 if dtype == jnp.float32 else 2.0**-7
    for number, size in enumerate(CHUNKS):
        y = random(10 + number, ROWS, size, 32).astype(dtype)
        lengths = jnp.array([size, max(size - 1, 1), 0 if number == 3 else size], jnp.int32)
        states = [run(*state, start, y, lengths) for run, state in zip((plain, kernel), states, strict=True)]
        start = start + lengths
    (ring, entries), (own_ring, own_entries) = states
    np.testing.assert_array_equal(np.asarray(own_ring.arrays[0])[LAYER], np.asarray(ring.arrays[0])[LAYER])
    np.testing.assert_array_equal(np.asarray(own_ring.arrays[0])[0], known[0])
    expected, found = rows_of(entries, case.policy), rows_of(own_entries, case.policy)
    assert (expected[0] == 0).all() and (found[0] == 0).all()
    stored = np.any(expected[LAYER] != 0, axis=-1)
    np.testing.assert_array_equal(np.any(found[LAYER] != 0, axis=-1), stored)
    assert stored.sum() >= (1 if case.ratio == 128 else 12)
    different = abs(found - expected) > tolerance * (1 + abs(expected))
    if case.policy.fake_quant:  # a value between two of a coarse format may go either way
        assert different.mean() < 1e-3
    else:
        assert not different.any()
