"""The choice of the best entries, by blocks and by the TPU kernel, interpreted: against float64 scores, sorted."""

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
from v4_jax.kernels.indexer import reference, selection
from v4_jax.kernels.indexer.marks import numbers_of
from v4_jax.kernels.indexer.tpu import best_entries, marks_of, supports
from v4_jax.layers.visible import Visible
from v4_jax.sharding.platform import interpreted

HEADS, C = 16, 128


class Case(NamedTuple):
    """Queries [rows, queries] over entries, of which each sees a range of its own that begins before `low`."""

    rows: int
    queries: int
    entries: int
    top: int
    low: int = 0


CASES = {
    "decode": Case(1, 1, 700, 64),
    "decode of ragged rows": Case(3, 1, 1100, 64),
    "drafts": Case(1, 3, 5000, 64, 900),
    "as many wanted as there are": Case(1, 2, 130, 130),
    "several blocks of queries": Case(2, 19, 300, 8, 300),
    "several steps": Case(1, 9, 9000, 512, 8000),
}


@functools.partial(jax.jit, static_argnames=("top", "scored"))
def kernel(queries, weights, keys, visible, top, scored):
    return best_entries(queries, weights, keys, visible, top=top, scored=scored, interpret=True)


@functools.partial(jax.jit, static_argnames=("top", "scored"))
def by_blocks(queries, weights, keys, visible, top, scored):
    return selection.best_entries(reference.index_scores, queries, weights, keys, visible, top=top, scored=scored)


BOTH = pytest.mark.parametrize("choice", [kernel, by_blocks], ids=["kernel", "by blocks"])


def ranges(case, seed=0):
    rng = np.random.default_rng(seed)
    high = rng.integers(0, case.entries + 1, (case.rows, case.queries))
    high.flat[0] = case.entries  # somebody sees all,
    if high.size > 1:
        high.flat[-1] = 0  # somebody nothing
    low = np.minimum(rng.integers(0, case.low + 1, high.shape), high)
    bounds = [jnp.asarray(x, jnp.int32) for x in (low, high, low.min(), high.max())]
    return Visible(*bounds)


def stored(keys, dtype):
    """Keys [B, E, C] as the second of three layers of a cache."""
    rows = StoredRows.empty((3, *keys.shape[:2]), keys.shape[2], dtype=dtype)
    everywhere = jnp.broadcast_to(jnp.arange(keys.shape[1]), keys.shape[:2])
    rows = rows.write(1, jnp.arange(keys.shape[0])[:, None], everywhere, jnp.asarray(keys))
    return Entries(rows, jnp.int32(1), dtype)


def expected(queries, weights, keys):
    """Float64 scores [B, Q, E], and how far float32 sums may be from them."""
    queries, weights, keys = (np.asarray(x, np.float64) for x in (queries, weights, keys))
    per_head = np.einsum("bqhc,bec->bqhe", queries, keys)
    sizes = np.einsum("bqhc,bec->bqhe", abs(queries), abs(keys))
    scores = np.einsum("bqhe,bqh->bqe", np.maximum(per_head, 0), weights)
    bound = np.einsum("bqhe,bqh->bqe", sizes, abs(weights)) * (C + HEADS) * 2.0**-23
    return scores, bound


def check(found, case, visible, scores, bound):
    """What is kept is visible and distinct, as much as there may be, and better than the rest by the bound."""
    values, numbers = (np.asarray(x) for x in found)
    assert numbers.shape == values.shape == (case.rows, case.queries, case.top)
    for at in np.ndindex(case.rows, case.queries):
        low, high = int(visible.low[at]), int(visible.high[at])
        count = min(case.top, high - low)
        kept = numbers[at][:count]
        assert (numbers[at][count:] == -1).all() and (values[at][count:] == -np.inf).all()
        assert len(set(kept)) == count and (kept >= low).all() and (kept < high).all()
        assert (abs(values[at][:count] - scores[at][kept]) <= bound[at][kept]).all()
        rest = np.setdiff1d(np.arange(low, high), kept)
        if count and len(rest):
            assert (scores[at][rest] - bound[at][rest]).max() <= (scores[at][kept] + bound[at][kept]).min()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@BOTH
def test_any_shape_and_range(case, dtype, choice):
    rng = np.random.default_rng(1)
    queries = jnp.asarray(rng.normal(size=(case.rows, case.queries, HEADS, C)), dtype)
    weights = jnp.asarray(rng.normal(size=queries.shape[:3]), jnp.float32)
    keys, visible = jnp.asarray(rng.normal(size=(case.rows, case.entries, C)), dtype), ranges(case)
    found = choice(queries, weights, stored(keys, dtype), visible, case.top, True)
    check(found, case, visible, *expected(queries, weights, keys))


@pytest.mark.parametrize("case", [CASES["drafts"], CASES["several steps"]], ids=["drafts", "several steps"])
@pytest.mark.parametrize("values", [2, 1], ids=["many ties", "all scores are zero"])
@BOTH
def test_ties_keep_the_earlier_entries(case, values, choice):
    """Small whole numbers have exact scores, most of which occur often; zeros come with either sign."""
    rng = np.random.default_rng(2)
    queries, weights, keys = (
        rng.integers(1 - values, values, size)
        for size in [
            (case.rows, case.queries, HEADS, C),
            (case.rows, case.queries, HEADS),
            (case.rows, case.entries, C),
        ]
    )
    weights = weights if values > 1 else -np.ones_like(weights)
    scores = expected(queries, weights, keys)[0]
    visible = ranges(case)
    values, numbers = choice(
        jnp.asarray(queries, jnp.bfloat16),
        jnp.asarray(weights, jnp.float32),
        stored(keys, jnp.bfloat16),
        visible,
        case.top,
        True,
    )
    for at in np.ndindex(case.rows, case.queries):
        low, high = int(visible.low[at]), int(visible.high[at])
        best = low + np.argsort(-scores[at][low:high], kind="stable")[: case.top]
        kept = np.asarray(numbers[at])[: len(best)]
        assert set(kept) == set(best) and (np.asarray(numbers[at])[len(best) :] == -1).all()
        np.testing.assert_array_equal(np.asarray(values[at])[: len(best)], scores[at][kept])


@pytest.mark.parametrize("form", [{"dtype": jnp.dtype("bfloat16")}, {"kind": "index"}], ids=["plain", "quantised"])
@pytest.mark.parametrize("case", [Case(2, 16, 1120, 64, 900), Case(2, 3, 9024, 64, 900)], ids=["prefill", "drafts"])
def test_pages(case, form):
    """Plain ones are read from where they lie, others decoded; without scores the same entries are kept."""
    rng = np.random.default_rng(3)
    queries = jnp.asarray(rng.normal(size=(case.rows, case.queries, HEADS, C)), jnp.bfloat16)
    weights, visible = jnp.asarray(rng.normal(size=queries.shape[:3]), jnp.float32), ranges(case)
    pages = case.rows * case.entries // 32
    rows = StoredRows.empty((2, 1, pages * 32), C, **form)
    rows = rows.write(1, 0, jnp.arange(pages * 32)[None], jnp.asarray(rng.normal(size=(1, pages * 32, C))))
    table = jnp.asarray(rng.permutation(pages).reshape(case.rows, -1), jnp.int32)
    keys = Entries(rows, jnp.int32(1), jnp.bfloat16, table=table, page=32)
    if not supports(queries, keys, case.top):
        assert case.queries < 16 and rows.kind == "index"  # a copy is not worth it
        return
    found = kernel(queries, weights, keys, visible, case.top, True)
    check(found, case, visible, *expected(queries, weights, keys.block(0, case.entries)))
    if case.queries < 16:
        scores, numbers = kernel(queries, weights, keys, visible, case.top, False)
        assert scores is None
        np.testing.assert_array_equal(numbers, found[1])


@pytest.mark.parametrize("values", [None, 2, 1], ids=["scores", "many ties", "all scores are zero"])
@pytest.mark.parametrize(
    "case", [Case(2, 19, 300, 8, 200), Case(1, 35, 4096, 512, 900), Case(1, 16, 1024, 64), Case(2, 5, 140, 130)]
)
def test_marks_are_of_the_same_entries(case, values):
    """Whole blocks of queries and parts of one, queries that see fewer than they may pick, and equal scores."""
    rng = np.random.default_rng(6)

    def random(*size):
        return rng.normal(size=size) if values is None else rng.integers(1 - values, values, size)

    queries = jnp.asarray(random(case.rows, case.queries, HEADS, C), jnp.bfloat16)
    weights = jnp.asarray(random(*queries.shape[:3]), jnp.float32)
    keys, visible = stored(random(case.rows, case.entries, C), jnp.bfloat16), ranges(case)
    asked = (queries, weights, keys, visible)
    marks = marks_of(*asked, top=case.top, interpret=True)
    assert marks.bits.shape == (case.rows, case.queries, 128)
    numbers = np.asarray(kernel(*asked, case.top, False)[1])
    in_order = np.sort(np.where(numbers < 0, case.entries, numbers), axis=-1)
    np.testing.assert_array_equal(numbers_of(marks), np.where(in_order == case.entries, -1, in_order))
    if case.entries > case.top:
        with interpreted():
            np.testing.assert_array_equal(choose.marked_entries(*asked, top=case.top).bits, marks.bits)
        with pytest.raises(NotImplementedError, match="4097 entries are chosen from in 2 steps: expected 1"):
            marks_of(queries, weights, stored(np.zeros((case.rows, 4097, C)), jnp.bfloat16), visible, top=case.top)


def test_unsupported_goes_to_the_reference():
    queries = jnp.zeros((1, 2, 12, C))
    keys, visible = stored(np.zeros((1, 40, C)), jnp.float32), ranges(Case(1, 2, 40, 8))
    assert not supports(queries, keys, 8)
    assert not supports(jnp.zeros((1, 2, HEADS, 64)), keys, 8)
    many = jax.ShapeDtypeStruct((1, 128, 64, C), jnp.bfloat16)
    for entries, fit in ((1 << 20, True), (1 << 21, False)):  # of 4M tokens, and 8M
        room = jax.eval_shape(lambda entries=entries: Entries.uncached(jnp.zeros((1, entries, C))))
        assert supports(many, room, 1024) == fit
    with pytest.raises(NotImplementedError, match="heads of 16 up to 128"):
        best_entries(queries, jnp.zeros((1, 2, 12)), keys, visible, top=8)
    with interpreted():
        scores, numbers = choose.best_entries(queries, jnp.zeros((1, 2, 12)), keys, visible, top=8, scored=False)
    assert scores is None and numbers.shape == (1, 2, 8)


@pytest.mark.parametrize("scored", [True, False])
def test_all_that_are_visible_are_kept_where_all_have_room(scored):
    """Devices with few entries do not choose; one alone does not even score."""
    case = Case(3, 4, 130, 130, 60)
    rng = np.random.default_rng(5)
    queries = jnp.asarray(rng.normal(size=(case.rows, case.queries, HEADS, C)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=queries.shape[:3]), jnp.float32)
    keys, visible = jnp.asarray(rng.normal(size=(case.rows, case.entries, C)), jnp.float32), ranges(case)
    found = choose.best_entries(queries, weights, stored(keys, jnp.float32), visible, top=case.top, scored=scored)
    if scored:  # in their order, with others between
        order = np.argsort(np.asarray(found[1]) < 0, axis=-1, kind="stable")
        found = [np.take_along_axis(np.asarray(x), order, axis=-1) for x in found]
    else:
        assert found[0] is None
        numbers = np.asarray(found[1])
        values = np.where(numbers < 0, -np.inf, np.take_along_axis(expected(queries, weights, keys)[0], numbers, -1))
        found = values, numbers
    check(found, case, visible, *expected(queries, weights, keys))
