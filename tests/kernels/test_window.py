"""A short chunk's window: the TPU kernel, interpreted, against plain JAX and both against float64, ring and all."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.cache.ring import SPARE, Ring
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels.window.tpu import step, supports
from v4_jax.layers.partial_softmax import finish
from v4_jax.layers.partials import Packed, separate
from v4_jax.layers.window_attention import attend_ring, step_in_parts
from v4_jax.layout import SHORT, Layout

LAYERS, LAYER = 3, 1
C = 128


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32).astype(jnp.bfloat16)


def exact(queries, keys, history, start, total, past):
    """Attention [B, Q, H, C] of the valid queries, in float64, from all keys of each row by position."""
    found = np.zeros(queries.shape)
    for b, (first, fresh) in enumerate(zip(start, total, strict=True)):
        row = np.concatenate([np.asarray(history[b], np.float64)[:first], np.asarray(keys[b], np.float64)])
        for q in range(fresh):
            seen = row[max(0, first + q - past) : first + q + 1]
            logits = np.asarray(queries[b, q], np.float64) @ seen.T * C**-0.5
            shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
            found[b, q] = shares @ seen / shares.sum(axis=-1, keepdims=True)
    return found


@functools.partial(jax.jit, static_argnames=("form", "past"))
def run(form, queries, keys, rows, start, total, past):
    layout = Layout.of(keys.shape[:2], start=start, lengths=total)
    ring = Ring(rows, LAYER, start, jnp.bfloat16)
    if form == "kernel":
        assert supports(queries, ring)
        return step(queries, keys, ring, layout, past=past, interpret=True)
    return step_in_parts(queries, keys, ring, layout, past)


@pytest.mark.parametrize("form", ["kernel", "reference"])
@pytest.mark.parametrize(
    ("past", "heads", "start", "total", "count"),
    [
        (127, 64, [0], [1], 1),
        (127, 8, [0, 5, 127, 128, 135, 136, 137, 400], [1, 1, 1, 0, 1, 1, 1, 1], 1),
        (127, 16, [0, 2, 130, 268, 600], [5, 3, 5, 0, 4], 5),
        (7, 8, [0, 7, 8, 100], [9, 9, 1, 8], SHORT),
    ],
    ids=["one row", "rows of every phase", "drafts", "a short window"],
)
def test_rings(form, past, heads, start, total, count):
    """Rows that begin, that go round and that have nothing new; places that no row has filled hold no numbers."""
    batch, size, room = len(start), past + 1 + SPARE, max(start)
    queries, keys, history = normal(0, batch, count, heads, C), normal(1, batch, count, C), normal(2, batch, room, C)
    ring = np.full((batch, size, C), np.nan, np.float32)
    for b, first in enumerate(start):
        for position in range(max(0, first - size), first):
            ring[b, position % size] = history[b, position]
    rows = StoredRows.empty((LAYERS, batch, size), C, dtype=jnp.bfloat16)
    known = normal(3, LAYERS, batch, size, C).at[LAYER].set(jnp.asarray(ring).astype(jnp.bfloat16))
    rows = rows.replace(arrays=rows.encode(known))
    numbers = jnp.array(start, jnp.int32), jnp.array(total, jnp.int32)
    partial, stored = run(form, queries, keys, rows, *numbers, past)

    (one,) = separate([partial])
    found = finish(one, jnp.full(heads, -jnp.inf))
    valid = (np.arange(count) < np.array(total)[:, None])[..., None, None]
    expected = exact(queries, keys, history, start, total, past)
    np.testing.assert_allclose(np.where(valid, found, 0), expected, rtol=2.0**-7, atol=2.0**-7)

    after = np.asarray(stored.decode(stored.arrays, jnp.float32))
    for b, (first, fresh) in enumerate(zip(start, total, strict=True)):
        for token in range(fresh):
            ring[b, (first + token) % size] = keys[b, token]
    np.testing.assert_array_equal(after[LAYER], ring)
    others = [layer for layer in range(LAYERS) if layer != LAYER]
    np.testing.assert_array_equal(after[others], np.asarray(known, np.float32)[others])


def test_what_a_row_without_tokens_gives_is_finite():
    """A slot that no request fills."""
    rows = StoredRows.empty((LAYERS, 1, 136), C, dtype=jnp.bfloat16)
    nothing = jnp.zeros(1, jnp.int32)
    for form in ("kernel", "reference"):
        partial, _ = run(form, normal(0, 1, 2, 8, C), normal(1, 1, 2, C), rows, nothing, nothing, 127)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(partial))


def test_which_cache_the_kernel_takes():
    """Layers attend any ring; those that the kernel does not take are read in order."""
    queries, keys, start = normal(0, 1, 1, 8, C), normal(1, 1, 1, C), jnp.zeros(1, jnp.int32)
    layout = Layout.of((1, 1), start=start, lengths=start + 1)
    for form, taken in ((dict(dtype=jnp.bfloat16), True), (dict(dtype=jnp.float32), False)):
        ring = Ring(StoredRows.empty((1, 1, 136), C, **form), 0, start, jnp.bfloat16)
        assert supports(queries, ring) == taken
        assert isinstance(attend_ring(queries, keys, ring, layout, 127)[0], Packed) == taken
    assert not supports(queries.astype(jnp.float32), ring)
