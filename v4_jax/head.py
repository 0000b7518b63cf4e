"""Log-probabilities from logits, whole or split over devices, and work on tokens block by block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sharding.collectives import Axes, pmax, psum

TOKEN_BLOCK = 1024  # tokens whose logits exist at once


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def log_probability(logits: Array, tokens: Array, axes: Axes = ()) -> Array:
    """Log-probabilities [...] of `tokens` [...] under `logits` [..., V].

    Args:
      logits: float32.
      tokens: int32; an id that is not among these logits adds nothing.
      axes: mesh axes whose devices each have another part of the vocabulary; ids then count from the device's first.
    """
    return _forward(logits, tokens, axes)[0]


def _forward(logits: Array, tokens: Array, axes: Axes) -> tuple[Array, Any]:
    vocabulary = logits.shape[-1]
    here = (tokens >= 0) & (tokens < vocabulary)
    found = jnp.take_along_axis(logits, jnp.clip(tokens, 0, vocabulary - 1)[..., None], axis=-1)[..., 0]
    chosen = psum(jnp.where(here, found, 0), axes)
    largest = pmax(jnp.max(logits, axis=-1), axes)
    # Computed once, for the sum and for the backward pass; fused into the sum they would be computed again, and slowly.
    powers = jax.lax.optimization_barrier(jnp.exp(logits - largest[..., None]))
    total = psum(jnp.sum(powers, axis=-1), axes)
    return chosen - largest - jnp.log(total), (powers, tokens, total)


def _backward(axes: Axes, residuals: Any, gradient: Array) -> tuple[Array, None]:
    """In one pass over the logits. Every device has the whole gradient, of which all of them together make one sum."""
    powers, tokens, total = residuals
    gradient = psum(gradient, axes)
    one = jnp.arange(powers.shape[-1]) == tokens[..., None]
    return gradient[..., None] * one - (gradient / total)[..., None] * powers, None


log_probability.defvjp(_forward, _backward)


def by_token_blocks(function: Callable[[Any], Array], x: Any) -> Array:
    """Runs `function` on blocks of at most `TOKEN_BLOCK` tokens; of several, again in the backward pass.

    Args:
      function: maps a pytree of [T, ...] arrays to [T, ...], each token by itself.
      x: pytree of [B, S, ...] arrays.

    Returns:
      [B, S, ...].
    """
    batch, length = jax.tree.leaves(x)[0].shape[:2]
    tokens = batch * length
    count = -(-tokens // TOKEN_BLOCK)
    size = -(-tokens // count)

    def cut(x: Array) -> Array:
        flat = x.reshape(tokens, *x.shape[2:])
        padded = jnp.pad(flat, [(0, count * size - tokens)] + [(0, 0)] * (flat.ndim - 1))
        return padded.reshape(count, size, *flat.shape[1:])

    if count == 1:
        return function(jax.tree.map(lambda x: x.reshape(tokens, *x.shape[2:]), x)).reshape(batch, length)
    blocks = jax.lax.map(jax.checkpoint(function), jax.tree.map(cut, x))
    return blocks.reshape(count * size, *blocks.shape[2:])[:tokens].reshape(batch, length, *blocks.shape[2:])
