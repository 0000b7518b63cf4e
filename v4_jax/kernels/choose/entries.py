"""Compressed entries: how they are made, and how the indexer picks them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from v4_jax.cache.entries import Entries
from v4_jax.cache.ring import Ring
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels.choose.forms import Form, pull, with_gradients
from v4_jax.kernels.compressor import tpu as compressor_tpu
from v4_jax.kernels.compressor.tpu import CompressorWeights
from v4_jax.kernels.indexer import cpu as indexer_cpu
from v4_jax.kernels.indexer import devices as indexer_devices
from v4_jax.kernels.indexer import marks, selection
from v4_jax.kernels.indexer import reference as indexer
from v4_jax.kernels.indexer import tpu as indexer_tpu
from v4_jax.kernels.indexer.marks import Marks
from v4_jax.kernels.rotary.reference import Steps
from v4_jax.layers.visible import Visible
from v4_jax.layout import Layout
from v4_jax.sharding import collectives
from v4_jax.sharding.platform import by_platform, interpreting, platform_of_mesh
from v4_jax.sharding.top_k import distributed_top_k


def compress(
    plain: Form,
    projected: Sequence[Array],
    weights: CompressorWeights,
    open_blocks: Ring,
    entries: Entries,
    layout: Layout,
    steps: Steps,
) -> tuple[StoredRows, StoredRows]:
    """See `compressor.tpu.step` for all arguments but the first. It has no gradients.

    Args:
      plain: maps values, gates, open blocks and entries to the same results.
      projected: values and gates.
      weights: what turns them into entries.
      open_blocks: projections of earlier tokens.
      entries: earlier entries.
      layout: of the chunk.
      steps: what becomes of a pooled entry.
    """

    def kernel(values: Array, gates: Array, open_blocks: Ring, entries: Entries) -> tuple[StoredRows, StoredRows]:
        return compressor_tpu.step(
            (values, gates), weights, open_blocks, entries, layout, steps=steps, interpret=interpreting()
        )

    if not compressor_tpu.supports(open_blocks, entries, weights.norm.shape[0]):
        return plain(*projected, open_blocks, entries)
    return by_platform(*projected, open_blocks, entries, default=plain, tpu=kernel)


def index_scores(queries: Array, weights: Array, keys: Array) -> Array:
    """See `indexer.reference.index_scores`."""
    by_heads = indexer_cpu.index_scores
    scores = functools.partial(by_platform, default=indexer.index_scores, cpu=by_heads)
    return with_gradients(scores, default=pull(indexer.index_scores), cpu=pull(by_heads))(queries, weights, keys)


def best_entries(
    queries: Array, weights: Array, keys: Entries, visible: Visible, *, top: int, scored: bool
) -> tuple[Array | None, Array]:
    """See `indexer.selection.best_entries`. It has no gradients."""
    if keys.count <= top:
        return selection.all_entries(index_scores, queries, weights, keys, visible, scored=scored)
    plain = functools.partial(selection.best_entries, index_scores, top=top, scored=scored)
    if not indexer_tpu.supports(queries, keys, top):
        return plain(queries, weights, keys, visible)
    share = 1 if keys.cached else 0.5
    kernel = functools.partial(indexer_tpu.best_entries, top=top, scored=scored, share=share, interpret=interpreting())
    return by_platform(queries, weights, keys, visible, default=plain, tpu=kernel)


def marked_entries(queries: Array, weights: Array, keys: Entries, visible: Visible, *, top: int) -> Array | Marks:
    """The best entries for attention that hides all others: as marks where kernels make them, or else their numbers.

    The arguments are those of `best_entries`. It has no gradients.
    """
    fits = indexer_tpu.supports(queries, keys, top) and marks.supports(queries.shape[1], keys.count)
    if platform_of_mesh() != "tpu" or keys.count <= top or not fits:
        return best_entries(queries, weights, keys, visible, top=top, scored=False)[1]

    def plain(queries: Array, weights: Array, keys: Entries, visible: Visible) -> Marks:
        numbers = selection.best_entries(index_scores, queries, weights, keys, visible, top=top, scored=False)[1]
        return Marks.of_numbers(numbers, keys.count)

    kernel = functools.partial(indexer_tpu.marks_of, top=top, share=0.5, interpret=interpreting())
    return by_platform(queries, weights, keys, visible, default=plain, tpu=kernel)


def best_of_devices(
    queries: Array, weights: Array, keys: Entries, visible: Visible, *, top: int
) -> tuple[Array, Array, Array]:
    """The best entries of all devices. It has no gradients.

    Args:
      queries: [B, Q, heads, C] index queries.
      weights: [B, Q, heads] float32 head weights.
      keys: index keys of every entry, spread over devices.
      visible: which of them the queries see, in local numbers.
      top: how many to keep.

    Returns:
      [B, Q, top] int32 numbers of the best, -1 after the last, the same on every device. Of equal scores the earlier
      entries are kept. And local numbers [B, Q, K] of those of them that lie here, -1 after the last, and how many they
      are, [B, Q].
    """
    axes, devices = keys.axes, collectives.size(keys.axes)
    own = min(top, keys.count)
    by_kernel = own == top < keys.count and indexer_tpu.supports(queries, keys, top)

    def sorted_out(queries: Array, weights: Array, keys: Entries, visible: Visible) -> tuple[Array, Array, Array]:
        scores, local = best_entries(queries, weights, keys, visible, top=own, scored=True)
        assert scores is not None
        numbers = distributed_top_k(scores, keys.numbers(local), top, axes)
        here = -jnp.sort(-keys.local(numbers), axis=-1)[..., :own]
        return numbers, here, jnp.sum(here >= 0, axis=-1, dtype=jnp.int32)

    def kernels(queries: Array, weights: Array, keys: Entries, visible: Visible) -> tuple[Array, Array, Array]:
        operands, shape = (queries, weights, keys, visible), queries.shape[:2]
        if by_kernel:
            found = indexer_tpu.candidates(*operands, top=top, interpret=interpreting())
        else:
            found = indexer_devices.joined(*best_entries(*operands, top=own, scored=True))
        everywhere = collectives.all_gather(found.reshape(1, -1, found.shape[2]), axes, 0)
        here, filled, thresholds, limits = indexer_devices.best_of_devices(
            everywhere, collectives.index(axes), top, interpret=interpreting()
        )
        chosen = indexer_devices.chosen(everywhere, thresholds, limits, min(top, devices * own))
        return chosen.reshape(*shape, -1), here[:, :own].reshape(*shape, own), filled.reshape(shape)

    operands = queries, weights, keys, visible
    if not indexer_devices.supports(own, devices):
        return sorted_out(*operands)
    return by_platform(*operands, default=sorted_out, tpu=kernels)
