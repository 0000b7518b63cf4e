"""Compressed entries: how they are made, and how the indexer picks them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jax import Array

from v4_jax.cache.entries import Entries
from v4_jax.cache.ring import Ring
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels.choose.forms import Form, pull, with_gradients
from v4_jax.kernels.compressor import tpu as compressor_tpu
from v4_jax.kernels.compressor.tpu import CompressorWeights
from v4_jax.kernels.indexer import cpu as indexer_cpu
from v4_jax.kernels.indexer import reference as indexer
from v4_jax.kernels.indexer import selection
from v4_jax.kernels.indexer import tpu as indexer_tpu
from v4_jax.kernels.rotary.reference import Steps
from v4_jax.layers.visible import Visible
from v4_jax.layout import Layout
from v4_jax.sharding.platform import by_platform, interpreting


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
