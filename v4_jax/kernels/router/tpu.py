"""The choice of experts for few tokens in one operation on TPUs, where XLA makes a dozen of a sort and a gather."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from v4_jax.kernels.block_scales import LANES

ROWS = 128  # at most: the scores of so many tokens stay in registers and VMEM


def supports(scores: Array) -> bool:
    """Whether `best_experts` takes scores [..., E]."""
    return scores.size // scores.shape[-1] <= ROWS and scores.shape[-1] % LANES == 0 and scores.dtype == jnp.float32


def best_experts(
    affinities: Array, scores: Array, top: int, factor: float, *, interpret: bool = False
) -> tuple[Array, Array]:
    """See `reference.best_experts`. Not differentiable.

    Raises:
      NotImplementedError: `supports` says no.
    """
    if not supports(scores):
        raise NotImplementedError(
            f"scores {scores.dtype}{list(scores.shape)}: expected float32 of at most {ROWS} tokens, and experts in "
            f"multiples of {LANES}"
        )
    *leading, count = scores.shape
    tokens = scores.size // count
    chosen, weights = pl.pallas_call(
        functools.partial(_kernel, top=top, factor=factor),
        out_shape=[
            jax.ShapeDtypeStruct((tokens, top), jnp.int32),
            jax.ShapeDtypeStruct((tokens, top), jnp.float32),
        ],
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=8 * tokens * (count + top), transcendentals=0),
        interpret=interpret,
        name="best_experts",
    )(affinities.reshape(tokens, count), scores.reshape(tokens, count))
    return chosen.reshape(*leading, top), weights.reshape(*leading, top)


def _kernel(affinities: Any, scores: Any, chosen: Any, weights: Any, *, top: int, factor: float) -> None:
    left, (tokens, count) = scores[...], scores.shape
    number = jax.lax.broadcasted_iota(jnp.int32, left.shape, 1)
    place = jax.lax.broadcasted_iota(jnp.int32, (tokens, top), 1)
    numbers, found = jnp.zeros((tokens, top), jnp.int32), jnp.zeros((tokens, top), jnp.float32)
    for i in range(top):
        highest = jnp.max(left, axis=1, keepdims=True)
        best = jnp.min(jnp.where(left == highest, number, count - 1), axis=1, keepdims=True)
        own = number == best
        affinity = jnp.sum(jnp.where(own, affinities[...], 0.0), axis=1, keepdims=True)
        numbers, found = jnp.where(place == i, best, numbers), jnp.where(place == i, affinity, found)
        left = jnp.where(own, -jnp.inf, left)
    chosen[...] = numbers
    weights[...] = found / jnp.sum(found, axis=1, keepdims=True) * factor
