"""Gradients of attention over picked entries by the TPU kernel, interpreted: against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.test_csa import Case, picks
from v4_jax.cache.entries import Entries
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels import choose
from v4_jax.kernels.attention.reference import MASKED
from v4_jax.kernels.csa import gradients as kernel
from v4_jax.kernels.picked_rows import as_words
from v4_jax.layers.entry_attention import attend_copies
from v4_jax.layers.partials import Partial
from v4_jax.sharding.platform import interpreted

CASES = {
    "blocks on both halves, rows of a batch": Case(2, 37, 16, 512, 300, 150),
    "one query": Case(1, 1, 8, 256, 40, 40),
    "heads of the largest model": Case(1, 18, 128, 512, 200, 130),
    "all pick the same": Case(1, 20, 64, 256, 7, 7),
}


def inputs(case, seed=0):
    rng = np.random.default_rng(seed)
    shape = (case.rows, case.queries)
    picked = picks(case, rng)
    picked[0, 0, 1:] = -1
    if case.queries > 1:
        picked[0, 1] = -1
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    queries = jnp.asarray(2 * normal(*shape, case.heads, case.channels), jnp.bfloat16)
    entries = jnp.asarray(normal(case.rows, case.entries, case.channels), jnp.bfloat16)
    gradient = [jnp.asarray(x, jnp.float32) for x in (normal(*shape, case.heads), normal(*queries.shape))]
    return queries, entries, jnp.asarray(picked), gradient


@jax.jit
def run(queries, entries, picked, maximum, gradient):
    words = as_words(entries, interpret=True)
    return kernel.gradients(queries, words, picked, maximum, Partial(maximum, *gradient), interpret=True)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case):
    """Within the roundings to bfloat16: of gradients that come, of shares, and of the logits' gradients."""
    queries, entries, picked, gradient = inputs(case)
    q, e, of_total, g = (np.asarray(x, np.float64) for x in (queries, entries, *gradient))
    rows, mask = np.arange(case.rows)[:, None, None], np.asarray(picked >= 0)[:, :, None]
    k = e[rows, np.maximum(picked, 0)]
    logits = np.where(mask, np.einsum("bqhc,bqkc->bqhk", q, k) * case.channels**-0.5, -np.inf)
    maximum = np.maximum(logits.max(-1), MASKED)
    shares = np.exp(logits - maximum[..., None])
    scale = case.channels**-0.5
    of_logits = shares * (np.einsum("bqhc,bqkc->bqhk", g, k) + of_total[..., None]) * scale
    of_queries, of_entries = run(queries, entries, picked, np.float32(maximum), gradient)

    unit, single = 2.0**-8, 256 * float(jnp.finfo(jnp.float32).eps)
    large = shares * (np.einsum("bqhc,bqkc->bqhk", abs(g), abs(k)) + abs(of_total[..., None])) * scale
    slack = unit * abs(of_logits) * (1 + unit) + (unit + single) * large

    def added_up(contributions):
        total = np.zeros(e.shape)
        np.add.at(total, (np.broadcast_to(rows, picked.shape), np.maximum(picked, 0)), contributions)
        return total

    def near(found, expected, slack, last):
        assert np.isfinite(np.asarray(found, np.float64)).all()
        assert (abs(np.asarray(found, np.float64) - expected) <= slack + last * (abs(expected) + slack)).all()

    near(of_queries, np.einsum("bqhk,bqkc->bqhc", of_logits, k), np.einsum("bqhk,bqkc->bqhc", slack, abs(k)), unit)
    wanted = np.einsum("bqhk,bqhc->bqkc", of_logits, q) + np.einsum("bqhk,bqhc->bqkc", shares, g)
    most = np.einsum("bqhk,bqhc->bqkc", slack, abs(q)) + (2 * unit + single) * np.einsum(
        "bqhk,bqhc->bqkc", shares, abs(g)
    )
    assert of_entries.dtype == jnp.float32
    near(of_entries, added_up(wanted), added_up(most), single)


def test_training_takes_the_kernels_in_programs_for_tpus_alone(monkeypatch):
    """The same through the layer; elsewhere they are plain JAX's, number for number."""
    queries, entries, picked, gradient = inputs(CASES["blocks on both halves, rows of a batch"])
    calls = []

    def spy(*operands, **options):
        calls.append(options)
        return gradients(*operands, **options)

    gradients = kernel.gradients
    monkeypatch.setattr(kernel, "gradients", spy)

    def pulled(attend):
        def call(queries, entries):
            _, total, weighted = attend(queries, Entries.uncached(entries), picked)
            return total, weighted.astype(queries.dtype)  # as it is handed on in training

        found, pull = jax.vjp(call, queries, entries)
        return found, pull((gradient[0], gradient[1].astype(queries.dtype)))

    plain = pulled(attend_copies)
    chosen = pulled(lambda *given: choose.attend_picked(attend_copies, *given))
    jax.tree.map(np.testing.assert_array_equal, chosen, plain)
    assert not calls
    with interpreted():
        by_kernel = pulled(lambda *given: choose.attend_picked(attend_copies, *given))
    assert calls == [{"interpret": True}]
    for a, b in zip(jax.tree.leaves(by_kernel), jax.tree.leaves(plain), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=2.0**-5 * abs(b).max(), rtol=0)


def test_what_has_no_kernel():
    queries = inputs(CASES["one query"])[0]
    assert kernel.supports(queries)
    assert not kernel.supports(queries.astype(jnp.float32)) and not kernel.supports(queries[:, :, :4])
    assert not kernel.supports(queries[..., :128])


def test_rows_as_words():
    """As the cache stores them, and keys beside them as they are."""
    rng = np.random.default_rng(2)
    for rows in (jnp.asarray(rng.normal(size=(2, 150, size)), jnp.float32) for size in (256, 512)):
        keys = jnp.asarray(rng.normal(size=(2, 150, 128)), jnp.float32)
        wanted, parts = StoredRows((), kind="words").encode(rows)[0], rows.shape[2] // 256
        np.testing.assert_array_equal(as_words(rows, interpret=True), wanted)
        both = as_words(rows, keys, interpret=True)
        np.testing.assert_array_equal(both[:, :, :parts], wanted)
        np.testing.assert_array_equal(both[:, :, parts], np.asarray(keys).view(np.int32))
