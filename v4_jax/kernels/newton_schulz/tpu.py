"""One iteration for TPUs: of products that are symmetric the blocks on one side of the diagonal are computed alone.

Both squares, y y^T and that of the result, are symmetric. A kernel holds a whole square in VMEM, computes its blocks on
and above the diagonal, and writes each to its place and, turned, to the place across. The polynomial is taken where the
second square is in float32, with its constant on the diagonal, so that one product is left.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
BLOCK = 512  # rows and columns of a square's block, and columns of the last product's
STRIP = 256  # rows of the last product at a time: the widest matrix unit
VMEM_BYTES = 56 << 20  # of the 64 MiB or more that every generation from v5e on has


def supports(y: Array) -> bool:
    """Whether `step` takes matrices [..., m, n]."""
    m, n = y.shape[-2:]
    block, width = _block(m), _block(n)
    held = m * m + 4 * block * n, m * m + 4 * m * width  # elements of 16 bits, as many as the two kernels hold
    return y.dtype == jnp.bfloat16 and not (m % LANES or n % LANES) and 2 * max(held) + (4 << 20) <= VMEM_BYTES


def step(y: Array, coefficients: Array, *, interpret: bool = False) -> Array:
    """See `reference.step`, of bfloat16."""
    matrices = y.reshape(-1, *y.shape[-2:])
    squared = _square(matrices, None, coefficients, interpret)
    factor = _square(squared, squared, coefficients, interpret)
    return _multiply(factor, matrices, interpret).reshape(y.shape)


def _block(size: int) -> int:
    return math.gcd(size, BLOCK)


def _whole(m: int) -> pl.BlockSpec:
    """A square [m, m] of each matrix, in VMEM; two where there is room."""
    once = pl.Buffered(1) if 2 * 2 * m * m > VMEM_BYTES // 2 else None
    return pl.BlockSpec((None, m, m), lambda i, *_: (i, 0, 0), pipeline_mode=once)


def _square(x: Array, added: Array | None, coefficients: Array, interpret: bool) -> Array:
    """x x^T of [N, m, k], or the polynomial of it and what is `added` to it [N, m, m]."""
    count, m, k = x.shape
    block = _block(m)
    pairs = np.stack(np.triu_indices(m // block)).astype(np.int32)

    def place(which: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, block, k), lambda i, p, pairs, which=which: (i, pairs[which, p], 0))

    operands, specs = [x, x], [place(0), place(1)]
    if added is not None:
        operands.append(added)
        specs.append(pl.BlockSpec((None, block, block), lambda i, p, pairs: (i, pairs[0, p], pairs[1, p])))
    return pl.pallas_call(
        functools.partial(_square_kernel, block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count, pairs.shape[1]),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *specs],
            out_specs=_whole(m),
        ),
        out_shape=jax.ShapeDtypeStruct((count, m, m), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * pairs.shape[1] * block * block * k,
            bytes_accessed=2 * count * (pairs.shape[1] * block * k + m * m),
            transcendentals=0,
        ),
        interpret=interpret,
        name="square" if added is None else "square_of_square",
    )(jnp.asarray(pairs), coefficients, *operands)


def _square_kernel(pairs: Any, coefficients: Any, left: Any, right: Any, *rest: Any, block: int) -> None:
    """A block and the one across. Refs: [3] in scalar memory, two blocks of rows [block, k], [what is added [block,
    block],] and the whole square [m, m]."""
    *added, out = rest
    row, column = (pairs[which, pl.program_id(1)] for which in range(2))
    value = jax.lax.dot_general(left[...], right[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if added:
        value = coefficients[2] * value + coefficients[1] * added[0][...].astype(jnp.float32)
        down, across = (jax.lax.broadcasted_iota(jnp.int32, value.shape, axis) for axis in range(2))
        value += jnp.where((down == across) & (row == column), coefficients[0], 0.0)
    here, there = (pl.ds(pl.multiple_of(at * block, block), block) for at in (row, column))
    out[there, here] = value.T.astype(out.dtype)
    out[here, there] = value.astype(out.dtype)


def _multiply(factor: Array, y: Array, interpret: bool) -> Array:
    """[N, m, m] times [N, m, n]."""
    count, m, n = y.shape
    width = _block(n)
    by_columns = pl.BlockSpec((None, m, width), lambda i, j: (i, 0, j))
    return pl.pallas_call(
        _multiply_kernel,
        grid=(count, n // width),
        in_specs=[_whole(m), by_columns],
        out_specs=by_columns,
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * m * m * n, bytes_accessed=2 * count * (m * m + 2 * m * n), transcendentals=0
        ),
        interpret=interpret,
        name="square_times_matrix",
    )(factor, y)


def _multiply_kernel(factor: Any, y: Any, out: Any) -> None:
    """Refs: [m, m], and blocks of columns [m, width]."""
    strip = math.gcd(factor.shape[0], STRIP)

    def each(i: Any, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(i * strip, strip), strip)
        product = jax.lax.dot_general(
            factor[rows, :], y[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        out[rows, :] = product.astype(out.dtype)
        return carry

    jax.lax.fori_loop(0, factor.shape[0] // strip, each, None)
