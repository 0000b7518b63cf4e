"""One shot == chunks of any size == token by token."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import TOLERANCE, TOPK

EDGES = [*range(1, 10), 4 * TOPK - 1, 4 * TOPK, 4 * TOPK + 1, 127, 128, 129, 130]


@pytest.fixture(scope="module")
def one_shot(tiny, tokens):
    return tiny(tokens).logits


@pytest.fixture(scope="module")
def step_by_step(tiny, tokens):
    """Logits of feeding the first 140 tokens one at a time, and the caches on the way."""
    caches, logits, cache = [], [], tiny.cache(2, 300)
    for i in range(140):
        output = tiny(tokens[:, i : i + 1], cache=cache)
        cache = output.cache
        caches.append(cache)
        logits.append(output.logits)
    return jnp.concatenate(logits, axis=1), caches


def test_token_by_token(one_shot, step_by_step):
    np.testing.assert_allclose(step_by_step[0], one_shot[:, :140], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("size", [3, 64, 127, 128, 129])
def test_chunks(tiny, tokens, one_shot, size):
    sizes = [size] * (300 // size) + [300 % size] * (300 % size > 0)
    logits, cache = tiny.in_chunks(tokens, sizes)
    np.testing.assert_allclose(logits, one_shot, atol=TOLERANCE, rtol=0)
    assert cache.lengths.tolist() == [300, 300]


@pytest.mark.parametrize("length", EDGES)
def test_prompt_lengths(three, tokens, length):
    """A prompt of exactly this length, prefilled at once without and with a cache, then continued."""
    whole = three(tokens[:, :136]).logits
    np.testing.assert_allclose(three(tokens[:, :length]).logits, whole[:, :length], atol=TOLERANCE, rtol=0)
    output = three(tokens[:, :length], cache=three.cache(2, 136))
    np.testing.assert_allclose(output.logits, whole[:, :length], atol=TOLERANCE, rtol=0)
    cache = output.cache
    for i in range(length, min(length + 5, 136)):
        output = three(tokens[:, i : i + 1], cache=cache)
        cache = output.cache
        np.testing.assert_allclose(output.logits[:, 0], whole[:, i], atol=TOLERANCE, rtol=0)


def test_chunk_end_does_not_change_the_cache(tiny, tokens, step_by_step):
    """After 140 tokens the caches hold the same keys, entries and open blocks, however they came."""
    _, cache = tiny.in_chunks(tokens[:, :140], [100, 40], tiny.cache(2, 300))
    one_by_one = step_by_step[1][-1]
    for kind in ("entries", "rings"):
        for role, rows in getattr(cache, kind).items():
            expected = getattr(one_by_one, kind)[role].arrays[0]
            np.testing.assert_allclose(rows.arrays[0], expected, atol=TOLERANCE, err_msg=f"{kind} {role}")


def test_last_logits(tiny, tokens, one_shot):
    lengths = jnp.array([300, 133])
    output = tiny(tokens, lengths=lengths)
    last = tiny(tokens, lengths=lengths, logits="last").logits
    assert last.shape == (2, 1, 64)
    np.testing.assert_allclose(last[0, 0], output.logits[0, 299], atol=TOLERANCE)
    np.testing.assert_allclose(last[1, 0], one_shot[1, 132], atol=TOLERANCE)


def test_mtp_chunks(tiny, tokens):
    """The MTP block fed at once, and in uneven chunks through its own window."""
    streams, following = tiny(tokens).streams[:, :-1], tokens[:, 1:]
    whole = tiny(streams, following, method="mtp")
    cache, logits, first = tiny.cache(2, 300), [], 0
    for size in (1, 20, 130, 148):
        part = slice(first, first + size)
        output = tiny(streams[:, part], following[:, part], cache=cache, method="mtp")
        cache, first = output.cache, first + size
        logits.append(output.logits)
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), whole.logits, atol=TOLERANCE, rtol=0)
    assert cache.draft_lengths.tolist() == [299, 299] and cache.lengths.tolist() == [0, 0]
