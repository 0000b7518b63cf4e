"""Tokens fed and taken back == tokens never fed."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import TOLERANCE
from v4_jax.cache.ring import MOST_ROLLED_BACK

# Around the ends of blocks of 4 and 128 tokens, of the window (16) and of its ring (24), and of the top-k (8 entries).
STARTS = [*range(10), *range(14, 19), *range(22, 27), *range(31, 38), *range(119, 134), *range(247, 260)]
FED = 5  # one token and four guesses
WRONG = 17  # added to a token to make it another


@pytest.fixture(scope="module")
def rows(tokens):
    """[B, 300]: a row for every start."""
    return jnp.stack([jnp.roll(tokens[0], 7 * i) for i in range(len(STARTS))])


@pytest.fixture(scope="module")
def started(three, rows):
    """A cache in which every row holds its own number of tokens."""
    cache = three.cache(len(STARTS), 300)
    done = np.zeros(len(STARTS), int)
    while (counts := np.minimum(130, STARTS - done)).any():
        output = feed(three, cache, rows, counts, size=130)
        cache, done = output.cache, done + counts
    return cache


def feed(three, cache, rows, counts, *, size=FED, wrong_from=None):
    """Feeds the next `counts` tokens of each row, in a call of `size`; from `wrong_from` on others."""
    index = jnp.minimum(cache.lengths[:, None] + jnp.arange(size), rows.shape[1] - 1)
    chunk = jnp.take_along_axis(rows, index, axis=1)
    if wrong_from is not None:
        chunk = jnp.where(jnp.arange(size) >= jnp.reshape(wrong_from, (-1, 1)), (chunk + WRONG) % 64, chunk)
    return three(chunk, cache=cache, lengths=jnp.broadcast_to(jnp.asarray(counts), (len(rows),)))


@pytest.mark.parametrize("accepted", range(FED))
def test_as_if_never_fed(three, rows, started, accepted):
    """To the last bit: what follows, for as long as the window and an open block of 4 reach back, and longer."""
    output = feed(three, started, rows, FED, wrong_from=accepted)
    taken_back = output.cache.rolled_back(lengths=started.lengths + accepted)
    never_fed = feed(three, started, rows, accepted, wrong_from=accepted).cache
    for size in (1, FED, FED, 2, FED, FED, FED):
        one, other = (feed(three, cache, rows, size) for cache in (taken_back, never_fed))
        np.testing.assert_array_equal(one.logits[:, :size], other.logits[:, :size])
        taken_back, never_fed = one.cache, other.cache


def test_every_call_takes_something_back(three, rows, size=MOST_ROLLED_BACK):
    """As much as possible, through whole rows, each at its own pace: the same logits as in one shot."""
    rows = rows[:8]
    whole = three(rows).logits
    cache, rng = three.cache(8, 300), np.random.default_rng(0)
    done = np.zeros(8, int)
    while done.min() < 290:
        accepted = np.minimum(rng.integers(0, size + 1, 8), 300 - done)
        output = feed(three, cache, rows, size, size=size, wrong_from=accepted)
        cache = output.cache.rolled_back(lengths=jnp.asarray(done + accepted))
        for b in range(8):
            expected = whole[b, done[b] : done[b] + accepted[b]]
            np.testing.assert_allclose(output.logits[b, : accepted[b]], expected, atol=TOLERANCE, rtol=0)
        done += accepted


def test_mtp_window(three, rows):
    """The MTP block goes on for a few tokens of its own, which are taken back too."""
    rows, size = rows[:4], FED
    streams, following = three(rows).streams[:, :-1], rows[:, 1:]

    mtp = functools.partial(three, method="mtp")
    whole = mtp(streams, following).logits
    cache, rng = three.cache(4, 300), np.random.default_rng(1)
    done = np.zeros(4, int)
    while done.min() < 80:
        counts = rng.integers(1, size + 1, 4)
        index = done[:, None] + np.arange(size)
        part = jnp.take_along_axis(streams, index[..., None, None], axis=1)
        output = mtp(part, jnp.take_along_axis(following, index, axis=1), lengths=jnp.asarray(counts), cache=cache)
        for b in range(4):
            expected = whole[b, done[b] : done[b] + counts[b]]
            np.testing.assert_allclose(output.logits[b, : counts[b]], expected, atol=TOLERANCE, rtol=0)
        done += counts
        ahead = output
        for _ in range(size - 2):
            ahead = mtp(ahead.streams[:, :1], following[:, :1], cache=ahead.cache)
        assert ahead.cache.draft_lengths.tolist() == (done + size - 2).tolist()
        cache = ahead.cache.rolled_back(draft_lengths=jnp.asarray(done))
        assert cache.lengths.tolist() == [0] * 4
