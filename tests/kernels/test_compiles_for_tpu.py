"""The TPU compiler accepts the kernels at the real models' shapes, expands or copies no weights in memory, and makes no
more instructions of a kernel than are recorded (`make bundles` records them)."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import tpu_devices
from tests.kernels.bundles import Bundles
from v4_jax import Config
from v4_jax.cache.entries import Entries
from v4_jax.cache.ring import Ring
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels import choose
from v4_jax.kernels.choose import best_experts, many_rows_experts, norm_rotate, rows_from_tiles, rows_in_tiles
from v4_jax.kernels.csa import tpu as csa
from v4_jax.kernels.experts.tpu import ROWS, experts
from v4_jax.kernels.grouped_matmul.tpu import grouped_matmul
from v4_jax.kernels.hyper_connections import gradients as hyper_connections
from v4_jax.kernels.hyper_connections.reference import Numbers, Site
from v4_jax.kernels.hyper_connections.tpu import cross
from v4_jax.kernels.indexer_loss.tpu import Operands
from v4_jax.kernels.linear.shares import partial_products
from v4_jax.kernels.linear.tpu import matmul
from v4_jax.kernels.output.tpu import attention_output
from v4_jax.kernels.rotary.parts import settle
from v4_jax.kernels.rotary.reference import Projection, Settle, Steps
from v4_jax.kernels.stored_weights import SPREAD_ROWS
from v4_jax.kernels.window.tpu import step
from v4_jax.layer_stack import Cut
from v4_jax.layers.entry_attention import attend_picked
from v4_jax.layers.lightning_indexer import select
from v4_jax.layers.linear import grouped_linear, linears
from v4_jax.layers.mixture_of_experts import Experts, dispatch
from v4_jax.layers.partial_softmax import finish
from v4_jax.layers.partials import STATISTICS, Packed, Partial
from v4_jax.layers.rotary import Turn
from v4_jax.layers.visible import Visible
from v4_jax.layers.window_attention import attend_window, attention_end, output_in_parts
from v4_jax.layout import SHORT, Layout
from v4_jax.number_formats import E2M1, E4M3, E8M0, FP4_BLOCK, FP8_BLOCK, BlockScaled, Stack, scale_shape
from v4_jax.sharding.split import UNSPLIT

pytest.importorskip("libtpu")
pytestmark = pytest.mark.skipif(jax.default_backend() == "tpu", reason="other topologies need a host without TPUs")

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
CODES = {"e2m1": (E2M1, FP4_BLOCK), "e4m3": (E4M3, FP8_BLOCK)}
SPARE = 4 << 20  # bytes: lists of visits and rows of a decode step; one expert in bfloat16 has 16 MiB


@pytest.fixture(scope="module", autouse=True)
def bundles():
    """Counts of the kernels' instructions."""
    counts = Bundles()
    yield counts
    counts.write()


@pytest.fixture(params=TOPOLOGIES)
def build(request, bundles):
    """Compiles a function of shapes, as they come, for one chip of a topology, and counts its kernels' instructions."""
    mesh = jax.sharding.Mesh(np.array(tpu_devices(request.param)[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def build(function, *shapes, donated=()):
        bundles.start()
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        compiled = jax.jit(function, donate_argnums=donated).lower(*placed).compile()
        bundles.finish(request.node.name, compiled.as_text())
        return compiled

    return build


def shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype)


def weight(form, *sizes):
    if form == "bfloat16":
        return shape(jnp.bfloat16, *sizes)
    codes, block = CODES[form]
    return BlockScaled(shape(codes, *sizes), shape(E8M0, *scale_shape(sizes, block)), block)


def copied(compiled):
    """Bytes of the largest weight-like array that is copied or converted, wherever to."""
    kinds, moves = "f4|f8|s4|u8|bf16", "copy|transpose|bitcast-convert|convert"
    made = re.findall(rf"= (?:{kinds})\w*\[([\d,]+)\]\S* (?:{moves})\(", compiled.as_text())
    return max((int(np.prod([int(size) for size in sizes.split(",")])) for sizes in made), default=0)


@pytest.mark.parametrize(
    ("form", "rows", "groups", "width", "depth"),
    [
        ("e2m1", 48, 32, 2048, 4096),  # Flash w1 and w3 on 8 chips: a few tokens
        ("e2m1", 768, 32, 4096, 2048),  # Flash w2: 128 tokens
        ("e2m1", 6144, 32, 2048, 4096),  # prefill
        ("e2m1", 6, 48, 3072, 7168),  # Pro w1 and w3: one token
        ("e2m1", 48, 48, 7168, 3072),  # Pro w2
        ("e4m3", 48, 32, 2048, 4096),  # the Base models
        ("bfloat16", 48, 32, 2048, 4096),
    ],
)
def test_one_product(build, form, rows, groups, width, depth):
    shapes = shape(jnp.bfloat16, rows, depth), weight(form, groups, width, depth), shape(jnp.int32, groups)
    compiled = build(grouped_matmul, *shapes)
    output = 2 * rows * width
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE + output  # at most the rows before they are masked
    assert copied(compiled) <= max(SPARE, output)
    assert compiled.cost_analysis()["flops"] >= 2 * rows * width * depth


@pytest.mark.parametrize(
    ("rows", "groups", "hidden", "depth", "form"),
    [
        (1, 32, 2048, 4096, "e2m1"),  # Flash on 8 chips
        (128, 48, 3072, 7168, "e2m1"),  # Pro
        (16, 1, 256, 4096, "e4m3"),  # a share of Flash's shared expert
        (7, 16, 2048, 4096, "bfloat16"),
        (128, 2, 3072, 7168, "bfloat16"),  # tiles of fewer hidden activations
    ],
)
def test_whole_experts(build, rows, groups, hidden, depth, form):
    weights = [weight(form, 3, groups, *two) for two in ((hidden, depth), (hidden, depth), (depth, hidden))]
    choices = shape(jnp.int32, rows, 6), shape(jnp.float32, rows, 6)

    def run(x, assigned, scale, weights, layer):
        return experts(x, assigned, scale, weights, layer=layer, limit=10.0)

    compiled = build(run, shape(jnp.bfloat16, rows, depth), *choices, weights, shape(jnp.int32))
    by_visits = form == "e2m1" and rows > SPREAD_ROWS
    places = min(groups * -(-rows // SPREAD_ROWS) * SPREAD_ROWS, 6 * rows + groups * SPREAD_ROWS) if by_visits else 0
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE + 4 * places * depth
    yielded = 2 * 6 * rows * depth if by_visits else 0  # rows to be summed
    assert copied(compiled) <= SPARE + yielded
    assert "copy-start(%weights" not in compiled.as_text()  # into VMEM, where it has room
    assert compiled.cost_analysis()["flops"] >= 6 * rows * 6 * depth * hidden


@pytest.mark.parametrize(
    ("rows", "groups", "hidden", "depth"),
    [
        (24576, 2, 2048, 4096),  # Flash on 128 chips: an eighth of 16K tokens each
        (3072, 3, 3072, 7168),  # Pro on 128
    ],
)
def test_experts_of_training(build, rows, groups, hidden, depth):
    """No gradient of a weight is as large as rows, and nothing of the rows is in float32."""
    weights = [shape(jnp.float32, groups, *two) for two in ((hidden, depth), (hidden, depth), (depth, hidden))]

    def run(x, scale, weights, sizes, gradient):
        def call(x, scale, weights):
            return many_rows_experts(lambda x, *_: x, x, scale, weights, sizes, None, limit=10.0)

        out, pull = jax.vjp(call, x, scale, weights)
        return out, pull(gradient)

    x = shape(jnp.bfloat16, rows, depth)
    compiled = build(run, x, shape(jnp.float32, rows), weights, shape(jnp.int32, groups), x)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 6
    cast, activations = 2 * 3 * groups * hidden * depth, 2 * 3 * rows * hidden
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE + cast + activations + 2 * rows * depth
    assert not re.search(rf"f32\[{rows},\d+\]", compiled.as_text())


@pytest.mark.parametrize("width", [4096, 7168])
def test_rows_as_they_travel(build, width):
    """Nothing but the kernels copies them."""
    count, rows = shape(jnp.int32), 1500

    def run(tiles, count):
        rows = rows_from_tiles(tiles, count)
        return rows, rows_in_tiles(rows, count)

    compiled = build(run, shape(jnp.bfloat16, rows, width // 128, 128), count)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    assert copied(compiled) == 0


@pytest.mark.parametrize("tokens", [1, 128])
def test_choice_of_experts(build, tokens):
    scores = shape(jnp.float32, tokens, 256), shape(jnp.float32, tokens, 256)
    assert "tpu_custom_call" in build(lambda *scores: best_experts(*scores, 6, 1.5), *scores).as_text()


@pytest.mark.parametrize("form", ["e2m1", "e4m3", "bfloat16"])
@pytest.mark.parametrize("tokens", [8, 200])
def test_experts_of_a_scan_over_layers(build, form, tokens):
    """The kernel is chosen for the platform compiled for, and reads its layer's experts out of the stack."""
    layers, groups = 3, 32
    config = dataclasses.replace(Config.flash(), n_routed_experts=groups)
    d, hidden = config.hidden_size, config.moe_intermediate_size
    stack = Experts(
        weight(form, layers, groups, hidden, d),
        weight(form, layers, groups, d, hidden),
        weight(form, layers, groups, hidden, d),
    )
    top = config.num_experts_per_tok

    def run(x, chosen, weights, stack):
        def layer(x, number):
            out = dispatch(x, chosen, weights, stack, number, config, jnp.bfloat16, UNSPLIT)
            return x + out.astype(x.dtype), None

        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    arguments = (
        shape(jnp.bfloat16, tokens, d),
        shape(jnp.int32, tokens, top),
        shape(jnp.float32, tokens, top),
        stack,
    )
    compiled = build(run, *arguments)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == (1 if tokens <= ROWS else 3)
    rows_of_choices = 2 * tokens * top * (d + hidden) if tokens > ROWS else 0
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE + 4 * rows_of_choices
    assert copied(compiled) <= SPARE + rows_of_choices


@pytest.mark.parametrize(
    ("rows", "groups", "depth", "widths"),
    [
        (1, 1, 4096, (1024, 512)),  # Flash wq_a and wkv: one token
        (128, 1, 1024, (32768,)),  # wq_b
        (5, 8, 4096, (8192,)),  # wo_a
        (2048, 1, 8192, (4096,)),  # wo_b: prefill
        (700, 8, 4096, (8192,)),  # wo_a, the last tile of rows cut off
        (16, 1, 4096, (2048, 2048)),  # shared w1 and w3
        (64, 1, 4096, (256, 256)),  # the same on 8 devices
        (1, 1, 1536, (65536,)),  # Pro wq_b
        (600, 1, 16384, (7168,)),  # Pro wo_b
    ],
)
def test_products_with_e4m3(build, rows, groups, depth, widths):
    weights = [weight("e4m3", width, depth) for width in widths]
    x = shape(jnp.bfloat16, rows, groups * depth)
    compiled = build(lambda x, weights: matmul(x, weights, groups=groups), x, weights)
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE
    assert copied(compiled) <= SPARE
    assert compiled.cost_analysis()["flops"] >= 2 * rows * depth * sum(widths)


@pytest.mark.parametrize("rows", [3, 600])
def test_weights_of_a_scan_over_layers(build, rows):
    """Layers take the kernel in a program for TPUs, and it reads its layer's weights out of the stack."""
    layers, d = 3, 2048
    stacks = [weight("e4m3", layers, d, d) for _ in range(3)]

    def run(x, stacks):
        def layer(x, item):
            number, cut = item
            first, second, grouped = (
                one.replace(stack=Stack(stack.codes, stack.scales, number))
                for one, stack in zip(cut, stacks, strict=True)
            )
            y, z = linears(x, [first, second], jnp.bfloat16)
            both = jnp.stack([y, z], axis=1).reshape(rows, 2, d)
            return x + grouped_linear(both, grouped, jnp.bfloat16).reshape(rows, d), None

        return jax.lax.scan(layer, x, (jnp.arange(layers), stacks))[0]

    compiled = build(run, shape(jnp.bfloat16, rows, d), stacks)
    assert compiled.as_text().count("block_scaled_matmul") >= 2
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE + 8 * rows * d
    assert not re.search(rf"f8e4m3fn\[(1,)?{d},{d}\]\S* (copy|dynamic-slice|fusion)", compiled.as_text())


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
            partial = attend_picked(queries, dataclasses.replace(index, rows=rows), picked)
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
    attend = functools.partial(csa._attend, share=csa._share(512, 16), together=True, interpret=False)
    assert csa._share(512, 16) <= csa.ROWS[0]
    compiled = build(attend, queries, words, place)
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
        return attend_window(queries, keys, None if keys is None else low, held, visible)

    arguments = (shape(dtype, rows, queries, heads, size), keys, stack, shape(jnp.int32), by_query, by_query)
    compiled = build(run, *arguments)
    assert "tpu_custom_call" in compiled.as_text()
    window = 0 if keys is None else (past + queries + 128) * size
    copied_first = rows * entries * size if entries % 16 else 0
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE + 4 * (rows * window + copied_first)


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
        (by_head, by_head, shape(jnp.float32, 1, queries, heads, size)),
    )
    compiled = build(run, *arguments)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == (3 if picks else 2)
    rounded, statistics = 2 * queries * heads * size, 4 * 128 * queries * heads
    padded = 2 * rounded if queries % 8 else 0
    sums, hidden = 4 * 2 * 2 * (queries + 512 + entries) * size, 4 * queries * entries if picks else 0
    most = SPARE + rounded + 3 * statistics + 2 * padded + sums + 3 * hidden
    assert compiled.memory_analysis().temp_size_in_bytes < most


@pytest.mark.parametrize(("queries", "heads", "entries", "picks"), [(512, 64, 4096, 512), (300, 128, 8192, 1024)])
def test_indexer_loss(build, queries, heads, entries, picks):
    """Forward and backward are a kernel each, beside which there are the entries in float32 and who picked them."""

    def run(operands, low, high, picked, given):
        visible = Visible(low, high, jnp.min(low), jnp.max(high))

        def loss(index_queries, weights, index_keys):
            some = operands._replace(index_queries=index_queries, weights=weights)
            some = some._replace(entries=Entries.uncached(operands.entries), index_keys=Entries.uncached(index_keys))
            return choose.indexer_loss(lambda *_: jnp.zeros(given.shape), some, visible, picked)

        found, pull = jax.vjp(loss, operands.index_queries, operands.weights, operands.index_keys)
        return found, pull(given)

    operands = Operands(
        shape(jnp.bfloat16, 1, queries, heads, 512),
        shape(jnp.float32, 1, queries, heads),
        shape(jnp.bfloat16, 1, entries, 512),
        shape(jnp.bfloat16, 1, queries, 64, 128),
        shape(jnp.float32, 1, queries, 64),
        shape(jnp.bfloat16, 1, entries, 128),
    )
    ranges, chosen = shape(jnp.int32, 1, queries), shape(jnp.int32, 1, queries, picks)
    compiled = build(run, operands, ranges, ranges, chosen, shape(jnp.float32, 1, queries))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    hidden, held = 4 * queries * entries, 6 * entries * (512 + 128) + 2 * 4 * entries * 128
    padded = 2 * (queries + 8) * (heads * 512 + 64 * 128) if queries % 8 else 0
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE + 3 * hidden + held + padded


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

    by_head, sums = shape(jnp.float32, 1, tokens, heads), shape(jnp.float32, 1, tokens, heads, size)
    turned = shape(jnp.float32, 1, tokens, 64)
    given = [Partial(by_head, by_head, sums)] * partials
    gradient = shape(jnp.bfloat16, 1, tokens, heads * size)
    compiled = build(run, given, shape(jnp.float32, heads), turned, turned, gradient)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE


LAYERS = 20


def cuts(stacks, number):
    """Arrays as layers get them."""
    return jax.tree.map(lambda stack: Cut(stack[number], stack, number), stacks)


@pytest.mark.parametrize(("streams", "width", "tokens"), [(4, 4096, 1), (4, 4096, 600), (4, 7168, 128)])
def test_boundary_of_sublayers(build, streams, width, tokens):
    """The site's parameters are read in their stacks: none is cut out."""
    numbers, gates = Numbers(streams, 1e-6, 1e-6, 20), streams + streams**2
    sizes = ((streams + gates, streams * width), (streams + gates,), (3,), (width,))

    def run(x, output, mix, stacks, number):
        return cross(x, output, mix, Site(*cuts(stacks, number)), numbers)

    compiled = build(
        run,
        shape(jnp.bfloat16, 1, tokens, streams * width),
        shape(jnp.bfloat16, 1, tokens, width),
        shape(jnp.float32, gates, 1, tokens),
        [shape(jnp.float32, LAYERS, *size) for size in sizes],
        shape(jnp.int32),
    )
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE
    assert "dynamic-slice" not in compiled.as_text()


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


# Flash's projections of a CSA layer's input: to latents, keys, entries' values and gates, and the indexer's.
PROJECTED = {"e4m3": (1024, 512), "bfloat16": (1024, 1024, 64, 256, 256)}


@pytest.mark.parametrize(("matrices", "height", "width"), [(2, 2048, 4096), (1, 3072, 7168)])
def test_iterations_of_muon(build, matrices, height, width):
    """Three kernels: nothing else is as large as a matrix."""
    y = shape(jnp.bfloat16, matrices, height, width)
    compiled = build(choose.newton_schulz_step, y, shape(jnp.float32, 3))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert copied(compiled) == 0
    assert compiled.memory_analysis().temp_size_in_bytes <= SPARE + 2 * 2 * matrices * height**2


@pytest.mark.parametrize(("rows", "devices"), [(1, 8), (32, 4)])
def test_shares_of_projections(build, rows, devices):
    """What each of several devices reads of weights that they all have, where the weights lie."""
    depth = 4096
    stacks = [weight(form, LAYERS, width, depth) for form, widths in PROJECTED.items() for width in widths]

    def run(x, stacks, device):
        def layer(number, total):
            weights = [
                BlockScaled(one.codes[0], one.scales[0], one.block, Stack(one.codes, one.scales, number))
                if isinstance(one, BlockScaled)
                else Cut(one[0], one, number)
                for one in stacks
            ]
            return total + jnp.sum(partial_products(x + total, weights, device, devices=devices)).astype(x.dtype)

        return jax.lax.fori_loop(0, LAYERS, layer, jnp.zeros((), x.dtype))

    compiled = build(run, shape(jnp.bfloat16, rows, depth), stacks, shape(jnp.int32))
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE and copied(compiled) <= rows * depth
    assert "dynamic-slice" not in compiled.as_text()


@pytest.mark.parametrize("rows", [1, 32])
def test_what_becomes_of_projections(build, rows):
    widths = [width for widths in PROJECTED.values() for width in widths]
    sums = sum(-(-width // 128) * 128 for width in widths)

    def run(sums, norms, cos, sin, number):
        latent, keys = cuts(norms, number)
        thens = [Settle(latent, None, Steps(1e-6)), Settle(keys, Turn(cos, sin), Steps(1e-6, "keys")), *[None] * 5]
        dtypes = [jnp.bfloat16] * 2 + [jnp.float32] * 2 + [jnp.bfloat16] + [jnp.float32] * 2
        return settle(
            sums, [Projection(shape(jnp.bfloat16, w, 8), d) for w, d in zip(widths, dtypes, strict=True)], thens
        )

    turned = shape(jnp.float32, rows, 1, 64)
    norms = [shape(jnp.bfloat16, LAYERS, width) for width in widths[:2]]
    compiled = build(run, shape(jnp.float32, rows, sums), norms, turned, turned, shape(jnp.int32))
    assert "dynamic-slice" not in compiled.as_text()


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


@pytest.mark.parametrize(("rows", "heads", "devices"), [(1, 8, 8), (128, 8, 8), (2, 64, 0)])
def test_end_of_attention(build, rows, heads, devices):
    """A window, and what each of several devices saw."""
    size = 512

    def run(window, distant, sink, cos, sin, number):
        partials = [Packed(window), *([Packed(distant)] if devices else [])]
        return attention_output(partials, cuts(sink, number), Turn(cos, sin), jnp.bfloat16)

    turned = shape(jnp.float32, rows, 1, 64)
    parts = [shape(jnp.float32, count, rows, 1, heads, size + STATISTICS) for count in (1, max(devices, 1))]
    sink = shape(jnp.float32, LAYERS, heads)
    compiled = build(run, *parts, sink, turned, turned, shape(jnp.int32))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.parametrize(
    ("model", "rows", "devices"), [("flash", 1, 8), ("flash", 6, 4), ("pro", 1, 8)], ids=lambda x: str(x)
)
def test_end_of_a_sublayer(build, model, rows, devices):
    """Merging and both products in one call: weights are read where they lie."""
    config = getattr(Config, model)()
    heads, groups, size = config.num_attention_heads // devices, config.o_groups // devices, config.head_dim
    middle = groups * config.o_lora_rank
    stacks = [
        weight("e4m3", LAYERS, middle, heads * size // groups),
        weight("e4m3", LAYERS, config.hidden_size, middle),
    ]

    def run(window, distant, sink, cos, sin, stacks, number):
        weights = [
            BlockScaled(one.codes[0], one.scales[0], one.block, Stack(one.codes, one.scales, number)) for one in stacks
        ]
        partials, turned = [Packed(window), Packed(distant)], Turn(cos, sin)
        return attention_end(partials, cuts(sink, number), turned, tuple(weights), groups=groups, dtype=jnp.bfloat16)

    parts = [shape(jnp.float32, count, rows, 1, heads, size + STATISTICS) for count in (1, devices)]
    turned, sink = shape(jnp.float32, rows, 1, 64), shape(jnp.float32, LAYERS, heads)
    compiled = build(run, *parts, sink, turned, turned, stacks, shape(jnp.int32))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE and copied(compiled) == 0
