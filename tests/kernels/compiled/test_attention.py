"""Attention over windows and entries, and the choice of entries."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.compiled.shapes import SPARE, copied, shape
from v4_jax import Config
from v4_jax.cache.entries import Entries
from v4_jax.cache.ring import Ring
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels.csa import tpu as csa
from v4_jax.kernels.indexer.devices import best_of_devices
from v4_jax.kernels.window.tpu import step
from v4_jax.layers.entry_attention import attend_picked
from v4_jax.layers.lightning_indexer import select
from v4_jax.layers.partial_softmax import finish
from v4_jax.layers.visible import Visible
from v4_jax.layers.window_attention import attend_window
from v4_jax.layout import SHORT, Layout


@pytest.mark.parametrize(("model", "queries", "paged"), [("flash", 1, True), ("flash", 32, False), ("pro", 3, True)])
def test_picked_entries_of_a_scan_over_layers(build, model, queries, paged):
    """1M tokens: entries are chosen and attended by kernels that read the cache where it lies."""
    config = getattr(Config, model)()
    layers, count, page = 2, config.max_position_embeddings // 4, 32
    heads, size = config.index_n_heads, config.index_head_dim

    def run(index_queries, weights, queries, keys, rows, table, high):
        visible = Visible(jnp.zeros_like(high), high, jnp.min(high), jnp.max(high))

        def layer(total, number):
            index = Entries(keys, number, jnp.bfloat16, table=table, page=page)
            picked = select(index_queries, weights, index, visible, config.index_topk)
            partial = attend_picked(queries, dataclasses.replace(index, rows=rows), *picked)
            return total + finish(partial, jnp.zeros(queries.shape[2])), None

        return jax.lax.scan(layer, jnp.zeros(queries.shape), jnp.arange(layers))[0]

    def rows(channels, **form):
        return jax.eval_shape(lambda: StoredRows.empty((layers, 1, count), channels, **form))

    arguments = (
        shape(jnp.bfloat16, 1, queries, heads, size),
        shape(jnp.float32, 1, queries, heads),
        shape(jnp.bfloat16, 1, queries, config.num_attention_heads, config.head_dim),
        rows(size, dtype=jnp.dtype("bfloat16")),
        rows(config.head_dim, kind="words"),
        shape(jnp.int32, 1, count // page) if paged else None,
        shape(jnp.int32, 1, queries),
    )
    compiled = build(run, *arguments)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    partials = 4 * 4 * queries * config.num_attention_heads * config.head_dim
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE + partials < 2 * count * size


def test_picks_that_are_spread_over_devices(build):
    """Decode of 128 rows on 16 devices: of 512 picks a row some 32 are here, which one turn attends."""
    words = shape(jnp.int32, 20 * 128 * 512, 2, 128)
    queries, place = shape(jnp.bfloat16, 128, 64, 512), shape(jnp.int32, 128, 512)
    attend = functools.partial(csa._attend, share=csa._share(512, 16), together=True, rounded=False, interpret=False)
    assert csa._share(512, 16) <= csa.ROWS[0]
    compiled = build(attend, queries, words, place, shape(jnp.int32, 128))
    assert copied(compiled) <= 2 * 128 * 64 * 512


@pytest.mark.parametrize(
    ("rows", "queries", "heads", "past", "entries", "dtype"),
    [
        (1, 512, 64, 127, 8192, "bfloat16"),  # prefill at a million tokens
        (1, 128, 128, 127, 0, "bfloat16"),  # Pro's window
        (1, 300, 8, 127, 1024, "bfloat16"),  # heads over eight devices, an uneven chunk
        (1, 1, 64, 127, 8192, "bfloat16"),  # decode at a million
        (128, 1, 8, 127, 256, "bfloat16"),  # decode of many rows
        (8, 1, 64, None, 4096, "bfloat16"),  # entries over devices
        (4, 4, 128, 127, 100, "bfloat16"),  # drafts; entries that are copied first
        (1, 64, 64, 127, 1024, "float32"),
    ],
)
def test_window_attention(build, rows, queries, heads, past, entries, dtype):
    """Entries are read where they lie in the stack of all layers, and nothing as large as logits is in memory."""
    layers, size, dtype = 3, 512, jnp.dtype(dtype)
    stack = jax.eval_shape(lambda: StoredRows.empty((layers, rows, max(entries, 1)), size, dtype=dtype))
    by_query = shape(jnp.int32, rows, queries)
    keys = None if past is None else shape(dtype, rows, past + queries, size)

    def run(queries, keys, stack, layer, low, high):
        held = Entries(stack, layer, dtype) if entries else None
        visible = Visible(low, high, jnp.min(low), jnp.max(high)) if entries else None
        return attend_window(queries, keys, None if keys is None else low, held, visible, cached=True)

    arguments = (shape(dtype, rows, queries, heads, size), keys, stack, shape(jnp.int32), by_query, by_query)
    compiled = build(run, *arguments)
    assert "tpu_custom_call" in compiled.as_text()
    window = 0 if keys is None else (past + queries + 128) * size
    copied_first = rows * entries * size if entries % 16 else 0
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE + 4 * (rows * window + copied_first)


@pytest.mark.parametrize(("rows", "queries", "heads"), [(1, 1, 8), (128, 1, 8), (3, 6, 64), (1, 9, 128)])
def test_short_windows(build, rows, queries, heads):
    """The ring of all layers is neither copied nor cut; it is updated in place."""
    layers, size, past = 43, 512, 127
    stored = jax.eval_shape(lambda: StoredRows.empty((layers, rows, past + 1 + SHORT - 1), size, dtype=jnp.bfloat16))

    def run(x, keys, stored, number, start, total):
        layout = Layout.of((rows, queries), start=start, lengths=total)
        return step(x, keys, Ring(stored, number, start, jnp.bfloat16), layout, past=past)

    arguments = (
        shape(jnp.bfloat16, rows, queries, heads, size),
        shape(jnp.bfloat16, rows, queries, size),
        stored,
        shape(jnp.int32),
        shape(jnp.int32, rows),
        shape(jnp.int32, rows),
    )
    compiled = build(run, *arguments, donated=2)
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE
    assert not re.search(r"u16\[\d+,\d+,136,512\]\S* copy\(", compiled.as_text())


@pytest.mark.parametrize(("devices", "queries", "top"), [(8, 1, 512), (2, 16, 512), (32, 1, 1024)])
def test_best_of_devices(build, devices, queries, top):
    """Decode of one row, of many, and of Pro's."""
    choose = functools.partial(best_of_devices, top=top)
    compiled = build(choose, shape(jnp.int32, devices, queries, 2 * top), shape(jnp.int32))
    assert copied(compiled) == 0
