"""Softmaxes over some of the keys, in the two forms in which they are handed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

STATISTICS = 128  # channels of `Packed` that follow those of the sum: a TPU register's


class Partial(NamedTuple):
    """Softmax over some of the keys, in a form that can be merged with the rest.

    Attributes:
      maximum: [B, Q, H] float32 largest logit; no gradient flows to it.
      total: [B, Q, H] float32 sum of exp(logit - maximum).
      weighted: [B, Q, H, C] sum of exp(logit - maximum) * value; float32, but rounded to the dtype of the queries where
        kernels give the gradients.
    """

    maximum: Array
    total: Array
    weighted: Array


class Packed(NamedTuple):
    """Several of them, each in one array: as they travel, and as kernels hand them on.

    Attributes:
      parts: [n, B, Q, H, C + 128] float32: `weighted`, `maximum`, `total`, and zeros.
    """

    parts: Array


def packed(partial: Partial) -> Array:
    """A partial softmax in one array [B, Q, H, C + 128], see `Packed`."""
    statistics = jnp.stack([partial.maximum, partial.total], axis=-1)
    room = [(0, 0)] * (statistics.ndim - 1) + [(0, STATISTICS - 2)]
    return jnp.concatenate([partial.weighted, jnp.pad(statistics, room)], axis=-1)


def separate(partials: Sequence[Partial | Packed]) -> list[Partial]:
    """Partial softmaxes one by one, each in arrays of its own."""
    found = []
    for some in partials:
        if isinstance(some, Packed):
            size = some.parts.shape[-1] - STATISTICS
            found += [Partial(x[..., size], x[..., size + 1], x[..., :size]) for x in some.parts]
        else:
            found.append(some)
    return found


def shape_of(some: Partial | Packed) -> tuple[int, ...]:
    """[B, Q, H, C]."""
    if isinstance(some, Partial):
        return some.weighted.shape
    *leading, channels = some.parts.shape[1:]
    return (*leading, channels - STATISTICS)
