"""Speculative decoding: the model checks drafts of the next tokens, whoever made them, in one step.

A step feeds each row its newest token and k drafts of those that follow (`drafters`). The model then samples after
every one of them, exactly as it would one token at a time: with random numbers that come from the row's seed and the
new token's position (`sampling`). A draft is right when it is the token that was sampled in its place, and all tokens
up to the first wrong draft's are the row's.

Given logits, seed and position a token is determined, whatever the drafts: a row's text is that of plain decoding,
token by token, at any temperature and with any filters, and so is its distribution over seeds. (Rejection sampling, the
usual way, reproduces the distribution alone: there a seed's text depends on how well the drafts were guessed.)

How far a step gets is each row's own affair. What was fed in vain is taken back.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.infer.engine.history import History
from v4_jax.infer.engine.sampling import SamplingBatch, best, sample
from v4_jax.outputs import Routing


class StepOutput(NamedTuple):
    """What a step yields.

    Attributes:
      ids: [B, 1 + k] int32 tokens sampled after each token that was fed.
      logprobs: [B, 1 + k] float32 their log-probabilities.
      counts: [B] int32 how many of them, the first ones, continue the row.
      offered: [B] int32 drafts that were fed.
      alternatives: ids and log-probabilities [B, 1 + k, K] of the most probable tokens in their places, see
        `v4_jax.infer.engine.sampling.best`; zeros if nobody asked, None if they are not to be read.
      routing: decisions for the tokens that were fed, where they are kept.
    """

    ids: Array
    logprobs: Array
    counts: Array
    offered: Array
    alternatives: tuple[Array, Array] | None
    routing: Routing | None = None


class SamplingInputs(NamedTuple):
    """How a step's tokens are sampled.

    Attributes:
      sampling: each row's parameters.
      allowed: see `v4_jax.infer.engine.sampling.sample`. What holds for a row that is offered no drafts only.
      forced: likewise.
      wants_alternatives: [] bool whether anyone asks for them.
    """

    sampling: SamplingBatch
    allowed: Array
    forced: Array
    wants_alternatives: Array


class Acceptance(NamedTuple):
    """How often drafts of one depth were right.

    Attributes:
      offered: drafts that were fed.
      accepted: those of them that were right, and all drafts before them too.
    """

    offered: int
    accepted: int


class DraftCounts:
    """How often drafts were right so far, by depth.

    Args:
      depth: drafts of a step.

    Attributes:
      by_depth: of the first guess of each step, the second, and so on.
      steps: of rows that take drafts, those in which none was fed included.
    """

    def __init__(self, depth: int = 0) -> None:
        self.by_depth: tuple[Acceptance, ...] = (Acceptance(0, 0),) * depth
        self.steps = 0

    def add(self, offered: int, accepted: int) -> None:
        """Counts a step of a row: drafts that were fed, and how many of them, the first ones, were right."""
        self.steps += 1
        self.by_depth = tuple(
            Acceptance(one.offered + (depth < offered), one.accepted + (depth < accepted))
            for depth, one in enumerate(self.by_depth)
        )


def verify(
    logits: Array,
    tokens: Array,
    going: Array,
    offered: Array,
    inputs: SamplingInputs,
    positions: Array,
    history: History,
) -> tuple[StepOutput, History]:
    """Samples after every token that was fed, and counts how far the drafts among them were right.

    Args:
      logits: [B, 1 + k, V] float32, of `tokens`.
      tokens: [B, 1 + k] int32 each row's newest token and its drafts.
      going: [B] bool the rows that take part.
      offered: [B] int32 how many drafts are to be considered, from 0 to k.
      inputs: how tokens are sampled.
      positions: [B] int32 position of the newest token in its row.
      history: the tokens before the first that is sampled.

    Returns:
      What the step yields, and the history with it.
    """
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(best, logits[:, 0]))

    def check(
        carry: tuple[History, Array], x: tuple[Array, Array, Array]
    ) -> tuple[tuple[History, Array], tuple[Array, Array, Array, tuple[Array, Array]]]:
        """One position: what is sampled there, and whether the token fed after it is the same."""
        history, accepting = carry
        logits, following, number = x
        ids, logprobs = sample(logits, inputs.sampling, positions + 1 + number, history, inputs.allowed, inputs.forced)
        alternatives = jax.lax.cond(inputs.wants_alternatives, lambda: best(logits), lambda: nothing)
        right = (following == ids) & (number < offered)
        with jax.named_scope("engine.history"):
            history = history.generate(ids, accepting)
        return (history, accepting & right), (ids, logprobs, accepting, alternatives)

    # One position at a time, each as in plain decoding: penalties see the tokens before, and sampling all at once would
    # hold k more sorted vocabularies. Nothing follows the last one.
    following = jnp.concatenate([tokens[:, 1:], jnp.full_like(tokens[:, :1], -1)], axis=1)
    numbers = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    by_position = jnp.moveaxis(logits, 1, 0), following.T, numbers
    (history, _), (ids, logprobs, accepted, others) = jax.lax.scan(check, (history, going), by_position)
    best_ids, best_logprobs = (jnp.moveaxis(x, 0, 1) for x in others)
    counts = jnp.sum(accepted, axis=0, dtype=jnp.int32)
    fed = jnp.where(going, offered, 0)
    return StepOutput(ids.T, logprobs.T, counts, fed, (best_ids, best_logprobs)), history
