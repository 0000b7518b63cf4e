"""How far a model's distribution is from a teacher's, and its gradient, without an array of [tokens, vocabulary].

Reverse Kullback-Leibler divergence, KL(model || teacher), of on-policy distillation (technical report, post-training).
With p the model's probabilities and r the logarithms of the ratio of both distributions, it is sum(p r), and its
gradient to the model's logits is p (r - sum(p r)). A teacher says what r is; the rest is the same for all of them.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from v4_jax.layers.head import blocks, log_softmax, with_gradient
from v4_jax.policy import einsum
from v4_jax.sharding import collectives
from v4_jax.sharding.collectives import Axes, psum

_TINY = float(jnp.finfo(jnp.float32).tiny)  # what is left of a distribution is never 0: its logarithm is needed


class Teacher(Protocol):
    """A distribution over the vocabulary for each token: a pytree of arrays."""

    @property
    def tokens(self) -> tuple[Array, ...]:
        """What there is of each token: arrays [T, ...]."""

    def log_ratios(self, scores: Array, axes: Axes, *tokens: Array) -> Array:
        """Logarithms [V, T] of the ratio of a model's probabilities to its own.

        Args:
          scores: [V, T] float32 log-probabilities of the model, of this device's part of the vocabulary.
          axes: mesh axes that the vocabulary is split over.
          *tokens: of these tokens, what `tokens` has.
        """


class FullTeacher(struct.PyTreeNode):
    """All of a teacher's distribution, as what its head makes of its hidden states.

    Attributes:
      hidden: [..., D'] what the head is applied to; of any width.
      head: [V, D'] the teacher's.
    """

    hidden: Array
    head: Array

    @property
    def tokens(self) -> tuple[Array, ...]:
        """As for `Teacher`."""
        return (self.hidden.reshape(-1, self.hidden.shape[-1]),)

    def log_ratios(self, scores: Array, axes: Axes, *tokens: Array) -> Array:
        """As for `Teacher`."""
        logits = einsum("vd,td->vt", self.head, tokens[0], dtype=jnp.float32)
        return scores - log_softmax(logits, axes, 0)


class TopTeacher(struct.PyTreeNode):
    """The likeliest tokens of a teacher's distribution; all others count as one event.

    Attributes:
      ids: [..., k] int32 tokens, each once. On a mesh that splits the vocabulary, counted from the device's first.
      scores: [..., k + 1] float32 their log-probabilities, and that of all other tokens together.
    """

    ids: Array
    scores: Array

    @property
    def tokens(self) -> tuple[Array, ...]:
        """As for `Teacher`."""
        return tuple(x.reshape(-1, x.shape[-1]) for x in (self.ids, self.scores))

    def log_ratios(self, scores: Array, axes: Axes, *tokens: Array) -> Array:
        """As for `Teacher`; of a token that is none of the likeliest, the ratio of what both leave for those."""
        ids, theirs = tokens[0].T, tokens[1].T  # [k, T]
        vocabulary, columns = scores.shape[0], jnp.arange(scores.shape[1])
        here = (ids >= 0) & (ids < vocabulary)
        ours = jnp.where(here, jnp.take_along_axis(scores, jnp.clip(ids, 0, vocabulary - 1), axis=0), 0)
        ids = jnp.where(here, ids, vocabulary)  # dropped
        others = jnp.exp(scores).at[ids, columns].set(0, mode="drop")
        rest = jnp.log(jnp.maximum(psum(jnp.sum(others, axis=0), axes), _TINY)) - theirs[-1]
        ratios = jnp.broadcast_to(rest, scores.shape)
        return ratios.at[ids, columns].set(ours - theirs[:-1], mode="drop")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def reverse_divergence(hidden: Array, head: Array, teacher: Any, weights: Array, axes: Axes = ()) -> Array:
    """Weighted sum of the reverse divergences of tokens, block of tokens by block; a gradient comes with each block.

    Args:
      hidden: [T, D] what the head is applied to.
      head: [V, D], of the dtype of `hidden`, or wider.
      teacher: a `Teacher` of these tokens, of this device's part of the vocabulary. It has no gradient.
      weights: [T] float32; they have no gradient.
      axes: mesh axes whose devices each have another part of the vocabulary.

    Returns:
      A float32 number, in nats; every device of `axes` has the whole sum, and of the gradients its own part.
    """

    def block(x: tuple[Array, ...]) -> Array:
        return _block(head, teacher, axes, *x)[0]

    return jnp.sum(jax.lax.map(block, blocks(head, hidden, weights, *teacher.tokens)))


def _block(
    head: Array, teacher: Teacher, axes: Axes, hidden: Array, weights: Array, *tokens: Array
) -> tuple[Array, Array]:
    """The divergence of one block, and its gradient to the logits [V, T]."""
    scores = log_softmax(einsum("vd,td->vt", head, hidden, dtype=jnp.float32), axes, 0)
    ratios, probabilities = teacher.log_ratios(scores, axes, *tokens), jnp.exp(scores)
    divergence = psum(jnp.sum(probabilities * ratios, axis=0), axes)
    return jnp.sum(weights * divergence), weights * probabilities * (ratios - divergence)


def _forward(hidden: Array, head: Array, teacher: Any, weights: Array, axes: Axes) -> tuple[Array, Any]:
    return with_gradient(functools.partial(_block, head, teacher, axes), hidden, head, weights, *teacher.tokens)


def _backward(axes: Axes, residuals: Any, gradient: Array) -> tuple[Array, Array, None, None]:
    return *residuals.times(psum(gradient, axes)), None, None


reverse_divergence.defvjp(_forward, _backward)


def top_scores(hidden: Array, head: Array, k: int, axes: Axes = ()) -> tuple[Array, Array]:
    """The likeliest tokens of each hidden state, for a `TopTeacher`, block of tokens by block.

    Args:
      hidden: [T, D] what the head is applied to.
      head: [V, D].
      k: how many tokens, at most V.
      axes: mesh axes whose devices each have another part of the vocabulary.

    Returns:
      [T, k] int32 ids, counted from the first of the whole vocabulary, and [T, k + 1] float32 log-probabilities, the
      last that of all other tokens; the same on every device of `axes`.
    """
    first = collectives.index(axes) * head.shape[0]

    def block(x: tuple[Array, ...]) -> tuple[Array, Array]:
        scores = log_softmax(einsum("vd,td->vt", head, x[0], dtype=jnp.float32), axes, 0)
        best, ids = jax.lax.top_k(scores.T, min(k, head.shape[0]))
        best, ids = (collectives.all_gather(found, axes, 1) for found in (best, ids + first))
        best, places = jax.lax.top_k(best, k)
        ids = jnp.take_along_axis(ids, places, axis=1)
        local = jnp.where((ids >= first) & (ids < first + head.shape[0]), ids - first, head.shape[0])
        others = jnp.exp(scores).at[local.T, jnp.arange(len(x[0]))].set(0, mode="drop")
        rest = jnp.log(jnp.maximum(psum(jnp.sum(others, axis=0), axes), _TINY))
        return ids.astype(jnp.int32), jnp.concatenate([best, rest[:, None]], axis=1)

    found = jax.lax.map(block, blocks(head, hidden))
    ids, scores = (x.reshape(-1, x.shape[-1])[: len(hidden)] for x in found)
    return ids, scores
