"""Products of few rows with a device's share of the inputs of several weights, for TPUs.

    out = x[:, own] . w[:, own]^T       summed over the devices by the caller

A step of few rows takes as long as its weights take from HBM. Of weights that every device has, each reads a share
here, from the stack of all layers and in whatever form they are stored: E4M3 as in `linear/tpu.py`, or bfloat16. All
copies to VMEM are begun at once, and each weight is multiplied when it is there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.block_scales import LANES, block_lines, by_scaled_rows, product
from v4_jax.kernels.linear import tpu as whole
from v4_jax.kernels.linear.reference import made_up
from v4_jax.kernels.memory import kept_in_hbm
from v4_jax.layer_stack import Cut, one_layer, stack_of
from v4_jax.number_formats import BlockScaled, bytes_of

WEIGHT_BYTES = 40 << 20  # of a device's shares at most
VMEM_BYTES = 56 << 20
# Lines of bfloat16 that are a dimension of their own outside. Else tpu7x's compiler puts twice as many in a tile, which
# kernels do not read: a loop over layers then copies the whole stack in each of them.
LINES = 8

AnyWeight = Array | Cut | BlockScaled


def supports(x: Array, weights: Sequence[AnyWeight], dtypes: Sequence[Any], devices: int) -> bool:
    """Whether `partial_products` takes rows x [M, K], weights [N, K] that so many devices share, and compute dtypes."""
    if x.dtype != jnp.bfloat16 or x.shape[-1] % (devices * LANES):
        return False
    shares = 0
    for weight, dtype in zip(weights, dtypes, strict=True):
        if isinstance(weight, BlockScaled):
            if not whole.supports(weight, dtype):
                return False
        elif weight.dtype != jnp.bfloat16 or weight.shape[0] % 16:
            return False
        codes = weight.codes if isinstance(weight, BlockScaled) else weight
        shares += math.prod(codes.shape) * jnp.dtype(codes.dtype).itemsize // devices
    return shares <= WEIGHT_BYTES


def partial_products(
    x: Array, weights: Sequence[AnyWeight], share: Any, *, devices: int, interpret: bool = False
) -> Array:
    """See `reference.partial_products`, for what `supports` takes; what is made up is undefined. Not differentiable."""
    (count, inputs), depth = x.shape, x.shape[1] // devices
    arrays, scales = [], []
    for weight in weights:
        if isinstance(weight, BlockScaled):
            codes, lines = whole.in_layers(weight)
            scales.append(lines)
        else:
            codes, _ = stack_of(weight)
            codes = codes.reshape(codes.shape[0], -1, LINES, inputs)
        arrays.append(codes)
    scalars = [jnp.asarray(number, jnp.int32).reshape(1) for number in (share, one_layer(weights))]
    x, arrays = kept_in_hbm(x, arrays, interpret=interpret)
    out = jax.ShapeDtypeStruct((count, sum(map(made_up, weights))), jnp.float32)
    moved = sum(bytes_of(array) // (array.shape[0] * devices) for array in arrays)
    flops = 2 * count * depth * sum(weight.shape[0] for weight in weights)
    return pl.pallas_call(
        functools.partial(_kernel, across=[whole.across(w) if isinstance(w, BlockScaled) else None for w in weights]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[
                pl.BlockSpec((count, inputs), lambda i, *_: (0, 0)),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in arrays),
                *(pl.BlockSpec((None, *x.shape[1:]), lambda i, _, layer: (layer[0], 0, 0)) for x in scales),
            ],
            out_specs=pl.BlockSpec(out.shape, lambda i, *_: (0, 0)),
            scratch_shapes=[
                pltpu.VMEM((count, depth), jnp.bfloat16),
                *(pltpu.VMEM((math.prod(array.shape[1:-1]), depth), array.dtype) for array in arrays),
                pltpu.SemaphoreType.DMA((len(arrays),)),
            ],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
        name="partial_products",
    )(*scalars, x, *arrays, *scales)


def _kernel(number: Any, layer: Any, x: Any, *refs: Any, across: list[bool | None]) -> None:
    """Refs: the weights of all layers; the scales of those that have them; out; scratch: a share of the rows, the
    weights' shares, and their semaphores.
    """
    count = len(across)
    weights, rest = refs[:count], iter(refs[count:])
    scales = [None if turned is None else next(rest) for turned in across]
    out, rows, *shares, arrived = rest
    depth = rows.shape[1]
    first = pl.multiple_of(number[0] * depth, LANES)
    copies = []
    for i, (weight, share) in enumerate(zip(weights, shares, strict=True)):
        lines_together = weight.reshape(weight.shape[0], *share.shape[:1], weight.shape[-1])
        own = lines_together.at[layer[0], :, pl.ds(first, depth)]
        copies.append(pltpu.make_async_copy(own, share, arrived.at[i]))
    for copy in copies:
        copy.start()
    rows[...] = x[:, pl.ds(first, depth)]
    lines: list[Any] = [
        None if of is None else _own(block_lines(of[...], 0, share.shape[0], bool(turned)), number[0], depth // LANES)
        for of, share, turned in zip(scales, shares, across, strict=True)
    ]
    start = 0
    for share, copy, of in zip(shares, copies, lines, strict=True):
        copy.wait()
        width = share.shape[0]
        found = product(rows[...], share[...]) if of is None else by_scaled_rows(rows, share, pl.ds(0, width), of)
        out[:, start : start + width] = found
        start += -(-width // LANES) * LANES


def _own(lines: Array, share: Any, blocks: int) -> Array:
    """Of scales [R, K / 128] those of the share, [R, blocks]: by a product, exact for powers of two."""
    shape = lines.shape[1], blocks
    from_, to = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    mine = (from_ == to + share * blocks).astype(jnp.bfloat16)
    return jnp.dot(lines.astype(jnp.bfloat16), mine, preferred_element_type=jnp.float32)
