"""Gradients of the end of attention's softmax as one TPU operation, see `output.tpu`.

With the partial softmaxes' maxima m, sums t and weighted sums w, the largest maximum M, and the gradient g of the
output turned as the queries were:

    e = exp(m - M)      D = sum of e t, and of exp(sink - M)      d w = g e / D      d D = -(g . sum of w e / D) / D
    d t = e d D         d sink = exp(sink - M) d D

A block of tokens is read and written once. No gradient is that of a maximum: it is divided by again.
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

from v4_jax.kernels.rotary.tpu import HEADS, VMEM_BYTES, block_of, turned
from v4_jax.layers.partials import Partial, shape_of
from v4_jax.layers.rotary import Turn


def gradients(
    partials: Sequence[Partial], sink: Array, turn: Turn, gradient: Array, *, interpret: bool = False
) -> tuple[list[Partial], Array]:
    """Gradients of `layers.window_attention.attention_output` for partial softmaxes and the sink.

    Args:
      partials: of disjoint sets of keys.
      sink: [H] logits that take part in the denominator alone.
      turn: by how much the queries' positions turned them.
      gradient: [B, Q, H * C] of the result.
    """
    batch, size, heads, channels = shape_of(partials[0])
    tokens, width = batch * size, heads * channels
    block = block_of(tokens, width * len(partials))

    def by_token(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((block, *shape), lambda i: (i, *(0 for _ in shape)))

    operands, specs, out, out_specs = [], [], [], []
    for some in partials:
        operands += [x.reshape(tokens, heads) for x in (some.maximum, some.total)]
        operands.append(some.weighted.reshape(tokens, heads, channels))
        specs += [by_token(heads), by_token(heads), by_token(heads, channels)]
        out.append(jax.ShapeDtypeStruct((tokens, heads), jnp.float32))
        out.append(jax.ShapeDtypeStruct((tokens, heads, channels), some.weighted.dtype))
        out_specs += [by_token(heads), by_token(heads, channels)]
    operands += [sink[None], *(part.reshape(tokens, -1) for part in turn), gradient.reshape(tokens, width)]
    specs += [pl.BlockSpec((1, heads), lambda i: (0, 0)), *[by_token(turn.channels)] * 2, by_token(width)]
    *found, of_sinks = pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(tokens, block),),
        in_specs=specs,
        out_specs=[*out_specs, by_token(heads)],
        out_shape=[*out, jax.ShapeDtypeStruct((tokens, heads), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=0,
            bytes_accessed=2 * sum(some.weighted.nbytes for some in partials) + gradient.nbytes,
            transcendentals=0,
        ),
        interpret=interpret,
        name="attention_output_gradients",
    )(*operands)
    of_partials = [
        Partial(jnp.zeros_like(x.maximum), of_total.reshape(x.total.shape), of_weighted.reshape(x.weighted.shape))
        for x, of_total, of_weighted in zip(partials, found[::2], found[1::2], strict=True)
    ]
    return of_partials, jnp.sum(of_sinks, axis=0).astype(sink.dtype)


def _kernel(*refs: Any) -> None:
    """A block of tokens.

    Refs: maxima and totals [T, H] and weighted sums [T, H, C] of each partial softmax, sinks [1, H], the turn's parts
    [T, R], gradients [T, H * C]; gradients of totals and weighted sums of each, and of sinks [T, H].
    """
    count = (len(refs) - 5) // 5
    maxima, totals, weighted = (refs[place : 3 * count : 3] for place in range(3))
    sink, cos, sin, gradient = refs[3 * count : 3 * count + 4]
    *found, of_sinks = refs[3 * count + 4 :]
    tokens, heads = of_sinks.shape
    channels = gradient.shape[1] // heads
    sinks = sink[...].astype(jnp.float32)
    lowest = jnp.broadcast_to(sinks, (tokens, heads))
    largest = functools.reduce(jnp.maximum, (maximum[...] for maximum in maxima), lowest)
    shares = [jnp.exp(maximum[...] - largest) for maximum in maxima]
    of_sink = jnp.exp(sinks - largest)
    amounts = (total[...] * share for total, share in zip(totals, shares, strict=True))
    denominator = functools.reduce(jnp.add, amounts, of_sink)
    factors = [share / denominator for share in shares]
    for start in range(0, heads, HEADS):
        some = min(HEADS, heads - start)
        own = slice(start, start + some)
        rows = gradient[:, start * channels : (start + some) * channels].astype(jnp.float32)
        rows = turned(rows.reshape(tokens, some, channels), cos[...], sin[...])
        along = jnp.zeros((tokens, some), jnp.float32)
        for sums, factor, of_weighted in zip(weighted, factors, found[1::2], strict=True):
            along += jnp.sum(rows * sums[:, own, :].astype(jnp.float32), axis=-1) * factor[:, own]
            of_weighted[:, own, :] = (rows * factor[:, own][:, :, None]).astype(of_weighted.dtype)
        of_sinks[:, own] = along
    of_denominator = -of_sinks[...] / denominator
    for share, of_total in zip(shares, found[::2], strict=True):
        of_total[...] = share * of_denominator
    of_sinks[...] = of_sink * of_denominator
