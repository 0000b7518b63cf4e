"""Products with E4M3 weights for TPUs, which read the weights as they are stored, from the stack of all layers.

    out = x . (codes * scales)^T        128 x 128 elements share a scale, a power of two

XLA would write copies of the weights' size to memory, of the weights themselves and of their scales; and a layer's
weights would first be cut out of the stack. Here a tile of codes travels as it is stored, and the matrix unit takes it
so: the codes of 128 outputs against the rows, whose every 128 inputs are multiplied by the scale of their block, which
is exact in bfloat16. With many rows, that leaves half of a 256 wide matrix unit idle: then a tile is expanded to
bfloat16 once in VMEM, exactly too, for all tiles of rows in turn. The reference is the product with `dequantise`, which
rounds where this does: products summed in float32, the sum to bfloat16.

The grid is (tiles of outputs, tiles of rows). A weight tile spans all inputs, so the weights cross from HBM once.
Several weights of the same rows go in one call: their tiles follow one another in the grid, and each is fetched while
the one before is multiplied, across the border from one weight to the next.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.block_scales import (
    CHUNKS,
    LANES,
    SUBLANES,
    block_lines,
    lines_of,
    product,
    repeat_lanes,
    scale_blocks,
    times_tile,
)
from v4_jax.kernels.linear import few, reference
from v4_jax.kernels.memory import kept_in_hbm
from v4_jax.number_formats import E4M3, FP8_BLOCK, BlockScaled, Weight

TILE = 1 << 20  # codes of a weight tile at most, where 128 outputs have no more: enough to hide a grid step's overhead
STEPS = 4  # at least, where the outputs suffice: the first tile's way from HBM is hidden by nothing
ROWS = 256  # of a tile of rows, where there are more than can be one
WHOLE_ROWS, WHOLE_BYTES = 512, 8 << 20  # of rows that are one tile: of several, each travels for every tile of outputs
MANY = {True: 256, False: 512}  # rows beyond which a weight tile is expanded, by whether they are one tile
VMEM_BYTES = 48 << 20  # of the 64 MiB or more that every generation from v5e on has


def supports(weight: Weight, dtype: Any, groups: int = 1) -> bool:
    """Whether `matmul` takes this weight [N, K], `groups` matrices one below the other, and compute dtype."""
    if jnp.dtype(dtype) != jnp.bfloat16 or not isinstance(weight, BlockScaled):
        return False
    if jnp.dtype(weight.codes.dtype) != E4M3 or weight.block != FP8_BLOCK or weight.ndim != 2:
        return False
    return weight.shape[0] % (groups * LANES) == 0 and weight.shape[1] % LANES == 0


def matmul(x: Array, weights: Sequence[BlockScaled], *, groups: int = 1, interpret: bool = False) -> Array:
    """Multiplies rows by one or several weights.

    Args:
      x: [M, groups * K] bfloat16.
      weights: [N_i, K] E4M3 each, in blocks of 128 x 128 that share a scale, a power of two from 2^-126 to 2^126. Those
        that are layers of a stack are read there; it is the same layer of each.
      groups: matrices of equal size that lie one below the other in the weight, of which each has its own K inputs;
        with one weight only.
      interpret: run as plain JAX on any backend, for tests.

    Returns:
      [M, N_1 + N_2 + ...] bfloat16. Not differentiable.

    Raises:
      NotImplementedError: see `supports`.
      ValueError: shapes disagree.
    """
    for weight in weights:
        if not supports(weight, x.dtype, groups):
            raise NotImplementedError(
                f"x {x.dtype}, weight {jax.tree.map(jnp.shape, weight)} in {groups} groups: expected bfloat16, an E4M3 "
                f"weight in the released blocks, and both axes of its matrices multiples of {LANES}"
            )
    (count, inputs), depth = x.shape, weights[0].shape[1]
    if inputs != groups * depth or any(weight.shape[1] != depth for weight in weights):
        raise ValueError(f"x {x.shape} in {groups} groups does not fit weights {[weight.shape for weight in weights]}")
    if groups > 1 and len(weights) > 1:
        raise ValueError(f"expected one weight in groups, found {len(weights)}")

    widths = [weight.shape[0] for weight in weights]
    whole = count <= WHOLE_ROWS and 2 * count * depth <= WHOLE_BYTES
    expand = count > MANY[whole]
    columns = _columns([width // groups for width in widths], depth)
    tiles = [width // columns for width in widths]
    firsts = [sum(tiles[:i]) for i in range(len(tiles))]
    rows, per_group = count if whole else min(count, ROWS), tiles[0] // groups
    stacked = [weight.stack for weight in weights if weight.stack is not None]
    layer = jnp.asarray(stacked[0].layer if stacked else 0, jnp.int32).reshape(1)
    pairs = [in_layers(weight) for weight in weights]
    if stacked:
        x, codes = kept_in_hbm(x, [codes for codes, _ in pairs], interpret=interpret)
        pairs = list(zip(codes, [scales for _, scales in pairs], strict=True))

    traffic = sum(weight.nbytes for weight in weights) + 2 * count * (inputs + sum(widths))
    cost = pl.CostEstimate(flops=2 * count * depth * sum(widths), bytes_accessed=traffic, transcendentals=0)
    if len(weights) == 1 and few.takes(count, widths[0]):
        run = functools.partial(few.matmul, across=across(weights[0]), groups=groups, vmem=VMEM_BYTES, cost=cost)
        return run(x, *pairs[0], layer, interpret=interpret)

    def specs_of(i: int) -> list[pl.BlockSpec]:
        def codes_of(n: Any, m: Any, layer: Any) -> Any:
            del m
            return 0 if weights[i].stack is None else layer[0], jnp.clip(n - firsts[i], 0, tiles[i] - 1), 0

        def scales_of(n: Any, m: Any, layer: Any) -> Any:
            del n, m
            return 0 if weights[i].stack is None else layer[0], 0, 0

        whole = pairs[i][1].shape[1:]
        return [pl.BlockSpec((None, columns, depth), codes_of), pl.BlockSpec((None, *whole), scales_of)]

    def x_map(n: Any, m: Any, layer: Any) -> Any:
        del layer
        # Not `//`: the sign that it looks at lowers differently by chip, which a CPU host cannot tell.
        return m, 0 if groups == 1 else jax.lax.div(n, jnp.int32(per_group))

    # Rows that come once need no second buffer. The compiler may join the kernel with the update in place that its
    # result is for, and then gives it 16 MiB.
    once = pl.Buffered(1) if whole and groups == 1 else None
    return pl.pallas_call(
        functools.partial(_kernel, firsts=firsts, across=[across(weight) for weight in weights]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(sum(tiles), pl.cdiv(count, rows)),
            in_specs=[
                pl.BlockSpec((rows, depth), x_map, pipeline_mode=once),
                *itertools.chain(*map(specs_of, range(len(weights)))),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda n, m, layer: (m, n)),
            scratch_shapes=[pltpu.VMEM((columns, depth), jnp.bfloat16)] if expand else [],
        ),
        out_shape=jax.ShapeDtypeStruct((count, sum(widths)), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="block_scaled_matmul",
    )(layer, x, *itertools.chain(*pairs))


def one_row(x: Array, weight: Array, dtype: Any) -> Array:
    """`reference.matmul` of a single row x [..., in], all other axes of which are of size 1.

    With a row of zeros beside it: XLA sums the products of one row on the vector unit, which takes four times as long
    as reading the weight, and those of two on the matrix unit.
    """
    rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
    return reference.matmul(rows, weight, dtype)[:1].reshape(*x.shape[:-1], -1)


def _columns(widths: Sequence[int], depth: int) -> int:
    """Outputs of a tile: the most, as 128 times a divisor of all weights', that keep to `TILE` and `STEPS`."""
    units = math.gcd(*(width // LANES for width in widths))
    most = max(1, min(TILE // (depth * LANES), sum(widths) // (LANES * STEPS)))
    return LANES * max(size for size in range(1, min(units, most) + 1) if units % size == 0)


def in_layers(weight: BlockScaled) -> tuple[Array, Array]:
    """Codes [L, N, K] and scales [L, N / 128, K / 128] of all layers, or of the only one; see `across`."""
    stack = weight.stack
    codes, scales = (weight.codes[None], weight.scales[None]) if stack is None else (stack.codes, stack.scales)
    return codes, jnp.swapaxes(scales, 1, 2) if across(weight) else scales


def across(weight: BlockScaled) -> bool:
    """Whether the scales come as [L, K / 128, N / 128]: XLA stores the longer axis innermost; so, they need no copy."""
    return weight.shape[0] > weight.shape[1]


def _kernel(layer: Any, x: Any, *refs: Any, firsts: list[int], across: list[bool]) -> None:
    """One tile: `x` [rows, K] times `codes` [columns, K] of the weight whose turn it is into `out` [rows, columns]."""
    del layer
    weights = [(refs[2 * i], refs[2 * i + 1]) for i in range(len(firsts))]
    out, *expanded = refs[2 * len(firsts) :]
    tile, first_rows, tiles = pl.program_id(0), pl.program_id(1) == 0, pl.num_programs(0)
    for i, (codes, scales) in enumerate(weights):

        def own(i: int = i, codes: Any = codes, scales: Any = scales) -> None:
            columns = codes.shape[0]
            first = (tile - firsts[i]) * columns
            if not expanded:
                lines = lines_of(scales[...], x.shape[0], first, columns, across[i])
                out[...] = times_tile(x, codes, lines).astype(out.dtype)
                return

            @pl.when(first_rows)
            def _() -> None:
                _expand(codes, block_lines(scales[...], first, columns, across[i]), expanded[0])

            out[...] = product(x[...], expanded[0][...]).astype(out.dtype)

        if len(weights) == 1:
            own()
        else:
            last = firsts[i + 1] if i + 1 < len(firsts) else tiles
            pl.when((firsts[i] <= tile) & (tile < last))(own)


def _expand(codes: Any, lines: Array, out: Any) -> None:
    """Codes [columns, K] times their scales, see `block_lines`, in bfloat16."""
    columns, depth = codes.shape
    chunk = next(size for size in CHUNKS if depth % size == 0)
    for k in range(0, depth, chunk):
        here = slice(k, k + chunk)
        repeated = repeat_lanes(lines, LANES, k, chunk)
        for i in range(columns // LANES):
            block = slice(i * LANES, (i + 1) * LANES)
            out[block, here] = scale_blocks(codes[block, here], repeated[i * SUBLANES : (i + 1) * SUBLANES])
