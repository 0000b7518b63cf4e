"""How far DSpark's drafts are from what the trunk would say, without an array of [drafts, vocabulary].

DSpark (arXiv 2607.05147), training: the cross-entropy of the token that stands there, and the L1 distance of a draft's
distribution p from the trunk's q. With s the signs of p - q, the gradient of the distance to the draft's logits is
p (s - sum(p s)). Speculative sampling takes a draft with probability sum(min(p, q)), which is 1 less half the distance.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.layers.head import blocks, log_softmax
from v4_jax.policy import einsum
from v4_jax.sharding.collectives import Axes, psum


class Drafted(NamedTuple):
    """What drafts come from, and what the trunk says in their places.

    Attributes:
      hidden: [T, D] what the head is applied to.
      embedded: [T, rank] rows of `markov_w1` of the tokens before them.
      markov: [V, rank] `markov_w2`.
      trunk: [T, D] the trunk's hidden states, without a gradient.
      head: [V, D] of both, without a gradient.
      tokens: [T] int32 the tokens that stand there; on a mesh that splits the vocabulary, counted from its first here.
      weights: [T] float32 what each counts; no gradient.
    """

    hidden: Array
    embedded: Array
    markov: Array
    trunk: Array
    head: Array
    tokens: Array
    weights: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def draft_loss(drafted: Drafted, cross_entropy: float, distance: float, axes: Axes = ()) -> tuple[Array, Array, Array]:
    """Weighted sum of the losses of drafts, block of drafts by block; where gradients are asked for, each beside it.

    Args:
      drafted: the drafts, of this device's part of the vocabulary.
      cross_entropy: what a nat of the token's negative log-probability counts.
      distance: what the L1 distance of the distributions counts, 2 at most.
      axes: mesh axes whose devices each have another part of the vocabulary.

    Returns:
      The sum, a float32 number; and of each draft [T] float32 negative log-probability and distance, which have no
      gradient. Every device of `axes` has the whole of them, and of the gradient of `hidden` its own part.
    """
    return _forward(drafted, cross_entropy, distance, axes, gradient=False)[0]


def _block(
    weights: tuple[float, float], axes: Axes, head: Array, markov: Array, *x: Array
) -> tuple[tuple[Array, Array], Array]:
    """Negative log-probabilities and distances [T] of one block, and the gradient of its loss to the logits [V, T]."""
    hidden, embedded, trunk, tokens, counted = x
    logits = einsum("vd,td->vt", head, hidden, dtype=jnp.float32)
    logits = logits + einsum("vr,tr->vt", markov, embedded, dtype=jnp.float32)
    scores = log_softmax(logits, axes, 0)
    theirs = jnp.exp(log_softmax(einsum("vd,td->vt", head, trunk, dtype=jnp.float32), axes, 0))
    ours, chosen = jnp.exp(scores), jnp.arange(head.shape[0])[:, None] == tokens
    signs = jnp.sign(ours - theirs)
    of_token = -psum(jnp.sum(jnp.where(chosen, scores, 0), axis=0), axes)
    apart = psum(jnp.sum(jnp.abs(ours - theirs), axis=0), axes)
    mean = psum(jnp.sum(ours * signs, axis=0), axes)
    gradient = weights[0] * (ours - chosen) + weights[1] * ours * (signs - mean)
    return (of_token, apart), counted * gradient


def _forward(
    drafted: Drafted, cross_entropy: float, distance: float, axes: Axes, *, gradient: bool = True
) -> tuple[tuple[Array, Array, Array], Any]:
    hidden, embedded, markov, trunk, head, tokens, weights = drafted
    run = functools.partial(_block, (cross_entropy, distance), axes, head, markov)

    def block(of_markov: Array, x: tuple[Array, ...]) -> Any:
        found, of_logits = run(*x)
        if not gradient:
            return of_markov, (found, ())
        dtype = jnp.result_type(hidden, head)
        of_logits = of_logits.astype(dtype)
        of_markov = of_markov + einsum("vt,tr->vr", of_logits, x[1], dtype=jnp.float32)
        of_tokens = tuple(einsum("vt,vd->td", of_logits, table, dtype=jnp.float32) for table in (head, markov))
        return of_markov, (found, of_tokens)

    def whole(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[: len(hidden)]

    cut = blocks(head, hidden, embedded, trunk, tokens, weights)
    of_markov, (found, of_tokens) = jax.lax.scan(block, jnp.zeros(markov.shape, jnp.float32), cut)
    of_token, apart = map(whole, found)
    loss = jnp.sum(weights * (cross_entropy * of_token + distance * apart))
    empty = hidden[:0], embedded[:0], markov[:0]  # for their dtypes
    return (loss, of_token, apart), ((*map(whole, of_tokens), of_markov), empty)


def _backward(cross_entropy: float, distance: float, axes: Axes, residuals: Any, gradients: Any) -> tuple[Drafted]:
    """Every device has the whole sum, and of its gradient a part: all of them together make one."""
    del cross_entropy, distance
    found, empty = residuals
    by = psum(gradients[0], axes)
    made: list[Any] = [(by * x).astype(like.dtype) for x, like in zip(found, empty, strict=True)]
    return (Drafted(*made, None, None, None, None),)  # type: ignore[arg-type]


draft_loss.defvjp(_forward, _backward)
