"""The cache: formats, ring order, work that does not depend on its capacity, rows that are used again."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import make
from v4_jax import Config, ConfigError, Transformer, init_cache
from v4_jax.cache.entries import PAGE
from v4_jax.cache.ring import Ring
from v4_jax.cache.rows import StoredRows
from v4_jax.layout import Layout
from v4_jax.sharding.split import UNSPLIT


@pytest.fixture(scope="module")
def model():
    return make(
        num_hidden_layers=3,
        compress_ratios=(4, 4, 128, 0),
        num_hash_layers=1,
        head_dim=160,
        qk_rope_head_dim=32,
        index_head_dim=64,
    )


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "released"])
def test_a_step_costs_the_same_at_any_capacity(model, dtype, paged):
    """Hardly any temporary of a decoding step grows with the length that the cache has room for.

    Converting or copying a role's rows around the one row that is written would make them grow as the cache does.
    """
    transformer = Transformer(model.config, policy="released")

    def step(params, tokens, cache):
        output = transformer.apply({"params": params}, tokens, cache=cache, logits="last")
        return output.logits, output.cache

    def temporaries(length):
        pages = length // PAGE if paged else None
        cache = jax.eval_shape(lambda: init_cache(model.config, 1, length, dtype=dtype, pages=pages))
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        compiled = jax.jit(step, donate_argnums=2).lower(model.params, tokens, cache).compile()
        return compiled.memory_analysis().temp_size_in_bytes, sum(cache.nbytes().values())

    (small, small_cache), (large, large_cache) = temporaries(1 << 16), temporaries(1 << 20)
    assert large - small < 0.001 * (large_cache - small_cache)


@pytest.mark.parametrize(("form", "exact"), [({"kind": "plain", "dtype": jnp.dtype("bfloat16")}, False), ({}, True)])
@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 9, 12, 13, 30])
def test_ring_keeps_the_last_tokens_in_order(chunk, form, exact):
    """A ring of 12 asked for the last 8 tokens, at every phase, rows advancing differently."""
    values = jax.random.normal(jax.random.key(0), (2, 120, 4)).astype(jnp.bfloat16).astype(jnp.float32)
    rows, start = StoredRows.empty((3, 2, 12), 4, **form), np.zeros(2, int)
    rng = np.random.default_rng(chunk)
    while start.max() + chunk < 120:
        counts = rng.integers(0, chunk + 1, 2)
        tokens = jnp.stack([values[b, start[b] : start[b] + chunk] for b in range(2)])
        ring = Ring(rows, 1, jnp.array(start), jnp.float32)
        layout = Layout.of(tokens.shape[:2], start=jnp.array(start), lengths=jnp.array(counts))
        before, rows = ring.advance(tokens, layout, 8, UNSPLIT)
        for b in range(2):
            expected = np.zeros((8, 4), np.float32)
            kept = values[b, max(0, start[b] - 8) : start[b]]
            expected[8 - len(kept) :] = kept
            np.testing.assert_array_equal(before()[b], expected)
        start += counts
    np.testing.assert_array_equal(rows.arrays[0][0], 0)  # other layers are left alone


def test_nothing_of_an_earlier_row_survives_in_the_window(model):
    """A row that starts over does not see what its slots held, not even NaN."""
    tokens = jax.random.randint(jax.random.key(1), (1, 6), 0, 64)
    clean = model(tokens, cache=model.cache(1, 64)).logits
    used = model.cache(1, 64)
    dirty = {
        role: rows.replace(arrays=tuple(jnp.full_like(array, jnp.nan) for array in rows.arrays))
        for role, rows in used.rings.items()
        if role != "draft"
    }
    np.testing.assert_array_equal(model(tokens, cache=used.replace(rings=used.rings | dirty)).logits, clean)


def test_refusals():
    config = Config.tiny()
    with pytest.raises(ValueError, match="unknown cache dtype 'int8'"):
        init_cache(config, 1, 8, dtype="int8")
    with pytest.raises(ValueError, match="0 tokens is out of range"):
        init_cache(config, 1, 0)
    with pytest.raises(ValueError, match="a cache of 0 pages is out of range: expected at least one"):
        init_cache(config, 1, 8, pages=0)
    with pytest.raises(ValueError, match="need multiples of 64"):
        init_cache(dataclasses.replace(config, head_dim=96), 1, 8, dtype="released")
    with pytest.raises(ConfigError, match="sliding_window is 1, expected at least 2"):
        dataclasses.replace(config, sliding_window=1)
