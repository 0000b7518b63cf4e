"""Causal work on a split sequence, shared out evenly.

Where a device attends for the tokens that it holds, the last one has twice the mean to do, and all wait for it: a query
sees as many entries as there are before it. So each hands the later half of its queries to the device that is as far
from the other end, and attends for those that it is handed; of n devices, number i then has the parts 2 i and
2 (n - 1 - i) + 1 of 2 n. What queries see of the window travels with them; every device has all entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.layers.query_blocks import Queries
from v4_jax.sharding.collectives import Axes, mirrored

T = TypeVar("T")


def exchanged(tree: T, axes: Axes) -> T:
    """The arrays [B, S, ...] with the later half of S handed to the mirrored device; and, done again, handed back.

    Args:
      tree: what belongs to a device's queries.
      axes: mesh axes that split the sequence; none: nothing is exchanged.
    """
    if not axes:
        return tree

    def exchange(x: Array) -> Array:
        early, late = jnp.split(x, 2, axis=1)
        return jnp.concatenate([early, mirrored(late, axes)], axis=1)

    return jax.tree.map(exchange, tree)


def in_halves(
    attend: Callable[[Array, Array, Queries], T], tail: Array, keys: Array, queries: Queries, axes: Axes
) -> T:
    """Attends queries that are exchanged, [B, S], of which the later half belong to another window.

    Args:
      attend: from the keys before the first, keys and queries to a pytree of [B, S, ...] arrays.
      tail: [B, past, C] keys before this device's first.
      keys: [B, S, C] of this device's tokens.
      queries: exchanged.
      axes: mesh axes that split the sequence; none: nothing is exchanged.
    """
    if not axes:
        return attend(tail, keys, queries)
    past, half = tail.shape[1], keys.shape[1] // 2
    early, late = (jax.tree.map(lambda x, side=side: jnp.split(x, 2, axis=1)[side], queries) for side in (0, 1))
    handed = mirrored(jnp.concatenate([tail, keys], axis=1)[:, half:], axes)
    outputs = attend(tail, keys[:, :half], early), attend(handed[:, :past], handed[:, past:], late)
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *outputs)
