"""The end of an attention sublayer for few rows as one TPU kernel: what `output/tpu.py` does, and both products.

The products wait for their weights, and nothing else does: all copies of them to VMEM are begun before the softmaxes
are merged, in strips of outputs, and each strip is multiplied when it is there.
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

from v4_jax.kernels.block_scales import FEW_ROWS, by_spread_rows, scales_of_outputs, spread
from v4_jax.kernels.linear import tpu as linear
from v4_jax.kernels.memory import kept_in_hbm
from v4_jax.kernels.output.tpu import as_operands, merge
from v4_jax.kernels.rotary.tpu import along
from v4_jax.kernels.rotary.tpu import supports as turns
from v4_jax.layer_stack import one_layer
from v4_jax.layers.partials import Packed, Partial, shape_of
from v4_jax.layers.rotary import Turn

STRIP_BYTES = 1 << 20  # of a weight, at most, that are waited for and multiplied at once
WEIGHT_BYTES = 40 << 20
VMEM_BYTES = 60 << 20


def supports(partials: Sequence[Partial | Packed], turn: Turn, weights: Sequence[Any], groups: int, dtype: Any) -> bool:
    """Whether `attention_end` takes partial softmaxes [B, Q, H, C] and both weights."""
    batch, size, heads, channels = shape_of(partials[0])
    return (
        batch * size <= FEW_ROWS
        and turns((batch, size, heads, channels), jnp.dtype(dtype), turn)
        and linear.supports(weights[0], dtype, groups)
        and linear.supports(weights[1], dtype)
        and sum(weight.codes.size for weight in weights) <= WEIGHT_BYTES
    )


def attention_end(
    partials: Sequence[Partial | Packed],
    sink: Array,
    turn: Turn,
    weights: Sequence[Any],
    *,
    groups: int,
    dtype: Any,
    interpret: bool = False,
) -> Array:
    """See `layers.window_attention.attention_end`, for what `supports` takes; not differentiable."""
    batch, size, heads, channels = shape_of(partials[0])
    tokens, width = batch * size, weights[1].shape[0]
    operands, specs, _ = as_operands(partials, sink, turn, tokens)
    pairs = [linear.in_layers(weight) for weight in weights]
    operands[0], codes = kept_in_hbm(operands[0], [codes for codes, _ in pairs], interpret=interpret)

    def of_layer(scales: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *scales.shape[1:]), lambda i, layer: (layer[0], 0, 0))

    strips = [_strips(weight, groups if place == 0 else 1) for place, weight in enumerate(weights)]
    moved = sum(weight.nbytes for weight in weights)
    found = pl.pallas_call(
        functools.partial(
            _kernel,
            packed=[isinstance(some, Packed) for some in partials],
            across=[linear.across(weight) for weight in weights],
            groups=groups,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[
                *specs,
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in codes),
                *(of_layer(scales) for _, scales in pairs),
            ],
            out_specs=along(tokens, width),
            scratch_shapes=[
                pltpu.VMEM((tokens, heads * channels), dtype),
                pltpu.VMEM((tokens, weights[0].shape[0]), dtype),
                *(
                    pltpu.VMEM((count, weight.shape[0] // count, weight.shape[1]), weight.codes.dtype)
                    for weight, count in zip(weights, strips, strict=True)
                ),
                *(pltpu.SemaphoreType.DMA((count,)) for count in strips),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((tokens, width), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(flops=2 * tokens * moved, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
        name="attention_end",
    )(
        jnp.asarray(one_layer([sink, *weights]), jnp.int32).reshape(1),
        *operands,
        *codes,
        *(scales for _, scales in pairs),
    )
    return found.reshape(batch, size, width)


def _strips(weight: Any, groups: int) -> int:
    """Strips of a weight [N, K], none of which is in two groups."""
    blocks = weight.shape[0] // groups // linear.LANES
    most = max(1, STRIP_BYTES // (linear.LANES * weight.shape[1]))
    return groups * blocks // max(size for size in range(1, min(blocks, most) + 1) if blocks % size == 0)


def _kernel(layer: Any, *refs: Any, packed: list[bool], across: list[bool], groups: int) -> None:
    """Refs: what `merge` has; weights of all layers, and their scales of this one; out; scratch: what
    comes of each step but the last; strips of both weights, and their semaphores.
    """
    (*given, first, second, first_scales, second_scales, out, rows, hidden) = refs[:-4]
    first_strips, second_strips, first_here, second_here = refs[-4:]

    def copies(weight: Any, strips: Any, here: Any) -> list[Any]:
        size = strips.shape[1]
        return [
            pltpu.make_async_copy(weight.at[layer[0], pl.ds(i * size, size), :], strips.at[i], here.at[i])
            for i in range(strips.shape[0])
        ]

    all_copies = copies(first, first_strips, first_here), copies(second, second_strips, second_here)
    for copy in (*all_copies[0], *all_copies[1]):
        copy.start()
    merge(layer, *given, rows, packed=packed)

    def multiply(x: Any, strips: Any, copies: list[Any], scales: Any, turned: bool, groups: int, target: Any) -> None:
        count, size, depth = strips.shape
        for i, copy in enumerate(copies):
            group = i * groups // count
            if i % (count // groups) == 0:
                wide = spread(x[:, group * depth : (group + 1) * depth])
            copy.wait()
            lines = scales_of_outputs(scales[...], i * size, size, turned)
            target[:, i * size : (i + 1) * size] = by_spread_rows(wide, strips.at[i], lines).astype(target.dtype)

    multiply(rows, first_strips, all_copies[0], first_scales, across[0], groups, hidden)
    multiply(hidden, second_strips, all_copies[1], second_scales, across[1], 1, out)
