"""Compiled programs communicate what the layers write down, and nothing else: by kind and size of every collective.

A partitioner that slips in an all-gather of activations, weights or experts shows here as a shape without a name.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from tests.models import OnMesh, three
from v4_jax import declarations
from v4_jax.cache.entries import projection_width, span
from v4_jax.cache.ring import SPARE
from v4_jax.parameters import is_parameter
from v4_jax.planning.hlo_collectives import collectives
from v4_jax.sharding.axes import resolve
from v4_jax.sharding.dispatch import capacity
from v4_jax.sharding.split import Split

CONTEXT = 16384


@pytest.fixture(scope="module")
def tiny():
    return three()


def served(spread, batch, size):
    """The collectives of a chunk with a cache."""
    cache = spread.cache(batch, CONTEXT)

    def run(params, tokens, cache):
        output = spread.model.apply({"params": params}, tokens, cache=cache, logits="last")
        return output.logits, output.cache

    tokens = jax.ShapeDtypeStruct((batch, size), jnp.int32)
    return collectives(jax.jit(run, donate_argnums=2).lower(spread.params, tokens, cache).compile().as_text())


def unnamed(found, named):
    """Shapes of collectives that `named` ({kind: {name: dimensions}}) does not list, axes of one element aside."""

    def bare(dimensions):
        return tuple(size for size in dimensions if size > 1)

    legal = {kind: {bare(dimensions) for dimensions in shapes} for kind, shapes in named.items()}
    return sorted(
        {
            (collective.kind, shape.dimensions, collective.op_name.rpartition("Transformer.")[2])
            for collective in found
            for shape in collective.shapes
            if bare(shape.dimensions) not in legal.get(collective.kind, set())
        }
    )


def test_long_chunk(tiny):
    """A prompt split over eight devices: halos, compressed entries, the last rows, tokens on their way to experts."""
    c, size, devices = tiny.config, 2048, 8
    roles = {"csa": (4, c.head_dim), "hca": (128, c.head_dim), "index": (4, c.index_head_dim)}
    choices = size // devices * c.num_experts_per_tok  # of a device; and the rows that it has room for
    room = capacity(choices, devices)
    widths = {role: projection_width(ratio, width) for role, (ratio, width) in roles.items()}
    cached = [
        (-(-CONTEXT // ratio // devices // part), devices, width)
        for ratio, width in roles.values()
        for part in (1, 4, 16)
    ]
    named = {
        # left neighbour's last keys, and the projections of blocks that straddle devices
        "collective-permute": [
            (c.sliding_window - 1, c.head_dim),
            *((span(ratio) - 1, widths[role]) for role, (ratio, _) in roles.items()),
        ],
        # the chunk's entries and which ones they are; the layer's entries so far, in a sixteenth, a quarter or all of
        # the room
        "all-gather": [
            *((size // ratio, width) for ratio, width in roles.values()),
            *((size // ratio,) for ratio, _ in roles.values()),
            *cached,
            *exchanged_rows(choices, room, devices, c.hidden_size),
        ],
        # what stays of the chunk in window and open blocks; the last token's streams; agreement on counts
        "all-reduce": [
            (c.sliding_window + SPARE, c.head_dim),
            *((span(ratio) + SPARE, widths[role]) for role, (ratio, _) in roles.items()),
            (c.hc_mult * c.hidden_size,),
            (),
        ],
        # how many rows go to each expert, where they begin, and where they land
        "all-to-all": counts_of_rows(devices, c.n_routed_experts // devices),
    }
    found = served(OnMesh(tiny, "seq=8", "long-context"), 1, size)
    assert not unnamed(found, named)
    kinds = {collective.kind for collective in found}
    assert kinds == set(named)


def exchanged_rows(choices, room, devices, width):
    """Rows to their experts and back, and the weight of each: on CPUs, which have no ragged exchange, all of them."""
    return [(devices * length, *shape) for length in (choices, room) for shape in ((width,), (), (width // 128, 128))]


def counts_of_rows(devices, own):
    """XLA:CPU may hand an all-to-all one operand per device."""
    return [(devices, 2, own), (2, own), (devices, own), (own,)]


@pytest.mark.parametrize("mesh", ["seq=8", "seq=2,expert=2,tensor=2"])
def test_one_token(tiny, mesh):
    """Decoding: queries, candidates and partial softmaxes of the one token; never a layer's entries, nor weights."""
    c, rows = tiny.config, 2
    tensor = 2 if "tensor" in mesh else 1
    heads, own = c.num_attention_heads, c.num_attention_heads // tensor
    # what devices with the same rows project shares of: queries' latents and keys, what is compressed, head weights
    alike = [c.q_lora_rank, c.head_dim]
    entries, index = [projection_width(4, width) // 2 for width in (c.head_dim, c.index_head_dim)]
    projected = [alike, [*alike, *2 * [projection_width(128, c.head_dim) // 2]]]
    projected.append([*alike, *2 * [entries], c.index_n_heads, *2 * [index]])
    sums = [(rows, sum(-(-width // 128) * 128 for width in widths)) for widths in projected]
    largest = max(rows * c.hidden_size, rows * heads * (c.head_dim + 128), rows * c.index_n_heads * c.index_head_dim)
    largest = max(largest, *(math.prod(shape) for shape in sums))
    named = {
        # the heads' queries, where heads are shared out but entries need all of them; scores and numbers
        # of each device's best candidates, mesh axis by mesh axis
        "all-gather": [
            (rows, heads, c.head_dim),
            (rows, c.index_n_heads, c.index_head_dim),
            *((rows, 2, c.index_topk * count) for count in (2, 8)),
        ],
        # softmax statistics and sums; shares of the output projection, the experts and the embedding
        "all-reduce": [(rows, heads), (rows, own), (rows, own, c.head_dim), (rows, c.hidden_size), *sums],
        # the same of the heads that each device works on
        "all-to-all": [(tensor, rows, own, c.head_dim + 128), (rows, own, c.head_dim + 128)],
    }
    found = served(OnMesh(tiny, mesh, "long-context"), rows, 1)
    assert not unnamed(found, named)
    assert max(math.prod(shape.dimensions) for collective in found for shape in collective.shapes) <= largest
    assert {collective.kind for collective in found} == set(named) - (set() if tensor > 1 else {"all-to-all"})


def test_training_step(tiny):
    """The backward pass mirrors the forward one; weights in shards are joined for use, their gradients reduced back."""
    c, rows, size = tiny.config, 2, 2048
    spread = OnMesh(tiny, "seq=2,expert=2,tensor=2", "train")
    split = Split.on(spread.mesh, resolve("train"), size, 128)

    @functools.partial(jax.grad, allow_int=True)
    def gradient(params, tokens):
        return jnp.sum(jnp.sin(spread.model.apply({"params": params}, tokens).logits))

    tokens = jax.ShapeDtypeStruct((rows, size), jnp.int32)
    found = collectives(jax.jit(gradient).lower(spread.params, tokens).compile().as_text())

    parameters = [p for p in jax.tree.leaves(declarations(c), is_leaf=is_parameter) if "experts" not in p.axes]
    shards = [split.stored(p.shape, p.axes) for p in parameters]
    whole = [split.used(p.shape, p.axes) for p in parameters]
    local, exchanged = size // 2, 4 // 2  # tokens of a device (one row, half of it); devices that exchange tokens
    choices = local * c.num_experts_per_tok
    room = capacity(choices, 2 * exchanged)
    roles = {"csa": (4, c.head_dim), "hca": (128, c.head_dim), "index": (4, c.index_head_dim)}
    activations, half = (local, c.hidden_size), local // 2
    # the later half of the queries to the mirrored device, with the keys that they see, and what they give back
    of_each = [(c.q_lora_rank,), (c.index_n_heads,), (c.qk_rope_head_dim,), (c.hidden_size,), ()]
    handed = [*((half, *width) for width in of_each), (c.sliding_window - 1 + half, c.head_dim)]
    named = {
        "collective-permute": [
            (c.sliding_window - 1, c.head_dim),
            *((span(ratio) - 1, projection_width(ratio, width)) for ratio, width in roles.values()),
            *handed,
        ],
        # entries of the whole sequence; index queries of all heads, blocks of queries side by side; head weights
        "all-gather": [
            *whole,
            *((size // ratio, width) for ratio, width in roles.values()),
            (half // c.sliding_window, c.sliding_window, c.index_n_heads, c.index_head_dim),
            (local, c.index_n_heads),
            *exchanged_rows(choices, room, 2 * exchanged, c.hidden_size),
        ],
        "reduce-scatter": [*shards, *((local // ratio, width) for ratio, width in roles.values())],
        # gradients of what several devices hold; shares of heads, experts and vocabulary
        "all-reduce": [*shards, activations, ()],
        "all-to-all": counts_of_rows(2 * exchanged, c.n_routed_experts // split.count(split.axes("experts"))),
    }
    assert not unnamed(found, named)
    assert {collective.kind for collective in found} == set(named)
