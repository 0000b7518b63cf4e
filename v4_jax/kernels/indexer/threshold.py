"""The k-th best score of each query, found without a sort.

An interval of ranks, integers that order as scores do, is narrowed by counts of how many lie above. The narrowing
begins on the maxima of groups of up to 16 entries: k of the maxima, and so k scores, reach the k-th best maximum, and
little more than k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from v4_jax.kernels.indexer.cut import LANES, LEAST, SUBLANES, Cut, entry_numbers
from v4_jax.kernels.turns import about

FEW = 1 << 17  # ranks that are counted against several thresholds at a time: a round then takes its latency
# Of a search for a threshold on the mean, with scores of several shapes, 4,096 to 262,144 of them, by whether a round
# looks at several thresholds: 4 to 6 (at most 8), or 7 to 10 (at most 19).
ROUNDS = {True: 6, False: 9}
GUESSES = (0.1, -0.1)  # how far beyond the wanted count guesses aim, as a share of the counts on that side
TIED = 2**31 - 1  # beyond every entry


def threshold(
    ranks: Any, maxima: Any, visible: Array, top: int, start: Any, used: Any, cut: Cut
) -> tuple[Array, Array]:
    """Each query's k-th best rank, and the first entry from which on equal ones are left out.

    All are [Q, 8, 128] int32, the same everywhere in a query's register.
    """
    zero = jnp.zeros(visible.shape, jnp.int32)

    def count(*reached: Any) -> list[Array]:
        """How many ranks fulfil each of `reached`, which map ranks [Q, 8, 128] and where they begin."""

        def chunk(c: Any, counts: list[Array]) -> list[Array]:
            for i in range(0, cut.chunk, LANES):
                lanes = pl.multiple_of(c * cut.chunk, LANES) + i
                own = ranks[:, :, pl.ds(lanes, LANES)]
                counts = [n + reach(own, lanes).astype(jnp.int32) for n, reach in zip(counts, reached, strict=True)]
            return counts

        with about(cut.chunks):
            return list(map(total_of, jax.lax.fori_loop(0, used, chunk, [zero] * len(reached))))

    def count_maxima(*thresholds: Array) -> list[Array]:
        counts = [zero] * len(thresholds)
        for i in range(0, cut.chunk, LANES):
            own = maxima[:, :, i : i + LANES]
            counts = [n + (own >= rank).astype(jnp.int32) for n, rank in zip(counts, thresholds, strict=True)]
        return list(map(total_of, counts))

    def count_ranks(*thresholds: Array) -> list[Array]:
        return count(*[lambda x, _, rank=rank: x >= rank for rank in thresholds])

    most = maxima[:, :, :LANES]
    for i in range(LANES, cut.chunk, LANES):
        most = jnp.maximum(most, maxima[:, :, i : i + LANES])
    most = jnp.max(jnp.max(most, axis=1, keepdims=True), axis=2, keepdims=True)
    most = jnp.broadcast_to(most, visible.shape)
    all_kept = visible <= top  # whatever is visible
    k = jnp.full(visible.shape, top, jnp.int32)
    lowest = jnp.where(all_kept, LEAST + 1, LEAST)
    highest = jnp.where(all_kept, LEAST + 1, most)
    groups = jnp.where(all_kept, k, SUBLANES * cut.chunk)
    several = maxima.size <= FEW
    lowest = narrow(count_maxima, k, lowest, highest, groups, slack=top // 8, several=several)[0]
    above = jnp.where(all_kept, k, count_ranks(lowest)[0])
    several = ranks.size <= FEW
    lowest, reach, beyond = narrow(count_ranks, k, lowest, highest, above, slack=0, several=several)

    def tied_before(number: Array) -> Array:
        def before(x: Array, lanes: Any) -> Array:
            ahead = (start + (lanes >> cut.shift)) * cut.keys + (lanes & (cut.columns - 1))
            return (x == lowest) & (entry_numbers(LANES, cut) + ahead < number)

        return count(before)[0]

    return lowest, limit_of_ties(tied_before, k, reach, beyond, cut.steps * cut.keys)


def kept(ranks: Array, numbers: Array, threshold: Array, limit: Array) -> Array:
    """Which entries of these ranks and numbers are among the best, by what `threshold` found."""
    return (ranks > threshold) | ((ranks == threshold) & (numbers < limit))


def limit_of_ties(tied_before: Callable[[Array], Array], k: Array, reach: Array, beyond: Array, most: int) -> Array:
    """The first entry from which on those of the threshold's rank are left out.

    Args:
      tied_before: maps numbers to how many entries of that rank come before.
      k: how many are wanted.
      reach: how many reach the rank.
      beyond: how many exceed it.
      most: above all numbers.
    """
    # More may reach the threshold than are wanted: it is the score of several, of which the first ones are kept.
    lacking, low = k - beyond, jnp.zeros(k.shape, jnp.int32)
    high = jnp.where(reach > k, most, 0)

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = (low + high) >> 1
        enough = tied_before(middle) >= lacking
        searched = low < high
        return jnp.where(searched & ~enough, middle + 1, low), jnp.where(searched & enough, middle, high)

    with about(0):  # equal scores are rare
        limit = jax.lax.while_loop(lambda state: _any(state[0] < state[1]), halve, (low, high))[0]
    return jnp.where(reach > k, limit, TIED)


def narrow(
    count: Any, k: Array, lowest: Array, highest: Array, reach: Array, *, slack: int, several: bool
) -> tuple[Array, Array, Array]:
    """The largest rank in an interval that at least k of what is counted reach; any where at most `slack` more do.

    Halves the interval and guesses by the counts: guesses are quick where scores are spread evenly, which the best ones
    nearly are, and halving bounds the number of rounds.

    Args:
      count: maps ranks to how many reach each.
      k: how many are wanted.
      lowest: a rank that at least k reach.
      highest: less than k reach more.
      reach: how many reach `lowest`.
      slack: see above.
      several: whether a round halves, and guesses on both sides of what is wanted; else rounds do so in turn.

    Returns:
      The rank, how many reach it, and, where the interval has closed, how many exceed it.
    """

    def open_(lowest: Array, highest: Array, reach: Array) -> Array:
        return (lowest < highest) & (reach > k + slack)

    def cond(state: Any) -> Array:
        return _any(open_(*state[1:4]))

    def body(state: Any) -> Any:
        guesses, lowest, highest, reach, beyond = state
        width = highest - lowest  # negative where it overflows
        middle = (lowest >> 1) + (highest >> 1) + ((lowest | highest) & 1)

        def guess(aim: float) -> Array:
            more, fewer = ((x - y).astype(jnp.float32) for x, y in ((reach, k), (k, beyond)))
            share = (1 - aim) * more if aim >= 0 else more - aim * fewer
            share = (share + 0.5) / jnp.maximum(more + fewer, 1.0)
            ahead = (share * (0.5 * width.astype(jnp.float32))).astype(jnp.int32) * 2
            return jnp.where(width > 0, lowest + jnp.clip(ahead, 1, jnp.maximum(width, 1)), middle)

        points = [middle, *map(guess, GUESSES)] if several else [jnp.where(guesses > 0, guess(0.0), middle)]
        searched = open_(lowest, highest, reach)
        for point, found in zip(points, count(*points), strict=True):
            up, down = searched & (found >= k) & (point > lowest), searched & (found < k) & (point <= highest)
            lowest, reach = jnp.where(up, point, lowest), jnp.where(up, found, reach)
            highest, beyond = jnp.where(down, point - 1, highest), jnp.where(down, found, beyond)
        return 1 - guesses, lowest, highest, reach, beyond

    state = (jnp.int32(0), lowest, highest, reach, jnp.zeros(k.shape, jnp.int32))
    with about(ROUNDS[several]):
        _, lowest, _, reach, beyond = jax.lax.while_loop(cond, body, state)
    return lowest, reach, beyond


def total_of(counts: Array) -> Array:
    """Sums [Q, 8, 128] int32 over each query's register, everywhere in it; sums are below 2^24."""
    total = jnp.sum(counts.astype(jnp.float32), axis=1, keepdims=True)
    return jnp.broadcast_to(jnp.sum(total, axis=2, keepdims=True), counts.shape).astype(jnp.int32)


def _any(mask: Array) -> Array:
    return jnp.max(mask.astype(jnp.float32)) > 0
