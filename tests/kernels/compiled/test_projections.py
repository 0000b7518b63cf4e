"""Projections, what becomes of them, and the boundary of sublayers."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.compiled.shapes import LAYERS, PROJECTED, SPARE, copied, cuts, shape, weight
from v4_jax import Config
from v4_jax.kernels.hyper_connections.reference import Numbers, Site
from v4_jax.kernels.hyper_connections.tpu import cross
from v4_jax.kernels.linear.shares import partial_products
from v4_jax.kernels.linear.tpu import matmul
from v4_jax.kernels.output.tpu import attention_output
from v4_jax.kernels.rotary.parts import settle
from v4_jax.kernels.rotary.reference import Projection, Settle, Steps
from v4_jax.layer_stack import Cut
from v4_jax.layers.linear import grouped_linear, linears
from v4_jax.layers.partials import STATISTICS, Packed
from v4_jax.layers.rotary import Turn
from v4_jax.layers.window_attention import attention_end
from v4_jax.number_formats import BlockScaled, Stack


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
        (512, 1, 8192, (4096,)),  # wo_b: a block of queries in a prefill
        (512, 1, 16384, (7168,)),  # Pro's
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
