"""How many drafts of a step are verified: as many as are worth their place in it.

A step feeds every row its newest token and some of its drafts, all rows equally many places. With few rows the weights
have to be read anyway, and all drafts ride along; with many, a step of more places takes longer, for everybody. What a
step of each width costs was measured on the devices. What a place is worth, the drafter's confidence tells: the product
of a row's first i confidences is the chance that its draft i is accepted. Of the widths there are, the one is taken
from which most tokens a second are expected (DSpark, arXiv 2607.05147).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def step_widths(depth: int, slots: int, confident: bool) -> tuple[int, ...]:
    """Widths that steps are compiled for, in tokens of a row, rising: the last feeds all drafts.

    Args:
      depth: drafts of a row.
      slots: rows. One alone is served best by all of its drafts.
      confident: whether the drafter says what its drafts are worth.
    """
    every = 1 + depth
    return tuple(sorted({1, 1 + depth // 2, every})) if confident and slots > 1 else (every,)


def expected_tokens(confidence: Array, going: Array, offered: Array, widths: tuple[int, ...]) -> Array:
    """Tokens [widths] float32 that a step of each width is expected to yield, all rows together.

    Args:
      confidence: [B, depth] float32, before a sigmoid, that each draft is right if those before it are.
      going: [B] bool the rows that take part.
      offered: [B] int32 drafts that each may be fed.
      widths: tokens of a row.
    """
    accepted = jnp.cumprod(jax.nn.sigmoid(confidence), axis=1)
    number = jnp.arange(confidence.shape[1])
    accepted = jnp.where(going[:, None] & (number < offered[:, None]), accepted, 0)
    by_place = jnp.concatenate([jnp.sum(going, dtype=jnp.float32)[None], jnp.sum(accepted, axis=0)])
    return jnp.cumsum(by_place)[jnp.asarray(widths) - 1]


def best_width(expected: Array, seconds: Array, going: Array) -> Array:
    """Which width to take, [] int32: the most expected tokens a second; the last while a row runs alone.

    Args:
      expected: [widths] tokens.
      seconds: [widths] float32 that a step takes.
      going: [B] bool the rows that take part.
    """
    best = jnp.argmax(expected / seconds)
    return jnp.where(jnp.sum(going) > 1, best, len(expected) - 1).astype(jnp.int32)
