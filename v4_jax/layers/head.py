"""Log-probabilities from logits, and the loss they make without an array of [tokens, vocabulary]."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.policy import einsum
from v4_jax.sharding.collectives import Axes, pmax, psum
from v4_jax.sharding.platform import platform_of_mesh

LOGITS = 2**25  # logits that a device has at once in a loss


def log_probability(logits: Array, tokens: Array) -> Array:
    """Log-probabilities [...] of int32 `tokens` [...] under float32 `logits` [..., V]."""
    return _log_probability(logits, tokens, (), -1)[0]


def log_softmax(logits: Array, axes: Axes, axis: int) -> Array:
    """Log-probabilities of float32 logits, whose array axis `axis` is the vocabulary, split over mesh axes `axes`."""
    largest = pmax(jnp.max(logits, axis, keepdims=True), axes)
    return logits - largest - jnp.log(psum(jnp.sum(jnp.exp(logits - largest), axis, keepdims=True), axes))


def _log_probability(logits: Array, tokens: Array, axes: Axes, axis: int) -> tuple[Array, Array, Array]:
    """As above, of logits whose array axis `axis` is the vocabulary, split over the mesh axes `axes`, tokens counting
    from the device's first; the powers, and their sum.
    """
    vocabulary = logits.shape[axis]
    here = (tokens >= 0) & (tokens < vocabulary)
    found = jnp.take_along_axis(logits, jnp.expand_dims(jnp.clip(tokens, 0, vocabulary - 1), axis), axis)
    chosen = psum(jnp.where(here, jnp.squeeze(found, axis), 0), axes)
    largest = pmax(jnp.max(logits, axis), axes)
    # Computed once, for the sum and for the gradient: TPUs do both in one pass; elsewhere exponentials that are fused
    # into the sum would be computed again, and slowly.
    powers = jnp.exp(logits - jnp.expand_dims(largest, axis))
    if platform_of_mesh() == "tpu":
        powers, total = jax.lax.optimization_barrier((powers, jnp.sum(powers, axis)))
    else:
        powers = jax.lax.optimization_barrier(powers)
        total = jnp.sum(powers, axis)
    total = psum(total, axes)
    return chosen - largest - jnp.log(total), powers, total


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(hidden: Array, head: Array, tokens: Array, weights: Array, axes: Axes = ()) -> Array:
    """Weighted sum of the negative log-probabilities of tokens, block of tokens by block.

    Where a gradient is asked for, each block's is computed beside its loss, while its logits exist: they are neither
    kept nor computed again.

    Args:
      hidden: [T, D] what the head is applied to.
      head: [V, D], of the dtype of `hidden`, or wider.
      tokens: [T] int32; an id that is not among these V has its logit on another device.
      weights: [T] float32; they have no gradient.
      axes: mesh axes whose devices each have another part of the vocabulary; ids count from the device's first.

    Returns:
      A float32 number; every device of `axes` has the whole sum, and of the gradient of `hidden` its own part.
    """

    def block(x: tuple[Array, ...]) -> Array:
        hidden, tokens, weights = x
        return _block(hidden, tokens, weights, head, axes)[0]

    return jnp.sum(jax.lax.map(block, blocks(head, hidden, tokens, weights)))


def _block(hidden: Array, tokens: Array, weights: Array, head: Array, axes: Axes) -> tuple[Array, Array, Array]:
    """The loss of one block, and the powers [V, T] and sums [T] of its softmax.

    The vocabulary comes first: its largest logit and its sum are then passes over long vectors.
    """
    logits = einsum("vd,td->vt", head, hidden, dtype=jnp.float32)
    scores, powers, total = _log_probability(logits, tokens, axes, 0)
    return -jnp.sum(weights * scores), powers, total


def blocks(head: Array, *arrays: Array) -> tuple[Array, ...]:
    """[T, ...] arrays as [blocks, tokens of one, ...], with zeros behind the last token.

    A block adds to the whole gradient of the head: it has enough tokens for its products to outweigh that.
    """
    tokens, (vocabulary, width) = arrays[0].shape[0], head.shape
    count = -(-tokens // max(LOGITS // vocabulary, width // 2))
    size = -(-tokens // count)

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, count * size - tokens)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(count, size, *x.shape[1:])

    return tuple(map(cut, arrays))


class _Gradient(NamedTuple):
    """What the gradient of a loss comes to, where that of the loss itself is 1.

    Attributes:
      of_hidden: [T, D] float32.
      of_head: [V, D] float32.
      hidden: of no elements, for its dtype.
      head: the same.
    """

    of_hidden: Array
    of_head: Array
    hidden: Array
    head: Array

    def times(self, gradient: Array) -> tuple[Array, Array]:
        """The gradients of hidden states and head."""
        of_hidden, of_head = (gradient * self.of_hidden, gradient * self.of_head)
        return of_hidden.astype(self.hidden.dtype), of_head.astype(self.head.dtype)


def with_gradient(
    of_block: Callable[..., tuple[Array, Array]], hidden: Array, head: Array, *arrays: Array
) -> tuple[Array, _Gradient]:
    """A sum over blocks of tokens of what a function makes of their logits, and its gradient.

    Args:
      of_block: `(hidden, *arrays)` of a block's tokens -> its loss, and the gradient to its logits [V, T], float32.
      hidden: [T, D] what the head is applied to.
      head: [V, D].
      *arrays: [T, ...] of the tokens; zeros stand behind the last, for which the gradient must be zero.
    """
    dtype = jnp.result_type(hidden, head)

    def block(of_head: Array, x: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        loss, of_logits = of_block(*x)
        of_logits = jax.lax.optimization_barrier(of_logits.astype(dtype))  # or every tile of a product makes its own
        of_head = of_head + einsum("vt,td->vd", of_logits, x[0], dtype=jnp.float32)
        return of_head, (loss, einsum("vt,vd->td", of_logits, head, dtype=jnp.float32))

    zeros = jnp.zeros(head.shape, jnp.float32)
    of_head, (losses, of_hidden) = jax.lax.scan(block, zeros, blocks(head, hidden, *arrays))
    of_hidden = of_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return jnp.sum(losses), _Gradient(of_hidden, of_head, hidden[:0], head[:0])


def _forward(hidden: Array, head: Array, tokens: Array, weights: Array, axes: Axes) -> tuple[Array, Any]:
    def of_block(hidden: Array, tokens: Array, weights: Array) -> tuple[Array, Array]:
        loss, powers, total = _block(hidden, tokens, weights, head, axes)
        chosen = jnp.arange(head.shape[0])[:, None] == tokens
        # Subtracted before it is rounded: of a sure token the two are almost the same.
        return loss, weights / total * powers - weights * chosen

    return with_gradient(of_block, hidden, head, tokens, weights)


def _backward(axes: Axes, residuals: _Gradient, gradient: Array) -> tuple[Array, Array, None, None]:
    """Every device has the whole sum, and of its gradient a part: all of them together make one."""
    return *residuals.times(psum(gradient, axes)), None, None


cross_entropy.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def log_probabilities(hidden: Array, head: Array, tokens: Array, axes: Axes = ()) -> Array:
    """Log-probabilities of tokens, block of tokens by block; the backward pass makes each block's logits again.

    Args:
      hidden: [T, D] what the head is applied to.
      head: [V, D], of the dtype of `hidden`, or wider.
      tokens: [T] int32; as for `cross_entropy`.
      axes: as for `cross_entropy`.

    Returns:
      [T] float32; every device of `axes` has all of them, and of the gradient of `hidden` its own part.
    """

    def block(x: tuple[Array, ...]) -> Array:
        logits = einsum("vd,td->vt", head, x[0], dtype=jnp.float32)
        return _log_probability(logits, x[1], axes, 0)[0]

    return jax.lax.map(block, blocks(head, hidden, tokens)).reshape(-1)[: len(tokens)]


def _scores_backward(axes: Axes, residuals: Any, gradient: Array) -> tuple[Array, Array, None]:
    """That of the cross-entropy whose weights are the gradient, which is negative."""
    hidden, head, tokens = residuals
    found = _forward(hidden, head, tokens, -psum(gradient, axes), axes)[1]
    return *found.times(jnp.float32(1)), None


log_probabilities.defvjp(lambda *x: (log_probabilities(*x), x[:3]), _scores_backward)
