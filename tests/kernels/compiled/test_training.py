"""Gradients, and the optimiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.compiled.shapes import SPARE, copied, shape
from v4_jax.cache.entries import Entries
from v4_jax.kernels import choose
from v4_jax.kernels.choose import norm_rotate
from v4_jax.kernels.csa.hidden import hide
from v4_jax.kernels.hyper_connections import gradients as hyper_connections
from v4_jax.kernels.hyper_connections.reference import Numbers, Site
from v4_jax.kernels.indexer.tpu import marks_of
from v4_jax.kernels.indexer_loss.tpu import Operands
from v4_jax.kernels.rotary.reference import Steps
from v4_jax.layers.entry_attention import attend_picked
from v4_jax.layers.lightning_indexer import Here
from v4_jax.layers.partials import Partial
from v4_jax.layers.rotary import Turn
from v4_jax.layers.stages import recompute
from v4_jax.layers.visible import Visible
from v4_jax.layers.window_attention import attend_window, output_in_parts


@pytest.mark.parametrize(
    ("queries", "heads", "entries", "picks"),
    [
        (512, 64, 0, 0),  # Flash: a sliding layer
        (512, 64, 128, 0),  # HCA, 16K tokens
        (300, 128, 512, 0),  # Pro, 64K tokens, an uneven chunk
        (512, 64, 4096, 512),  # Flash: CSA, 16K tokens
        (300, 128, 8192, 1024),  # Pro: CSA, 32K tokens
        (1500, 64, 512, 0),  # blocks of queries that share their entries
    ],
)
def test_gradients_of_window_attention(build, queries, heads, entries, picks):
    """Forward and backward are a kernel each, between which nothing is kept but a number for each head."""
    size, past = 512, 127

    def run(queries, keys, held, low, high, picked, given):
        visible = Visible(low, high, jnp.min(low), jnp.max(high)) if entries else None

        def attend(queries, keys, held):
            uncached = Entries.uncached(held) if entries else None
            return attend_window(queries, keys, low, uncached, visible, picked=picked)

        partial, pull = jax.vjp(attend, queries, keys, held)
        return partial, pull(Partial(*given))

    by_head = shape(jnp.float32, 1, queries, heads)
    arguments = (
        shape(jnp.bfloat16, 1, queries, heads, size),
        shape(jnp.bfloat16, 1, past + queries, size),
        shape(jnp.bfloat16, 1, entries, size) if entries else None,
        shape(jnp.int32, 1, queries),
        shape(jnp.int32, 1, queries),
        shape(jnp.int32, 1, queries, picks) if picks else None,
        (by_head, by_head, shape(jnp.bfloat16, 1, queries, heads, size)),
    )
    compiled = build(run, *arguments)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == (3 if picks else 2)
    rounded, statistics = 2 * queries * heads * size, 4 * 128 * queries * heads
    padded = 2 * rounded if queries % 8 else 0
    sums, hidden = 4 * 2 * 2 * (queries + 512 + entries) * size, 4 * queries * entries if picks else 0
    most = SPARE + rounded + 3 * statistics + 2 * padded + sums + 3 * hidden
    assert compiled.memory_analysis().temp_size_in_bytes < most


def compared(queries, heads, entries):
    """Shapes of what the indexer's loss compares."""
    return Operands(
        shape(jnp.bfloat16, 1, queries, heads, 512),
        shape(jnp.float32, 1, queries, heads),
        shape(jnp.bfloat16, 1, entries, 512),
        shape(jnp.bfloat16, 1, queries, 64, 128),
        shape(jnp.float32, 1, queries, 64),
        shape(jnp.bfloat16, 1, entries, 128),
    )


def loss_of(operands, visible, picked):
    """The indexer's loss as a function of what it trains."""

    def loss(index_queries, weights, index_keys):
        some = operands._replace(index_queries=index_queries, weights=weights)
        some = some._replace(entries=Entries.uncached(operands.entries), index_keys=Entries.uncached(index_keys))
        return choose.indexer_loss(lambda *_: jnp.zeros(weights.shape[:2]), some, visible, picked)

    return loss


@pytest.mark.parametrize(("queries", "heads", "entries", "picks"), [(512, 64, 4096, 512), (300, 128, 8192, 1024)])
def test_indexer_loss(build, queries, heads, entries, picks):
    """Forward and backward are a kernel each, beside which there are the entries in float32 and who picked them."""

    def run(operands, low, high, picked, given):
        loss = loss_of(operands, Visible(low, high, jnp.min(low), jnp.max(high)), picked)
        found, pull = jax.vjp(loss, operands.index_queries, operands.weights, operands.index_keys)
        return found, pull(given)

    operands = compared(queries, heads, entries)
    ranges, chosen = shape(jnp.int32, 1, queries), shape(jnp.int32, 1, queries, picks)
    compiled = build(run, operands, ranges, ranges, chosen, shape(jnp.float32, 1, queries))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    hidden, held = 4 * queries * entries, 6 * entries * (512 + 128) + 2 * 4 * entries * 128
    padded = 2 * (queries + 8) * (heads * 512 + 64 * 128) if queries % 8 else 0
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE + 3 * hidden + held + padded


@pytest.mark.parametrize(("queries", "heads", "entries", "picks"), [(512, 64, 65536, 512), (300, 128, 16384, 1024)])
def test_gradients_of_picked_entries(build, queries, heads, entries, picks):
    """Beyond what VMEM holds: beside the entries as words there are float32 sums for the gradients alone."""
    size = 512

    def run(queries, held, picked, given):
        def attend(queries, held):
            here = Here(picked, jnp.sum(picked >= 0, axis=-1, dtype=jnp.int32))
            return attend_picked(queries, Entries.uncached(held), picked, here)

        partial, pull = jax.vjp(attend, queries, held)
        return partial, pull(Partial(*given))

    by_head = shape(jnp.float32, 1, queries, heads)
    arguments = (
        shape(jnp.bfloat16, 1, queries, heads, size),
        shape(jnp.bfloat16, 1, entries, size),
        shape(jnp.int32, 1, queries, picks),
        (by_head, by_head, shape(jnp.bfloat16, 1, queries, heads, size)),
    )
    compiled = build(run, *arguments)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 4  # two, words, and sums of both halves
    sums, words = 2 * 4 * entries * size, 2 * entries * size
    rounded = 2 * queries * heads * size
    padded = 3 * rounded if queries % 32 else 0  # queries and what they are given, made up to whole blocks
    most = SPARE + 1.01 * sums + words + 4 * entries * size + 3 * rounded + padded + 4 * 16 * queries * picks
    assert compiled.memory_analysis().temp_size_in_bytes < most


@pytest.mark.parametrize(("queries", "heads", "entries", "picks"), [(512, 64, 65536, 512), (300, 128, 16384, 1024)])
def test_indexer_loss_of_picked_entries(build, queries, heads, entries, picks):
    """Forward and backward are two kernels each, also where the forward pass is run again: its slopes are kept."""

    def run(operands, picked, given):
        loss = recompute(loss_of(operands, None, picked))
        found, pull = jax.vjp(loss, operands.index_queries, operands.weights, operands.index_keys)
        return found, pull(given)

    operands = compared(queries, heads, entries)
    compiled = build(run, operands, shape(jnp.int32, 1, queries, picks), shape(jnp.float32, 1, queries))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 4


@pytest.mark.parametrize(("tokens", "heads"), [(512, 64), (300, 128), (16384, 1)])
def test_gradients_of_norm_and_rotation(build, tokens, heads):
    """A kernel each way, and nothing is copied from one tiling to another on its way in or out."""
    size, normed = 512, heads == 1

    def run(x, weight, cos, sin, gradient):
        def call(x, weight):
            rows = x if normed else x.reshape(1, tokens, heads, size)
            return norm_rotate(rows, weight, Turn(cos, sin), Steps(1e-6))

        out, pull = jax.vjp(call, x, weight)
        return out, pull(gradient)

    x, turned = shape(jnp.bfloat16, 1, tokens, heads * size), shape(jnp.float32, 1, tokens, 64)
    of_out = x if normed else shape(jnp.bfloat16, 1, tokens, heads, size)
    compiled = build(run, x, shape(jnp.float32, size) if normed else None, turned, turned, of_out)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    turns = 2 * 4 * 128 * tokens  # as they lie in tiles
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE + turns and copied(compiled) <= 64 * tokens


@pytest.mark.parametrize(("tokens", "heads", "partials"), [(512, 64, 1), (300, 128, 2)])
def test_gradients_of_the_end_of_attention(build, tokens, heads, partials):
    """The same."""
    size = 512

    def run(partials, sink, cos, sin, gradient):
        def call(partials, sink):
            return choose.attention_output(output_in_parts, partials, sink, Turn(cos, sin), jnp.bfloat16)

        out, pull = jax.vjp(call, partials, sink)
        return out, pull(gradient)

    by_head, sums = shape(jnp.float32, 1, tokens, heads), shape(jnp.bfloat16, 1, tokens, heads, size)
    turned = shape(jnp.float32, 1, tokens, 64)
    given = [Partial(by_head, by_head, sums)] * partials
    gradient = shape(jnp.bfloat16, 1, tokens, heads * size)
    compiled = build(run, given, shape(jnp.float32, heads), turned, turned, gradient)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE


@pytest.mark.parametrize(("width", "tokens"), [(4096, 512), (7168, 512)])
def test_gradients_of_boundary_of_sublayers(build, width, tokens):
    """Flash's and Pro's streams."""
    numbers, gates = Numbers(4, 1e-6, 1e-6, 20), 20
    sizes = ((4 + gates, 4 * width), (4 + gates,), (3,), (width,))
    streams, single = (shape(jnp.bfloat16, 1, tokens, channels) for channels in (4 * width, width))
    mix = shape(jnp.float32, gates, 1, tokens)

    def run(x, output, mix, site, gradient):
        return hyper_connections.cross(x, output, mix, Site(*site), gradient, numbers)

    build(run, streams, single, mix, [shape(jnp.float32, *size) for size in sizes], (streams, single, mix))


@pytest.mark.parametrize(("matrices", "height", "width"), [(2, 2048, 4096), (1, 3072, 7168)])
def test_iterations_of_muon(build, matrices, height, width):
    """Three kernels: nothing else is as large as a matrix."""
    y = shape(jnp.bfloat16, matrices, height, width)
    compiled = build(choose.newton_schulz_step, y, shape(jnp.float32, 3))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert copied(compiled) == 0
    assert compiled.memory_analysis().temp_size_in_bytes <= SPARE + 2 * 2 * matrices * height**2


@pytest.mark.parametrize(("rows", "groups"), [(2048, 8), (300, 16)])
def test_groups_of_the_output_projection(build, rows, groups):
    """Flash's and Pro's: a kernel each way for the rows, which stay where they are."""
    size, out = 4096, 1024

    def run(x, weight, gradient):
        found, pull = jax.vjp(lambda x, weight: choose.grouped_product(x, weight, jnp.bfloat16), x, weight)
        return found, pull(gradient)

    x, weight = shape(jnp.bfloat16, 1, rows, groups, size), shape(jnp.bfloat16, groups * out, size)
    compiled = build(run, x, weight, shape(jnp.bfloat16, 1, rows, groups, out))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize(("queries", "entries", "picks"), [(512, 4096, 512), (300, 2048, 1024)])
def test_marked_entries(build, queries, entries, picks):
    """What a query picks is written as a bit each and read by one kernel more, not packed together."""

    def run(index_queries, weights, keys, low, high):
        visible = Visible(low, high, jnp.min(low), jnp.max(high))
        marks = marks_of(index_queries, weights, Entries.uncached(keys), visible, top=picks)
        return marks.bits, hide(marks, entries)

    ranges = shape(jnp.int32, 1, queries)
    compiled = build(
        run,
        shape(jnp.bfloat16, 1, queries, 64, 128),
        shape(jnp.float32, 1, queries, 64),
        shape(jnp.bfloat16, 1, entries, 128),
        ranges,
        ranges,
    )
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
