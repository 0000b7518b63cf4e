"""Speculative decoding: the multi-token-prediction block guesses the next tokens, and the model checks them at once.

A step feeds each row its newest token and k drafts of those that follow (DeepSeek-V3 technical report, section 5.4.3).
The model then samples after every one of them, exactly as it would one token at a time: with random numbers that come
from the row's seed and the new token's position (`sampling`). A draft is right when it is the token that was
sampled in its place, and all tokens up to the first wrong draft's are the row's.

Given logits, seed and position a token is determined, whatever the drafts: a row's text is that of plain decoding,
token by token, at any temperature and with any filters, and so is its distribution over seeds. (Rejection sampling, the
usual way, reproduces the distribution alone: there a seed's text depends on how well the drafts were guessed.)

Drafts are sampled with the same random numbers as the tokens that they stand for. The two draws agree more often than
independent ones would, because what the noise favours it favours in both: with equal distributions, always.

How far a step gets is each row's own affair. The block runs over the tokens that were accepted, with the trunk's
streams, which warms its window; from the last one it goes on over its own streams. What was fed in vain is taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.cache.cache import Cache
from v4_jax.cache.ring import MOST_ROLLED_BACK
from v4_jax.config import Config
from v4_jax.infer.engine.history import History
from v4_jax.infer.engine.sampling import SamplingRows, best, sample

DEEPEST = 4  # drafts of a step; the block was trained to look one token ahead, and gets worse with every further one

assert DEEPEST < MOST_ROLLED_BACK


class Taken(NamedTuple):
    """What a step yields.

    Attributes:
      ids: [B, 1 + k] int32 tokens sampled after each token that was fed.
      logprobs: [B, 1 + k] float32 their log-probabilities.
      counts: [B] int32 how many of them, the first ones, continue the row.
      alternatives: ids and log-probabilities [B, 1 + k, K] of the most probable tokens in their places, see
        `v4_jax.infer.engine.sampling.best`; zeros if nobody asked, None if they are not to be read.
    """

    ids: Any
    logprobs: Any
    counts: Any
    alternatives: Any


class Choice(NamedTuple):
    """How a step's tokens are chosen.

    Attributes:
      rows: sampling parameters.
      allowed: see `v4_jax.infer.engine.sampling.sample`. What holds for a row that is offered no drafts only.
      forced: likewise.
      best: [] bool whether anyone asks for alternatives.
    """

    rows: SamplingRows
    allowed: Array
    forced: Array
    best: Array


class Acceptance(NamedTuple):
    """How often drafts of one depth were right.

    Attributes:
      offered: drafts that were fed.
      accepted: those of them that were right, and all drafts before them too.
    """

    offered: int
    accepted: int


def check_depth(depth: int, config: Config) -> None:
    """Checks that a model can draft so many tokens.

    Raises:
      ValueError: it cannot.
    """
    if not 0 <= depth <= DEEPEST:
        raise ValueError(f"draft is {depth}, expected 0 (plain decoding) to {DEEPEST} tokens")
    if depth and not config.num_nextn_predict_layers:
        raise ValueError(
            f"draft is {depth}, but this model has no multi-token-prediction block to draft with; expected 0"
        )


def verify(
    logits: Array,
    fed: Array,
    going: Array,
    offered: Array,
    choice: Choice,
    positions: Array,
    history: History,
) -> tuple[Taken, History]:
    """Samples after every token that was fed, and counts how far the drafts among them were right.

    Args:
      logits: [B, 1 + k, V] float32, of the tokens `fed`.
      fed: [B, 1 + k] int32 each row's newest token and its drafts.
      going: [B] bool the rows that take part.
      offered: [B] int32 how many drafts are to be considered, from 0 to k.
      choice: how the tokens are chosen.
      positions: [B] int32 position of the newest token in its row.
      history: the tokens before the first that is sampled.

    Returns:
      What was taken, and the history with it.
    """
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(best, logits[:, 0]))

    def one(before: tuple[History, Array], x: Any) -> Any:
        history, taking = before
        logits, following, number = x
        ids, logprobs = sample(logits, choice.rows, positions + 1 + number, history, choice.allowed, choice.forced)
        alternatives = jax.lax.cond(choice.best, lambda: best(logits), lambda: nothing)
        right = (following == ids) & (number < offered)
        return (history.generate(ids, taking), taking & right), (ids, logprobs, taking, alternatives)

    # One position at a time, each as in plain decoding: penalties see the tokens before, and sampling all at once would
    # hold k more sorted vocabularies. Nothing follows the last one.
    following = jnp.concatenate([fed[:, 1:], jnp.full_like(fed[:, :1], -1)], axis=1)
    numbers = jnp.arange(fed.shape[1], dtype=jnp.int32)
    inputs = jnp.moveaxis(logits, 1, 0), following.T, numbers
    (history, _), (ids, logprobs, taken, alternatives) = jax.lax.scan(one, (history, going), inputs)
    others = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), alternatives)
    return Taken(ids.T, logprobs.T, jnp.sum(taken, axis=0, dtype=jnp.int32), others), history


def draft(
    block: Callable[..., Any],
    streams: Array,
    following: Array,
    counts: Array,
    rows: SamplingRows,
    cache: Cache,
    keep: Callable[[Any], Any],
) -> tuple[Array, Cache]:
    """Guesses k tokens after the newest ones.

    Args:
      block: `Transformer.mtp` with "last" logits: (streams, next tokens, lengths=..., cache=...) -> `Output`.
      streams: [B, 1 + k, hc, D] the trunk's, of the tokens that were fed.
      following: [B, 1 + k] int32 the tokens after them, the newest one last.
      counts: [B] int32 how many of both are the row's; 0 leaves its part of the cache as it is.
      rows: sampling parameters.
      cache: in which trunk and block have seen equally many tokens before; its lengths include the new ones.
      keep: makes logits whole on every device.

    Returns:
      Drafts [B, k] int32, and the cache in which the block has seen the row's tokens and no drafts.
    """
    going = jnp.minimum(counts, 1)

    def guess(output: Any, number: Array | int) -> Array:
        return sample(*keep((output.logits[:, 0], rows, cache.lengths + 1 + number)))[0]

    def further(before: tuple[Array, Array, Cache], number: Array) -> tuple[tuple[Array, Array, Cache], Array]:
        streams, token, cache = before
        output = block(streams, token[:, None], lengths=going, cache=cache)
        token = guess(output, number)
        return (output.streams, token, output.cache), token

    output = block(streams, following, lengths=counts, cache=cache)
    last = jnp.maximum(counts - 1, 0)[:, None, None, None]
    first = guess(output, 0)
    start = jnp.take_along_axis(output.streams, last, axis=1), first, output.cache
    (_, _, after), others = jax.lax.scan(further, start, jnp.arange(1, following.shape[1] - 1, dtype=jnp.int32))
    return jnp.concatenate([first[:, None], others.T], axis=1), after.rolled_back(
        draft_lengths=output.cache.draft_lengths
    )
