"""Gradients of attention over window and entries by the TPU kernel, interpreted: against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.test_attention import C, Case, attended, inputs, picks
from v4_jax.cache.entries import Entries
from v4_jax.kernels import choose
from v4_jax.kernels.attention import gradients as kernel
from v4_jax.kernels.attention.reference import MASKED
from v4_jax.kernels.csa.hidden import hide
from v4_jax.layers.window_attention import attend_in_parts, attend_window
from v4_jax.sharding.platform import interpreted

CASES = {
    "window alone": Case(1, 40, 64, 127),
    "documents, tiles on both halves": Case(2, 37, 64, 20, 300, uncached=True, packed=True),
    "one tile, float32": Case(1, 20, 8, 127, 272, dtype="float32", uncached=True),
    "heads of the largest model": Case(1, 24, 128, 127, 144, uncached=True),
    "odd heads, documents": Case(1, 30, 40, 7, 130, uncached=True, packed=True),
    "entries alone, float32": Case(2, 20, 64, None, 600, dtype="float32", uncached=True, packed=True),
    "one entry": Case(2, 3, 8, 3, 1, uncached=True),
    "picks": Case(2, 19, 64, 20, 600, uncached=True, packed=True, picks=40),
    "blocks of queries": Case(2, 530, 8, 20, 160, uncached=True, packed=True),
    "blocks of queries, window alone": Case(1, 1040, 8, 127),
    "blocks of queries, picks": Case(1, 600, 8, 20, 300, uncached=True, packed=True, picks=40),
    "picks alone, float32": Case(1, 20, 8, None, 640, dtype="float32", uncached=True, picks=130),
}


@jax.jit
def run(queries, keys, oldest, held, visible, picked, *given):
    hidden = None if picked is None else hide(picked, held.shape[1], interpret=True)
    return kernel.gradients(queries, keys, oldest, held, visible, *given, hidden, interpret=True)


def given(case):
    """Operands of a case with the entries as one array, and the gradients of what comes of it."""
    queries, keys, oldest, entries, visible = inputs(case)
    rng, shape = np.random.default_rng(7), (case.rows, case.queries, case.heads)
    of_total, of_weighted = (rng.normal(size=s).astype(np.float32) for s in (shape, (*shape, C)))
    held = None if entries is None else entries.rows.arrays[0][0]
    return queries, keys, oldest, held, visible, of_total, of_weighted


def masks(case, oldest, visible, picked):
    parts = []
    if case.past is not None:
        number, own = np.arange(case.past + case.queries), np.arange(case.queries)[:, None]
        parts.append((number >= np.maximum(np.asarray(oldest)[..., None], own)) & (number <= own + case.past))
    if case.entries:
        parts.append(attended(visible, picked, case.entries))
    return np.concatenate(parts, 2)[:, :, None]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_float64(case):
    """Within the roundings to the operands' dtype: of gradients that come, of shares, and of the logits' gradients."""
    queries, keys, oldest, held, visible, of_total, of_weighted = given(case)
    q, g = (np.asarray(x, np.float64) for x in (queries, of_weighted))
    k = np.concatenate([np.asarray(x, np.float64) for x in (keys, held) if x is not None], axis=1)
    picked = picks(case, visible)
    mask, scale = masks(case, oldest, visible, picked), C**-0.5
    logits = np.where(mask, np.einsum("bqhc,bkc->bqhk", q, k) * scale, -np.inf)
    maximum = np.maximum(logits.max(-1), MASKED)
    shares = np.exp(logits - maximum[..., None])
    of_logits = shares * (np.einsum("bqhc,bkc->bqhk", g, k) + of_total[..., None]) * scale
    found = run(queries, keys, oldest, held, visible, picked, np.float32(maximum), of_total, of_weighted)

    unit, single = float(jnp.finfo(case.dtype).eps) / 2, 256 * float(jnp.finfo(jnp.float32).eps)
    large = shares * (np.einsum("bqhc,bkc->bqhk", abs(g), abs(k)) + abs(of_total[..., None])) * scale
    slack = unit * abs(of_logits) * (1 + unit) + (unit + single) * large

    def near(found, expected, slack, last):
        assert np.isfinite(np.asarray(found, np.float64)).all()
        assert (abs(np.asarray(found, np.float64) - expected) <= slack + last * (abs(expected) + slack)).all()

    near(found[0], np.einsum("bqhk,bkc->bqhc", of_logits, k), np.einsum("bqhk,bkc->bqhc", slack, abs(k)), unit)
    of_keys = np.einsum("bqhk,bqhc->bkc", of_logits, q) + np.einsum("bqhk,bqhc->bkc", shares, g)
    slack = np.einsum("bqhk,bqhc->bkc", slack, abs(q)) + (2 * unit + single) * np.einsum(
        "bqhk,bqhc->bkc", shares, abs(g)
    )
    window = 0 if keys is None else keys.shape[1]
    if keys is not None:
        near(found[1], of_keys[:, :window], slack[:, :window], unit)
    if held is not None:
        assert found[2].dtype == jnp.float32
        near(found[2], of_keys[:, window:], slack[:, window:], single)
    assert [x is None for x in found] == [False, keys is None, held is None]


@pytest.mark.parametrize("name", ["window alone", "one tile, float32", "picks"])
def test_training_takes_the_kernels_in_programs_for_tpus_alone(name, monkeypatch):
    """The same gradients through the layers; elsewhere they are plain JAX's, number for number."""
    queries, keys, oldest, held, visible, of_total, of_weighted = given(CASES[name])
    held, picked = None if held is None else held.astype(queries.dtype), picks(CASES[name], visible)
    calls = []

    def spy(*operands, **options):
        calls.append(options)
        return gradients(*operands, **options)

    gradients = kernel.gradients
    monkeypatch.setattr(kernel, "gradients", spy)

    def pulled(attend):
        def call(queries, keys, held):
            entries = None if held is None else Entries.uncached(held)
            _, total, weighted = attend(queries, keys, oldest, entries, visible, picked=picked)
            return total, weighted.astype(queries.dtype)  # as it is handed on in training

        given = jnp.asarray(of_total), jnp.asarray(of_weighted, queries.dtype)
        return jax.vjp(call, queries, keys, held)[1](given)

    plain, chosen = pulled(attend_in_parts), pulled(attend_window)
    jax.tree.map(np.testing.assert_array_equal, chosen, plain)
    with interpreted():
        by_kernel = pulled(attend_window)
    assert calls[-1]["interpret"]
    loose = 2.0**-5 if queries.dtype == jnp.bfloat16 else 1e-4
    for a, b in zip(jax.tree.leaves(by_kernel), jax.tree.leaves(plain), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=loose * abs(b).max(), rtol=0)


def test_what_has_no_kernel():
    """Entries of a cache, and more of them than there is room for."""
    queries, keys, _, entries, _ = inputs(Case(1, 3, 8, 5, 20, dtype="float32"))
    assert not choose.attends_in_training(queries, keys, entries)
    assert choose.attends_in_training(queries, keys, None)
    many = jax.ShapeDtypeStruct((1, 2**16, C), jnp.float32)
    assert not kernel.supports(queries, keys, many)
