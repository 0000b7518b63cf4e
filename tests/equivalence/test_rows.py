"""Ragged rows == each alone; packed documents == each alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import TOLERANCE

LENGTHS = [1, 4, 37, 131]


@pytest.fixture(scope="module")
def rows(tokens):
    return jnp.stack([jnp.roll(tokens[0], 11 * i)[:140] for i in range(4)])


def test_ragged_prefill(tiny, rows):
    whole = tiny(rows).logits
    ragged = tiny(rows, lengths=jnp.array(LENGTHS)).logits
    for i, length in enumerate(LENGTHS):
        np.testing.assert_allclose(ragged[i, :length], whole[i, :length], atol=TOLERANCE, rtol=0)


def test_ragged_chunks_each_in_its_own_phase(tiny, rows):
    """Rows advance by different amounts in every call; each must equal the row fed alone."""
    whole = tiny(rows).logits
    cache, rng = tiny.cache(4, 160), np.random.default_rng(0)
    done = np.zeros(4, int)
    for _ in range(12):
        counts = rng.integers(0, 24, size=4)
        counts = np.minimum(counts, 140 - done)
        chunk = np.zeros((4, 24), np.int32)
        for i in range(4):
            chunk[i, : counts[i]] = rows[i, done[i] : done[i] + counts[i]]
            chunk[i, counts[i] :] = rng.integers(0, 64, size=24 - counts[i])  # padding must not matter
        output = tiny(chunk, lengths=jnp.array(counts), cache=cache)
        cache = output.cache
        for i in range(4):
            expected = whole[i, done[i] : done[i] + counts[i]]
            np.testing.assert_allclose(output.logits[i, : counts[i]], expected, atol=TOLERANCE, rtol=0)
        done += counts
        assert cache.lengths.tolist() == done.tolist()
    assert done.min() > 60


def test_padding_never_matters(tiny, rows):
    other = jnp.where(jnp.arange(140) < jnp.array(LENGTHS)[:, None], rows, (rows + 31) % 64)
    lengths = jnp.array(LENGTHS)
    a, b = tiny(rows, lengths=lengths).logits, tiny(other, lengths=lengths).logits
    for i, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(a[i, :length], b[i, :length])


@pytest.mark.parametrize("sizes", [(3, 130, 7, 135), (1, 2, 260, 12), (137, 138)])
def test_packed_documents(tiny, tokens, sizes):
    """Unaligned starts included: every document's logits equal its logits alone."""
    row = tokens[:1, : sum(sizes)]
    segments = jnp.repeat(jnp.arange(1, len(sizes) + 1), jnp.array(sizes))[None]
    row = jnp.pad(row, [(0, 0), (0, 300 - row.shape[1])])
    segments = jnp.pad(segments, [(0, 0), (0, 300 - segments.shape[1])])
    packed = tiny(row, segment_ids=segments).logits
    first = 0
    for size in sizes:
        alone = tiny(jnp.pad(row[:, first : first + size], [(0, 0), (0, 300 - size)]), lengths=jnp.array([size])).logits
        np.testing.assert_allclose(packed[0, first : first + size], alone[0, :size], atol=TOLERANCE, rtol=0)
        first += size


def test_packed_gradients(three, tokens):
    """The gradient of a packed row is the sum of its documents' gradients."""
    sizes = (5, 133, 22)
    row, segments = tokens[:1, :160], jnp.repeat(jnp.arange(1, 4), jnp.array(sizes))[None]
    weights = jax.random.normal(jax.random.key(3), (160, 64))

    def loss(params, tokens, segments, weights):
        logits = three.model.apply({"params": params}, tokens, segment_ids=segments).logits
        return jnp.sum(jax.nn.log_softmax(logits[0]) * weights)

    gradient = jax.jit(jax.grad(loss, allow_int=True))
    packed = gradient(three.params, row, segments, weights)
    total, first = None, 0
    for size in sizes:
        part = jnp.pad(row[:, first : first + size], [(0, 0), (0, 160 - size)])
        alone = (jnp.arange(160) < size).astype(jnp.int32)[None]
        part_weights = jnp.pad(weights[first : first + size], [(0, 160 - size), (0, 0)])
        one = gradient(three.params, part, alone, part_weights)
        total = one if total is None else jax.tree.map(_add, total, one)
        first += size
    for path, (a, b) in _pairs(packed, total):
        np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, float(jnp.abs(b).max())), rtol=0, err_msg=path)


def _add(a, b):
    return a if a.dtype == jax.dtypes.float0 else a + b


def _pairs(a, b):
    flat = jax.tree_util.tree_flatten_with_path(a)[0]
    for (path, x), y in zip(flat, jax.tree.leaves(b), strict=True):
        if x.dtype != jax.dtypes.float0:
            yield jax.tree_util.keystr(path), (x, y)


def test_reused_segment_number_starts_a_new_document(tiny, tokens):
    row = tokens[:1, :60]
    a = jnp.repeat(jnp.array([1, 2, 1]), 20)[None]
    b = jnp.repeat(jnp.array([1, 2, 3]), 20)[None]
    np.testing.assert_array_equal(tiny(row, segment_ids=a).logits, tiny(row, segment_ids=b).logits)


def test_cache_and_segments_are_refused_together(tiny, tokens):
    with pytest.raises(ValueError, match="cannot be combined"):
        tiny(tokens[:, :8], segment_ids=jnp.ones((2, 8), jnp.int32), cache=tiny.cache(2, 16))


def test_last_logits_of_a_row_that_begins_with_padding(tiny, tokens):
    segments = jnp.where(jnp.arange(40) < 6, 0, 1)[None]
    segments = segments.at[0, 38:].set(0)
    row = tokens[:1, :40]
    everything = tiny(row, segment_ids=segments).logits
    last = tiny(row, segment_ids=segments, logits="last").logits
    np.testing.assert_allclose(last[0, 0], everything[0, 37], atol=TOLERANCE)


def test_wrong_shapes_are_refused(tiny, tokens):
    with pytest.raises(ValueError, match=r"lengths has shape \(3,\), expected \(2,\)"):
        tiny(tokens[:, :8], lengths=jnp.ones((3,), jnp.int32))
    with pytest.raises(ValueError, match="with at least one token"):
        tiny(tokens[:, :0])
    with pytest.raises(ValueError, match="the cache has 3 rows, the tokens 2"):
        tiny(tokens[:, :8], cache=tiny.cache(3, 16))
