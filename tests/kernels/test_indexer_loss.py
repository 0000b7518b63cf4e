"""The indexer's loss and its gradients by the TPU kernels, interpreted: against float64."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.cache.entries import Entries
from v4_jax.kernels import choose
from v4_jax.kernels.csa.hidden import hide
from v4_jax.kernels.indexer_loss import picked as of_picked
from v4_jax.kernels.indexer_loss import tpu as kernel
from v4_jax.kernels.indexer_loss.tpu import Operands
from v4_jax.layers import indexer_loss as layer
from v4_jax.layers.indexer_loss import Attended, Scored, indexer_loss
from v4_jax.layers.visible import Visible
from v4_jax.sharding.platform import interpreted

C, R = 128, 128


class Case(NamedTuple):
    """Queries of some rows and heads over entries, of which each compares `picks`, or all that it sees."""

    rows: int
    queries: int
    heads: int
    index_heads: int
    entries: int
    picks: int = 0
    dtype: str = "bfloat16"
    channels: int = C


CASES = {
    "all that are visible": Case(2, 37, 64, 16, 300),
    "picks": Case(1, 40, 64, 64, 600, picks=50),
    "few entries, heads of the largest model": Case(1, 19, 128, 64, 20, picks=9),
    "float32, one tile": Case(1, 20, 8, 8, 272, dtype="float32"),
    "float32, picks": Case(2, 200, 8, 16, 520, picks=30, dtype="float32"),
}

# Entries are fetched where there are more than there is room for.
FETCHED = {
    "blocks on both halves": Case(1, 40, 64, 64, 600, picks=150, channels=512),
    "heads of the largest model, rows of a batch": Case(2, 19, 128, 64, 20, picks=9, channels=512),
    "one query": Case(1, 1, 8, 16, 300, picks=130, channels=256),
}


def inputs(case, seed=0):
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    shape = (case.rows, case.queries)
    low = rng.integers(0, 3, size=shape).astype(np.int32)
    high = np.minimum(rng.integers(-2, case.entries + 1, size=shape), case.entries).astype(np.int32)
    visible = Visible(*map(jnp.asarray, (low, high, low.min(), high.max())))
    picked = None
    if case.picks:
        picked = np.full((*shape, case.picks), -1, np.int32)
        for place in np.ndindex(*shape):
            seen = np.arange(low[place], max(high[place], low[place]))
            some = rng.permutation(seen)[: rng.integers(1, case.picks + 1)]
            picked[(*place, slice(len(some)))] = some
        picked = jnp.asarray(picked)
    operands = Operands(
        queries=2 * normal(*shape, case.heads, case.channels),
        log_total=jnp.asarray(rng.normal(size=(*shape, case.heads)) + 8, jnp.float32),
        entries=normal(case.rows, case.entries, case.channels).astype(jnp.float32),
        index_queries=normal(*shape, case.index_heads, R),
        weights=jnp.asarray(rng.normal(size=(*shape, case.index_heads)) / case.index_heads, jnp.float32),
        index_keys=normal(case.rows, case.entries, R).astype(jnp.float32),
    )
    return operands, visible, picked, rng.normal(size=shape).astype(np.float32)


def expected(operands, visible, picked, given):
    """In float64: the loss, its gradients, and by how much roundings of the scores' gradients may change them."""
    queries, log_total, entries, index_queries, weights, index_keys = (np.asarray(x, np.float64) for x in operands)
    number = np.arange(entries.shape[1])
    found = (number >= np.asarray(visible.low)[..., None]) & (number < np.asarray(visible.high)[..., None])
    if picked is not None:
        found &= (np.asarray(picked)[..., None] == number).any(-2)
    logits = np.einsum("bqhc,bec->bqhe", queries, entries) * queries.shape[-1] ** -0.5
    attended = np.where(found, np.exp(logits - log_total[..., None]).sum(2), 0)
    active = np.einsum("bqhc,bec->bqhe", index_queries, index_keys)
    scores = np.einsum("bqhe,bqh->bqe", np.maximum(active, 0), weights)
    amount = attended.sum(-1, keepdims=True)
    share = attended / np.where(amount > 0, amount, 1)
    most = np.max(scores, -1, where=found, initial=-1e30, keepdims=True)
    powers = np.where(found, np.exp(np.where(found, scores, most) - most), 0)
    guess = powers / np.where(amount > 0, powers.sum(-1, keepdims=True), 1)
    logs = np.log(np.where(share > 0, share, 1)) - np.log(np.where(guess > 0, guess, 1))
    loss = (share * logs).sum(-1)
    of_scores = np.where(amount > 0, guess - share, 0) * given[..., None]
    pulled = np.where(active > 0, of_scores[:, :, None] * weights[..., None], 0)
    slack = (
        np.einsum("bqhe,bec->bqhc", abs(pulled), abs(index_keys)),
        np.einsum("bqhe,bqhc->bec", abs(pulled), abs(index_queries)),
    )
    gradients = (
        np.einsum("bqhe,bec->bqhc", pulled, index_keys),
        np.einsum("bqe,bqhe->bqh", of_scores, np.maximum(active, 0)),
        np.einsum("bqhe,bqhc->bec", pulled, index_queries),
    )
    return loss, gradients, slack


@pytest.mark.parametrize("case", [*CASES.values(), *FETCHED.values()], ids=[*CASES, *FETCHED])
def test_against_float64(case):
    operands, visible, picked, given = inputs(case)

    @jax.jit
    def run(operands, visible, picked, given):
        if case in FETCHED.values():
            loss, slopes = of_picked.loss(operands, picked, interpret=True)
            slopes *= given[..., None]
            return loss, of_picked.gradients(*operands[3:], picked, slopes, interpret=True)
        hidden = None if picked is None else hide(picked, case.entries, interpret=True)
        loss, numbers = kernel.loss(operands, visible, hidden, interpret=True)
        return loss, kernel.gradients(operands, visible, hidden, numbers, given, interpret=True)

    found, gradients = run(operands, visible, picked, given)
    loss, wanted, slack = expected(operands, visible, picked, given)
    np.testing.assert_allclose(found, loss, atol=2e-5, rtol=2e-5)
    unit = float(jnp.finfo(case.dtype).eps)
    np.testing.assert_allclose(gradients[1], wanted[1], atol=1e-4 * abs(wanted[1]).max(), rtol=1e-4)
    for one, other, most in zip(gradients[::2], wanted[::2], slack, strict=True):
        one = np.asarray(one, np.float64)
        assert (abs(one - other) <= unit * (most + abs(other)) + 1e-4 * abs(other).max()).all()


@pytest.mark.parametrize("name", ["all that are visible", "picks", "blocks on both halves"])
def test_training_takes_the_kernels_in_programs_for_tpus_alone(name, monkeypatch):
    """The same through the layer; elsewhere it is plain JAX's, number for number, however many queries come at once."""
    operands, visible, picked, given = inputs((CASES | FETCHED)[name])
    dtype = operands.queries.dtype
    if name in FETCHED:
        monkeypatch.setattr(kernel, "HELD_BYTES", 0)

    def run(trained, plain=False):
        queries, weights, keys = trained
        entries, keys = (Entries.uncached(x.astype(dtype)) for x in (operands.entries, keys))
        attended = Attended(operands.queries, operands.log_total, entries)
        if plain:
            return layer._in_parts(Operands(*attended, queries, weights, keys), visible, picked, heads=())
        return indexer_loss(attended, Scored(queries, weights, keys), picked, visible, ())

    def pulled(**how):
        def both(trained):
            loss, pull = jax.vjp(lambda trained: run(trained, **how), trained)
            return loss, *pull(jnp.asarray(given))[0]

        return jax.jit(both)(trained)

    trained = operands.index_queries, operands.weights, operands.index_keys
    plain, chosen = pulled(plain=True), pulled()
    jax.tree.map(np.testing.assert_array_equal, chosen, plain)
    with interpreted():
        by_kernel = pulled()
    assert not all(np.array_equal(a, b) for a, b in zip(by_kernel, plain, strict=True))
    monkeypatch.setattr(layer, "WIDE_BLOCK", 16)
    for a, b, c in zip(by_kernel, plain, pulled(), strict=True):
        a, b, c = (np.asarray(x, np.float32) for x in (a, b, c))
        np.testing.assert_allclose(a, b, atol=2.0**-6 * abs(b).max(), rtol=0)
        np.testing.assert_allclose(c, b, atol=2.0**-6 * abs(b).max(), rtol=0)


def test_what_has_no_kernel():
    """Entries of which there are more than there is room for, and those of a cache."""
    operands = inputs(CASES["float32, one tile"])[0]
    assert kernel.supports(operands)
    many = jax.ShapeDtypeStruct((1, 2**16, C), jnp.float32)
    assert not kernel.supports(operands._replace(entries=many, index_keys=many))
    cached = Entries.uncached(operands.entries).replace(layer=jnp.int32(0))
    seen = []
    choose.indexer_loss(lambda *given: seen.append(given), operands._replace(entries=cached), None, None)
    assert seen
    assert of_picked.supports(inputs(FETCHED["one query"])[0]) and not of_picked.supports(operands)
