"""Experts, choice of experts, and rows that travel to them."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.compiled.shapes import SPARE, copied, shape, weight
from v4_jax import Config
from v4_jax.kernels.choose import best_experts, many_rows_experts, rows_from_tiles, rows_in_tiles
from v4_jax.kernels.experts.tpu import ROWS, experts
from v4_jax.kernels.grouped_matmul.tpu import grouped_matmul
from v4_jax.layers.mixture_of_experts import Experts, dispatch
from v4_jax.sharding.split import UNSPLIT


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
        (9, 16, 2048, 4096, "e2m1"),
        (70, 16, 2048, 4096, "e2m1"),
    ],
)
def test_whole_experts(build, rows, groups, hidden, depth, form):
    weights = [weight(form, 3, groups, *two) for two in ((hidden, depth), (hidden, depth), (depth, hidden))]
    choices = shape(jnp.int32, rows, 6), shape(jnp.float32, rows, 6)

    def run(x, assigned, scale, weights, layer):
        return experts(x, assigned, scale, weights, layer=layer, limit=10.0)

    compiled = build(run, shape(jnp.bfloat16, rows, depth), *choices, weights, shape(jnp.int32))
    assert compiled.memory_analysis().temp_size_in_bytes < SPARE
    assert copied(compiled) <= SPARE
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
