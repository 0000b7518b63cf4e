"""Attention over window and entries by the TPU kernel, interpreted, and by plain JAX: against float64."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.cache.entries import Entries
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels.attention.tpu import MASKED, supports, window_attention
from v4_jax.kernels.csa.hidden import hide, reference
from v4_jax.kernels.indexer.marks import Marks, numbers_of
from v4_jax.layers.partial_softmax import finish, merge
from v4_jax.layers.partials import Partial, separate
from v4_jax.layers.visible import Visible
from v4_jax.layers.window_attention import attend_in_parts, attend_window
from v4_jax.sharding.platform import interpreted

C = 128


class Case(NamedTuple):
    """Queries [rows, queries, heads, C] over a window of `past` keys and their own, and over entries."""

    rows: int
    queries: int
    heads: int
    past: int | None = None
    entries: int = 0
    dtype: str = "bfloat16"
    paged: bool = False
    uncached: bool = False
    packed: bool = False
    picks: int = 0  # of each query, of the entries that it sees, and some places for none; 0: it attends all of them


CASES = {
    "prefill, window alone": Case(1, 40, 64, 127),
    "prefill, tiles of two kinds of length": Case(2, 35, 64, 20, 300, packed=True),
    "prefill, whole blocks and edges": Case(1, 24, 64, 12, 1552),
    "prefill, float32": Case(1, 20, 8, 127, 272, dtype="float32"),
    "prefill, entries held in float32": Case(2, 9, 16, 5, 70, uncached=True, packed=True),
    "prefill, heads of the largest model": Case(1, 16, 128, 127, 144),
    "prefill, few heads in one tile": Case(1, 140, 8, 127, 160, packed=True),
    "prefill, odd heads": Case(1, 30, 40, 7, 130),
    "a chunk of several blocks": Case(2, 530, 8, 20, 160, packed=True),
    "decode, window alone": Case(3, 1, 64, 127),
    "decode": Case(16, 1, 64, 127, 272),
    "decode, float32, one row": Case(1, 1, 8, 7, 640, dtype="float32"),
    "decode, paged": Case(6, 1, 16, 127, 640, paged=True),
    "decode, few drafts": Case(2, 4, 64, 127, 144),
    "entries alone": Case(5, 1, 64, None, 528),
    "entries alone, several tiles": Case(1, 20, 64, None, 1040, packed=True),
    "one entry": Case(2, 3, 8, 3, 1),
    "picks": Case(2, 19, 64, 20, 600, uncached=True, packed=True, picks=40),
    "picks of several blocks": Case(1, 600, 8, 127, 300, uncached=True, packed=True, picks=40),
    "picks alone, float32": Case(1, 20, 8, None, 640, dtype="float32", uncached=True, picks=130),
}


@functools.partial(jax.jit, static_argnames="how")
def run(how, *operands, picked=None):
    if how == "kernel":
        hidden = None if picked is None else hide(picked, operands[3].count, interpret=True)
        return window_attention(*operands, hidden, interpret=True)
    return attend_in_parts(*operands, picked)


def inputs(case, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    shape = (case.rows, case.queries)
    queries, keys, oldest, entries, visible = scale * normal(*shape, case.heads, C), None, None, None, None
    if case.past is not None:
        keys = normal(case.rows, case.past + case.queries, C)
        # Rows that began a while ago, or in the window, and documents that begin within the chunk.
        start = rng.integers(-3, case.past + 1, size=(case.rows, 1))
        oldest = np.broadcast_to(start, shape).copy()
        if case.packed:
            for b in range(case.rows):
                for first in np.sort(rng.integers(0, case.queries, size=3)):
                    oldest[b, first:] = case.past + first
        oldest = jnp.asarray(oldest, jnp.int32)
    if case.entries:
        held = normal(case.rows, case.entries, C)
        entries = stored(case, held, rng)
        high = np.sort(rng.integers(0, case.entries + 1, size=shape))
        high[0, 0] = 0  # sees nothing
        high[-1, -1] = case.entries
        low = np.minimum(rng.integers(0, 20, size=shape), high) if case.packed else np.zeros(shape)
        visible = Visible(*(jnp.asarray(x, jnp.int32) for x in (low, high, low.min(), high.max())))
    return queries, keys, oldest, entries, visible


def picks(case, visible):
    """[B, Q, K] entries that queries pick, of those that they see; None where they pick none."""
    if not case.picks:
        return None
    scores = np.random.default_rng(5).random((case.rows, case.queries, case.entries))
    number = np.arange(case.entries)
    seen = (number >= np.asarray(visible.low)[..., None]) & (number < np.asarray(visible.high)[..., None])
    best = np.argsort(np.where(seen, -scores, 1), axis=-1)[..., : case.picks]
    kept = np.take_along_axis(seen & (scores < 0.9), best, -1)  # places for none are anywhere, as in replayed decisions
    return jnp.asarray(np.where(kept, best, -1), jnp.int32)


def attended(visible, picked, count):
    """[B, Q, E] which entries queries attend."""
    number = np.arange(count)
    if picked is not None:
        return (np.asarray(picked)[..., None] == number).any(2)
    return (number >= np.asarray(visible.low)[..., None]) & (number < np.asarray(visible.high)[..., None])


def stored(case, held, rng):
    if case.uncached:
        return Entries.uncached(held)
    page = 16
    rows = StoredRows.empty(
        (3, 1 if case.paged else case.rows, case.rows * case.entries if case.paged else case.entries),
        C,
        dtype=held.dtype,
    )
    table = None
    if case.paged:
        table = jnp.asarray(rng.permutation(case.rows * case.entries // page).reshape(case.rows, -1), jnp.int32)
    entries = Entries(rows, jnp.int32(1), held.dtype, table=table, page=page if case.paged else 0)
    return entries.write(jnp.broadcast_to(jnp.arange(case.entries), held.shape[:2]), held)


def expected(queries, keys, oldest, entries, visible, picked=None):
    """Float64, all keys at once."""
    queries = np.asarray(queries, np.float64)
    count = queries.shape[1]
    parts, masks = [], []
    if keys is not None:
        number, own = np.arange(keys.shape[1]), np.arange(count)[:, None]
        last = own + keys.shape[1] - count
        parts.append(np.asarray(keys, np.float64))
        masks.append((number >= np.maximum(np.asarray(oldest), own[:, 0])[..., None]) & (number <= last))
    if entries is not None:
        parts.append(np.asarray(entries.block(0, entries.count), np.float64))
        masks.append(attended(visible, picked, entries.count))
    keys, mask = np.concatenate(parts, 1), np.concatenate(masks, 2)[:, :, None]
    logits = np.where(mask, np.einsum("bqhc,bkc->bqhk", queries, keys) * C**-0.5, -np.inf)
    maximum = np.maximum(logits.max(-1), MASKED)
    shares = np.exp(logits - maximum[..., None])
    return maximum, shares.sum(-1), np.einsum("bqhk,bkc->bqhc", shares, keys)


@pytest.mark.parametrize("how", ["kernel", "plain"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_float64(case, how):
    """The largest logit to float32's rounding; sums to that of shares: each is rounded once, to the keys' dtype."""
    operands = inputs(case)
    picked = picks(case, operands[4])
    maximum, total, weighted = run(how, *operands, picked=picked)
    exact = expected(*operands, picked)
    single = float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(maximum, exact[0], rtol=64 * single, atol=64 * single)
    np.testing.assert_allclose(total, exact[1], rtol=256 * single, atol=0)
    unit = float(jnp.finfo(case.dtype).eps) / 2
    bound = (unit + 256 * single) * (exact[1][..., None] * 6)  # keys are below 6
    assert (np.abs(np.asarray(weighted) - exact[2]) <= bound).all()


@pytest.mark.parametrize(("queries", "top", "count"), [(19, 40, 300), (1, 512, 1024), (3, 1, 1)])
def test_what_is_hidden(queries, top, count):
    """Every entry but the picked ones, exactly, whatever the order and number of picks."""
    rng = np.random.default_rng(3)
    picked = np.stack([rng.permutation(count)[:top] for _ in range(2 * queries)]).reshape(2, queries, -1)
    picked = jnp.asarray(np.where(rng.random(picked.shape) < 0.2, -1, picked), jnp.int32)
    found = hide(picked, count, interpret=True)
    np.testing.assert_array_equal(found, reference(picked, count))
    np.testing.assert_array_equal(found == 0, attended(None, picked, count))


@pytest.mark.parametrize(("queries", "top", "count"), [(19, 40, 300), (2, 512, 4096), (140, 1, 1), (3, 60, 2500)])
def test_what_marks_hide(queries, top, count):
    """Marks are the numbers that they were made of, and hide the same."""
    rng = np.random.default_rng(4)
    picked = np.stack([rng.permutation(count)[:top] for _ in range(2 * queries)]).reshape(2, queries, -1)
    picked = np.where(rng.random(picked.shape) < 0.2, -1, picked)
    marks = Marks.of_numbers(jnp.asarray(picked, jnp.int32), count)
    np.testing.assert_array_equal(hide(marks, count, interpret=True), reference(jnp.asarray(picked), count))
    in_order = np.sort(np.where(picked < 0, count, picked), axis=-1)
    np.testing.assert_array_equal(numbers_of(marks), np.where(in_order == count, -1, in_order))


@pytest.mark.parametrize("how", ["kernel", "plain"])
def test_parts_merge(how):
    """A window and entries apart, merged, give the output of both at once; so do entries under `vmap`."""
    case = Case(2, 3, 8, 5, 160, dtype="float32")
    queries, keys, oldest, entries, visible = inputs(case)
    sink = jnp.linspace(-1, 1, 8)
    whole = finish(Partial(*run(how, queries, keys, oldest, entries, visible)), sink)
    window = Partial(*run(how, queries, keys, oldest, None, None))
    distant = Partial(*run(how, queries, None, None, entries, visible))
    np.testing.assert_allclose(finish(merge(window, distant), sink), whole, atol=1e-5)
    both = jax.vmap(lambda q, k, o: run(how, q, k, o, None, None))(
        *(jnp.stack([x, x[::-1]]) for x in (queries, keys, oldest))
    )
    np.testing.assert_allclose(both[2][1], window.weighted[::-1], atol=1e-5)


def test_sharp_logits():
    """Logits in the hundreds, whose largest grows from block to block, neither overflow nor lose the smaller ones."""
    case = Case(1, 4, 8, 3, 1040, dtype="float32")
    operands = inputs(case, scale=60.0)
    found, exact = (
        finish(Partial(*map(jnp.asarray, x)), jnp.zeros(8)) for x in (run("kernel", *operands), expected(*operands))
    )
    np.testing.assert_allclose(found, exact, atol=2e-3)


def test_gradients_and_what_is_unsupported_take_plain_jax():
    queries, keys, oldest, entries, visible = inputs(Case(1, 3, 8, 5, 20, dtype="float32"))

    def loss(attend, queries, keys):
        return jnp.sum(attend(queries, keys, oldest, entries, visible)[2] ** 2)

    plain = jax.grad(functools.partial(loss, attend_in_parts), argnums=(0, 1))(queries, keys)
    with interpreted():
        chosen = jax.grad(functools.partial(loss, attend_window), argnums=(0, 1))(queries, keys)
    for a, b in zip(chosen, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    few = queries[:, :, :4]
    assert not supports(few)
    with pytest.raises(NotImplementedError, match="heads in multiples of 8"):
        window_attention(few, keys, oldest, entries, visible)
    with interpreted():
        found = attend_window(few, keys, oldest, entries, visible)
    np.testing.assert_array_equal(found.weighted, attend_in_parts(few, keys, oldest, entries, visible)[2])


@pytest.mark.parametrize("name", ["decode", "prefill, whole blocks and edges", "entries alone"])
def test_all_in_one_array(name):
    """As devices hand it on: the same numbers."""
    operands = inputs(CASES[name])
    packed = window_attention(*operands, together=True, interpret=True)
    for found, expected in zip(separate([packed])[0], run("kernel", *operands), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["prefill, whole blocks and edges", "prefill, window alone", "picks"])
def test_sums_rounded_at_the_end(name):
    """As training keeps them: what is added up is the same."""
    operands = inputs(CASES[name])
    picked = picks(CASES[name], operands[4])
    hidden = None if picked is None else hide(picked, operands[3].count, interpret=True)
    *exact, sums = run("kernel", *operands, picked=picked)
    *found, rounded = window_attention(*operands, hidden, rounded=True, interpret=True)
    assert rounded.dtype == jnp.bfloat16
    for a, b in zip((*found, rounded), (*exact, sums.astype(jnp.bfloat16)), strict=True):
        np.testing.assert_array_equal(a, b)
