"""Products of groups of inputs that lie side by side, each with its own plain matrix, for TPUs, and rows' gradients.

    out[:, g] = x[:, g] . w[g]^T         d x[:, g] = d out[:, g] . w[g]

XLA would make of it one product per group, and copy what they read and write. Here the grid is (groups, tiles of rows):
a group's matrix is fetched once, and stays for all rows; columns of x and of the results are where they are. Both
kernels come close to the matrix unit's peak, which the matrices' own gradients do in XLA, too.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.block_scales import LANES

ROWS = 512  # of a tile, where there are as many
FEWEST = LANES  # rows; with fewer, XLA waits for the matrices just as long
STRIPS = {1: 512, 0: 1024}  # columns of the results at a time, by the weight's axis that is summed over
VMEM_BYTES = 56 << 20  # of the 64 MiB or more that every generation from v5e on has


def supports(x: Array, weight: Array, dtype: Any) -> bool:
    """Whether the kernels take inputs [..., G, in] and matrices [G * out, in], computed in `dtype`."""
    *leading, groups, size = x.shape
    out = weight.shape[0] // groups
    held = out * size + 2 * ROWS * (out + size)  # elements: the matrix, and two tiles each
    return (
        jnp.dtype(dtype) == jnp.bfloat16
        and math.prod(leading) >= FEWEST
        and not (out % LANES or size % LANES)
        and 2 * (held + out * size) + 4 * ROWS * max(STRIPS.values()) <= VMEM_BYTES
    )


def product(x: Array, weight: Array, *, interpret: bool = False) -> Array:
    """Multiplies each group of inputs by its own matrix.

    Args:
      x: [..., G, in] bfloat16.
      weight: [G * out, in] bfloat16, one matrix below the other.
      interpret: run in interpret mode, on any platform.

    Returns:
      [..., G, out] bfloat16, of sums in float32.
    """
    return _by_rows("grouped_product", x, weight, 1, interpret)


def gradient_of_rows(gradient: Array, weight: Array, *, interpret: bool = False) -> Array:
    """The gradient of `product` for its inputs.

    Args:
      gradient: [..., G, out] bfloat16 of its results.
      weight: as for `product`.
      interpret: likewise.

    Returns:
      [..., G, in] bfloat16, of sums in float32.
    """
    return _by_rows("grouped_product_rows_gradient", gradient, weight, 0, interpret)


def _by_rows(name: str, x: Array, weight: Array, along: int, interpret: bool) -> Array:
    """`along`: the axis of a group's matrix that is summed over."""
    *leading, groups, size = x.shape
    count, out = math.prod(leading), weight.shape[0] // groups
    shape = (out, weight.shape[1])
    width = shape[1 - along]
    strip, tile = math.gcd(width, STRIPS[along]), min(ROWS, pl.cdiv(count, 16) * 16)

    def kernel(x: Any, weight: Any, result: Any) -> None:
        def each(i: Any, carry: None) -> None:
            here = pl.ds(pl.multiple_of(i * strip, strip), strip)
            part = weight[here, :] if along else weight[:, here]
            dimensions = (((1,), (along,)), ((), ()))
            found = jax.lax.dot_general(x[...], part, dimensions, preferred_element_type=jnp.float32)
            result[:, here] = found.astype(result.dtype)
            return carry

        jax.lax.fori_loop(0, width // strip, each, None)

    return pl.pallas_call(
        kernel,
        grid=(groups, pl.cdiv(count, tile)),
        in_specs=[
            pl.BlockSpec((tile, size), lambda g, t: (t, g)),
            pl.BlockSpec(shape, lambda g, t: (g, 0)),
        ],
        out_specs=pl.BlockSpec((tile, width), lambda g, t: (t, g)),
        out_shape=jax.ShapeDtypeStruct((count, groups * width), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * weight.size,
            bytes_accessed=2 * (count * groups * (size + width) + weight.size),
            transcendentals=0,
        ),
        interpret=interpret,
        name=name,
    )(x.reshape(count, groups * size), weight).reshape(*leading, groups, width)
