"""Attention over a sliding window and, where all of them are visible, compressed entries, in one softmax."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.cache.entries import Entries
from v4_jax.cache.ring import Ring
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels import choose
from v4_jax.kernels.indexer.marks import Marks, numbers_of
from v4_jax.layers.entry_attention import attend_copies, attend_range
from v4_jax.layers.linear import grouped_linear, linear
from v4_jax.layers.partial_softmax import attend, finish, merge, nothing
from v4_jax.layers.partials import Packed, Partial, separate
from v4_jax.layers.rotary import Turn, rotate
from v4_jax.layers.visible import Visible
from v4_jax.layout import Layout
from v4_jax.number_formats import Weight
from v4_jax.sharding.split import UNSPLIT


def attend_window(
    queries: Array,
    keys: Array | None,
    oldest: Array | None,
    entries: Entries | None = None,
    visible: Visible | None = None,
    together: bool = False,
    picked: Array | Marks | None = None,
    cached: bool = False,
) -> Partial | Packed:
    """Attention of a block of queries over its window, or visible entries, or both.

    Args:
      queries: [B, Q, H, C].
      keys: [B, past + Q, C] of the window: query q sees at most those from q to q + past. None: no window.
      oldest: [B, Q] int32 the first of the keys that a query's document has, see `QueryBlock`.
      entries: the entries, of which those that lie here are attended. None: no entries.
      visible: which of them the queries see.
      together: whether to return one `Packed` softmax, to be handed to other devices.
      picked: [B, Q, K] int32 those of the entries that are attended, -1 for none, or marks of them, where
        `attends_in_training`. None: all that are visible.
      cached: whether the window's keys are a cache's, so that there are no gradients.
    """
    scope = "window" if entries is None else "hca" if picked is None else "csa"
    with jax.named_scope("attention." + scope):
        operands = (queries, keys, oldest, entries, visible)
        return choose.window_attention(attend_in_parts, *operands, together, picked, cached)


def attend_in_parts(
    queries: Array,
    keys: Array | None,
    oldest: Array | None,
    entries: Entries | None,
    visible: Visible | None,
    picked: Array | Marks | None = None,
) -> Partial:
    """The same by plain JAX: the window, and entries block by block, or copies of those that were picked."""
    partial = None
    if keys is not None and oldest is not None:
        number, own = jnp.arange(keys.shape[1]), jnp.arange(queries.shape[1])[:, None]
        first = jnp.maximum(oldest[..., None], own)
        with jax.named_scope("attention.window"):
            partial = attend(queries, keys, (number >= first) & (number <= own + keys.shape[1] - queries.shape[1]))
    if entries is not None and visible is not None:
        if picked is None:
            some = attend_range(queries, entries, visible)
        else:
            some = attend_copies(queries, entries, numbers_of(picked))
        partial = some if partial is None else merge(partial, some)
    if partial is None:
        partial = nothing(queries)
    return partial


@jax.named_scope("attention.window")
def attend_ring(
    queries: Array, keys: Array, ring: Ring, layout: Layout, past: int
) -> tuple[Partial | Packed, StoredRows]:
    """Stores a short chunk's keys, and attends its queries' windows.

    Args:
      queries: [B, Q, H, C], at most `SHORT` of each row.
      keys: [B, Q, C] of the same tokens, as they are stored.
      ring: the last keys of each row, and room for the chunk's.
      layout: where the chunk's tokens stand, on all devices.
      past: tokens before its own that a query sees.

    Returns:
      Attention over the window, and the rings of all layers with the chunk's keys.
    """
    return choose.window_step(step_in_parts, queries, keys, ring, layout, past)


def step_in_parts(
    queries: Array, keys: Array, ring: Ring, layout: Layout, past: int
) -> tuple[Partial | Packed, StoredRows]:
    """The same with the window read in order."""
    before, rows = ring.advance(keys, layout, past, UNSPLIT)
    seen = jnp.concatenate([before(), keys], axis=1)
    return attend_window(queries, seen, layout.first + past, cached=True), rows


def attention_output(partials: Sequence[Partial | Packed], sink: Array, turn: Turn, dtype: Any) -> Array:
    """What queries attended, rotated back: [B, Q, H * C] of `dtype`.

    Args:
      partials: of disjoint sets of keys.
      sink: [H] logits that take part in the denominator alone.
      turn: by how much the queries' positions turned them.
      dtype: of the result, and of what is rotated.
    """
    return choose.attention_output(output_in_parts, partials, sink, turn, dtype)


def attention_end(
    partials: Sequence[Partial | Packed],
    sink: Array,
    turn: Turn,
    weights: tuple[Weight, Weight],
    *,
    groups: int,
    dtype: Any,
) -> Array:
    """What comes of a sublayer: `attention_output`, projected by groups of heads, and from these to D: [B, Q, D].

    Args:
      partials: of disjoint sets of keys.
      sink: [H] logits that take part in the denominator alone.
      turn: by how much the queries' positions turned them.
      weights: of the two products, [groups * R, H * C / groups] and [D, groups * R].
      groups: of heads; each has its own matrix in the first weight.
      dtype: of the result, and of what is multiplied.
    """

    def by_products(partials: Sequence[Partial | Packed], sink: Array, turn: Turn, weights: Sequence[Weight]) -> Array:
        return project_output(attention_output(partials, sink, turn, dtype), weights, groups=groups, dtype=dtype)

    return choose.attention_end(by_products, partials, sink, turn, weights, groups=groups, dtype=dtype)


def project_output(output: Array, weights: Sequence[Weight], *, groups: int, dtype: Any) -> Array:
    """The two products of `attention_end` with what comes of `attention_output`."""
    output = grouped_linear(output.reshape(*output.shape[:2], groups, -1), weights[0], dtype)
    return linear(output.reshape(*output.shape[:2], -1), weights[1], dtype)


def output_in_parts(partials: Sequence[Partial | Packed], sink: Array, turn: Turn, dtype: Any) -> Array:
    """The same by plain JAX."""
    output = finish(functools.reduce(merge, separate(partials)), sink).astype(dtype)
    output = rotate(output, turn, inverse=True)
    return output.reshape(*output.shape[:2], -1)
