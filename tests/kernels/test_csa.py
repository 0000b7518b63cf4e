"""Attention over picked entries by the TPU kernel, interpreted, and over gathered copies: against float64."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.cache.entries import Entries
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels import choose
from v4_jax.kernels.csa.tpu import MASKED, attend_picked, supports
from v4_jax.layers.entry_attention import attend_copies
from v4_jax.layers.partials import separate
from v4_jax.sharding.platform import interpreted


class Case(NamedTuple):
    """Queries [rows, queries, heads, channels] over `top` of some entries each."""

    rows: int
    queries: int
    heads: int
    channels: int
    entries: int
    top: int
    paged: bool = False


CASES = {
    "decode": Case(2, 1, 16, 512, 320, 256),
    "a block and more": Case(1, 19, 8, 256, 640, 300, paged=True),
    "fewer picks than are fetched at once": Case(1, 3, 16, 512, 96, 8, paged=True),
}


@functools.partial(jax.jit, static_argnames="how")
def run(queries, entries, local, how):
    if how == "kernel":
        return attend_picked(queries, entries, local, interpret=True)
    return tuple(attend_copies(queries, entries, local))


def picks(case, rng):
    """[B, Q, K] entries of each query, fewer than `top` of some."""
    shape = (case.rows, case.queries)
    local = np.stack([rng.permutation(case.entries)[: case.top] for _ in range(case.rows * case.queries)])
    local = local.reshape(*shape, -1).astype(np.int32)
    local[rng.random(local.shape) < 0.2] = -1  # anywhere, as in decisions that are replayed,
    local[rng.random(shape) < 0.5, case.top // 4 :] = -1  # but mostly after the last
    return local


def inputs(case, seed=0):
    rng = np.random.default_rng(seed)
    rows = StoredRows.empty((3, 1 if case.paged else case.rows, case.entries), case.channels, kind="words")
    held = jnp.asarray(rng.normal(size=(*rows.shape[1:], case.channels)), jnp.bfloat16)
    everywhere = jnp.broadcast_to(jnp.arange(case.entries), held.shape[:2])
    rows = rows.write(1, jnp.arange(held.shape[0])[:, None], everywhere, held)
    table = jnp.asarray(rng.permutation(case.entries // 32)[None], jnp.int32) if case.paged else None
    entries = Entries(rows, jnp.int32(1), jnp.bfloat16, table=table, page=32 if case.paged else 0)
    local = picks(case, rng)
    local[0, 0] = -1
    queries = jnp.asarray(2 * rng.normal(size=(*local.shape[:2], case.heads, case.channels)), jnp.bfloat16)
    return queries, entries, jnp.asarray(local)


@pytest.mark.parametrize("how", ["kernel", "gathered copies"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_softmax_and_sums(case, how):
    """Float32 sums of products of bfloat16, to which shares are rounded too: half a step is 2^-8 of the value."""
    queries, entries, local = inputs(case)
    maximum, total, weighted = (np.asarray(x, np.float64) for x in run(queries, entries, local, how))
    keys = np.asarray(entries.gather(local), np.float64)
    logits = np.einsum("bqhc,bqkc->bqhk", np.asarray(queries, np.float64), keys) * case.channels**-0.5
    mask = np.asarray(local >= 0)[:, :, None]
    logits = np.where(mask, logits, -np.inf)
    nothing = ~mask.any(-1)
    largest = np.where(nothing, MASKED, logits.max(-1))
    shares = np.where(mask, np.exp(logits - largest[..., None]), 0.0)
    np.testing.assert_allclose(maximum, largest, atol=1e-4, rtol=1e-6)
    np.testing.assert_allclose(total, shares.sum(-1), rtol=1e-4)
    sizes = np.einsum("bqhk,bqkc->bqhc", shares, abs(keys))
    expected = np.einsum("bqhk,bqkc->bqhc", shares, keys)
    assert (abs(weighted - expected) <= (2.0**-8 + 2e-4) * sizes).all()
    assert (total[0, 0] == 0).all() and (weighted[0, 0] == 0).all()


def test_words_read_back_as_bfloat16():
    rows = StoredRows.empty((2, 1, 4), 512, kind="words")
    values = np.random.default_rng(0).normal(size=(1, 3, 512)).astype(np.float32)
    values[0, 0, :4] = [np.inf, -0.0, 3e38, -1e-40]
    rows = rows.write(1, 0, jnp.array([[2, 0, 3]]), jnp.asarray(values))
    assert rows.arrays[0].shape == (2, 1, 4, 2, 128) and rows.nbytes == 2 * 4 * 1024
    found = rows.read(1, 0, jnp.array([[2, 0, 3]]), jnp.float32)
    np.testing.assert_array_equal(found, np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32))
    np.testing.assert_array_equal(rows.read(0, 0, jnp.array([[0, 1]]), jnp.float32), 0)


def test_gradients_and_what_is_unsupported_take_copies():
    queries, entries, local = inputs(CASES["fewer picks than are fetched at once"])

    def loss(queries):
        return jnp.sum(choose.attend_picked(attend_copies, queries, entries, local)[2])

    plain = jax.grad(lambda queries: jnp.sum(attend_copies(queries, entries, local).weighted))(queries)
    with interpreted():
        np.testing.assert_array_equal(jax.grad(loss)(queries), plain)
    few = queries[:, :, :4]
    assert supports(queries, entries) and not supports(few, entries)
    assert not supports(queries, Entries.uncached(entries.block(0, 96)))
    with pytest.raises(NotImplementedError, match="heads in multiples of 8 up to 128"):
        attend_picked(few, entries, local)
    with interpreted():
        found = choose.attend_picked(attend_copies, few, entries, local)
    np.testing.assert_array_equal(found[2], attend_copies(few, entries, local).weighted)


def test_all_in_one_array():
    """As devices hand it on: the same numbers."""
    queries, entries, local = inputs(CASES["a block and more"])
    packed = attend_picked(queries, entries, local, together=True, interpret=True)
    for found, expected in zip(separate([packed])[0], run(queries, entries, local, "kernel"), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_sums_rounded_at_the_end():
    """As training keeps them: what is added up is the same."""
    queries, entries, local = inputs(CASES["a block and more"])
    *exact, sums = run(queries, entries, local, "kernel")
    found = attend_picked(queries, entries, local, rounded=True, interpret=True)
    for a, b in zip(found, (*exact, sums.astype(jnp.bfloat16)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
