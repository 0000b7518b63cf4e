"""The end of attention's softmax as one TPU operation: partial softmaxes are merged, and turned back.

A block of tokens is read and written once; written for XLA, every step takes its way through memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.rotary.tpu import HEADS, VMEM_BYTES, along, block_of, number, over_tokens, turned
from v4_jax.kernels.vectors import vector, vector_spec
from v4_jax.layer_stack import stack_of
from v4_jax.layers.partials import STATISTICS, Packed, Partial, shape_of
from v4_jax.layers.rotary import Turn


def attention_output(partials: Sequence[Any], sink: Array, turn: Turn, dtype: Any, *, interpret: bool = False) -> Array:
    """See `layers.window_attention.attention_output`; not differentiable."""
    batch, size, heads, channels = shape_of(partials[0])
    tokens, width = batch * size, heads * channels
    count = sum(len(some.parts) if isinstance(some, Packed) else 1 for some in partials)
    block = block_of(tokens, width * count)
    operands, specs, layer = as_operands(partials, sink, turn, block)
    found = pl.pallas_call(
        functools.partial(merge, packed=[isinstance(some, Packed) for some in partials]),
        grid_spec=over_tokens(pl.cdiv(tokens, block), specs, along(block, width)),
        out_shape=jax.ShapeDtypeStruct((tokens, width), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=0, bytes_accessed=sum(x.nbytes for x in operands) + 2 * tokens * width, transcendentals=0
        ),
        interpret=interpret,
        name="attention_output",
    )(jnp.asarray(layer, jnp.int32).reshape(1), *operands)
    return found.reshape(batch, size, width)


def as_operands(
    partials: Sequence[Partial | Packed], sink: Array, turn: Turn, block: int
) -> tuple[list[Array], list[pl.BlockSpec], Any]:
    """What `merge` takes, with specs of blocks of tokens, and the number of the sink's layer, the only scalar."""
    batch, size, heads, channels = shape_of(partials[0])
    tokens, by_token = batch * size, functools.partial(along, block)
    operands, specs = [], []
    for some in partials:
        if isinstance(some, Packed):
            operands.append(some.parts.reshape(-1, tokens, heads, channels + STATISTICS))
            shape = (len(some.parts), block, heads, channels + STATISTICS)
            specs.append(pl.BlockSpec(shape, lambda i, layer: (0, i, 0, 0)))
            continue
        operands += [x.reshape(tokens, heads) for x in (some.maximum, some.total)]
        operands.append(some.weighted.reshape(tokens, heads, channels))
        specs += [by_token(heads), by_token(heads), by_token(heads, channels)]
    stack, layer = stack_of(sink)
    operands += [stack, *(part.reshape(tokens, -1) for part in turn)]
    specs += [vector_spec(stack, number), by_token(turn.channels), by_token(turn.channels)]
    return operands, specs, layer


def merge(layer: Any, *refs: Any, packed: list[bool]) -> None:
    """Writes a block's merged softmaxes, turned back: [T, H * C].

    Refs: parts of each partial softmax, sinks [N, H], the turn's parts [T, R], and out.
    """
    *given, sink, cos, sin, out = refs
    heads, left, parts = sink.shape[1], iter(given), []
    channels = out.shape[1] // heads
    for several in packed:  # to maximum and total [T, H, 1], and what has the sums in its first channels
        first = next(left)
        if several:
            for part in range(first.shape[0]):
                statistics = first[part, :, :, channels:]
                parts.append((statistics[:, :, :1], statistics[:, :, 1:2], first.at[part]))
        else:
            parts.append((first[...][:, :, None], next(left)[...][:, :, None], next(left)))
    sinks = vector(sink, layer[0])[:, :, None]
    largest = functools.reduce(jnp.maximum, (maximum for maximum, _, _ in parts), sinks)
    shares = [jnp.exp(maximum - largest) for maximum, _, _ in parts]
    amounts = (total * share for (_, total, _), share in zip(parts, shares, strict=True))
    denominator = functools.reduce(jnp.add, amounts, jnp.exp(sinks - largest))
    for start in range(0, heads, HEADS):
        count = min(HEADS, heads - start)
        own = slice(start, start + count)
        terms = (
            weighted[:, own, :channels].astype(jnp.float32) * (share / denominator)[:, own]
            for (_, _, weighted), share in zip(parts, shares, strict=True)
        )
        rows = functools.reduce(jnp.add, terms).astype(out.dtype).astype(jnp.float32)
        rows = turned(rows, cos[...], sin[...], inverse=True).astype(out.dtype)
        out[:, start * channels : (start + count) * channels] = rows.reshape(rows.shape[0], count * channels)
