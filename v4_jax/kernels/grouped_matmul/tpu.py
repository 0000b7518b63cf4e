"""Grouped matmul for TPUs that reads expert weights in their stored format and expands them on the chip.

    out[m] = rows[m] . weights[group of row m]^T        rows sorted by group, group sizes known only at run time

XLA would first write the bfloat16 copy of the weights to memory: four times the bytes of E2M1, and for a whole layer
at once. Here a tile of codes travels as it is stored and is expanded in VMEM (`stored_weights.py`). The reference is
`map_groups` with `linear`, which rounds where this does: weights to bfloat16 (exact for both formats), products summed
in float32, the sum to bfloat16.

The grid is (tiles of N, visits). A visit is a pair (group, tile of rows) that share rows; a tile of rows in which one
group ends and the next begins is visited by both, and each stores its own rows. The list of visits is computed from
the sizes and prefetched as scalars, and its length is the grid's, so empty groups and unused rows cost nothing. A
weight tile spans all of K: successive visits by one group find it already there, E2M1 expanded, and every chosen
expert's weights cross from HBM once per call, however its rows fall into tiles.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.block_scales import LANES
from v4_jax.kernels.stored_weights import E5M2, Form, Kept, Tile, in_memory, kept_shape, multiply, supports, tiles
from v4_jax.number_formats import BlockScaled, Weight, bytes_of

COLUMNS = 512  # outputs of a weight tile at least: long enough to hide what a grid step costs beside its work
TILE = 2 << 20  # elements of a tile at most, where that is more: 1 MiB of E2M1 codes
ROWS = (128, 256)  # rows of a tile: when groups are small, and when they are several tiles each
VMEM_BYTES = 48 << 20  # of the 64 MiB or more that every generation from v5e on has


def grouped_matmul(rows: Array, weight: Weight, sizes: Array, *, layer: Any = None, interpret: bool = False) -> Array:
    """Multiplies each row by its group's weight.

    Args:
      rows: [M, K] bfloat16, sorted by group.
      weight: [G, N, K], or [L, G, N, K] when `layer` is given: bfloat16, or block-scaled E2M1 or E4M3. N and K are
        multiples of 128.
      sizes: [G] int32 rows of each group; their sum is at most M, and rows beyond it come out as anything.
      layer: int32 scalar, which layer of stacked weights to read; the others are not touched.
      interpret: run as plain JAX on any backend, for tests.

    Returns:
      [M, N] bfloat16. Not differentiable.

    Raises:
      NotImplementedError: see `supports`.
      ValueError: shapes disagree.
    """
    if not supports(weight, rows.dtype):
        raise NotImplementedError(
            f"rows {rows.dtype}, weight {jax.tree.map(jnp.shape, weight)}: expected bfloat16 rows, a bfloat16, E2M1 or "
            f"E4M3 weight in the released blocks, and its last two axes multiples of {LANES}"
        )
    if layer is None:
        weight, layer = jax.tree.map(lambda x: x[None], weight), 0
    (count, depth), (_, groups, width, _) = rows.shape, weight.shape
    if sizes.shape != (groups,) or depth != weight.shape[-1]:
        raise ValueError(f"rows {rows.shape} and sizes {sizes.shape} do not fit a weight {weight.shape}")
    tile = tile_rows(count, groups)
    columns = min(max(COLUMNS, TILE // depth // COLUMNS * COLUMNS), width)
    visits = _visits(sizes, count, tile)
    total = jnp.maximum(visits.total, 1)  # a grid of no steps is not worth finding out about: without rows, visit one
    scalars = (jnp.asarray(layer, jnp.int32).reshape(1), *visits[:-1])
    operands, form = in_memory(weight)
    kept = kept_shape(columns, depth, form)

    def spec(tile: Tile) -> pl.BlockSpec:
        def place(n: Any, v: Any, layer: Any, group: Any, *_: Any) -> Any:
            return layer[0], group[v], *tile.indices(n)

        return pl.BlockSpec((None, None, *tile.shape), place)

    return pl.pallas_call(
        functools.partial(_kernel, form=form, keeps=kept is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(width, columns), total),
            in_specs=[
                pl.BlockSpec((tile, depth), lambda n, v, layer, group, base, *_: (base[group[v]] + v, 0)),
                *map(spec, tiles(operands, form, columns)),
            ],
            out_specs=pl.BlockSpec((tile, columns), lambda n, v, layer, group, base, *_: (base[group[v]] + v, n)),
            scratch_shapes=[] if kept is None else [pltpu.VMEM(kept, E5M2)],
        ),
        out_shape=jax.ShapeDtypeStruct((count, width), rows.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(rows, weight, columns),
        interpret=interpret,
        name="grouped_matmul",
    )(*scalars, rows, *operands)


class _Visits(NamedTuple):
    """The pairs (group, tile of rows) to compute, in row order: visit v is of tile `base[group[v]] + v`."""

    group: Array  # [V] int32; entries from `total` on are not read
    base: Array  # [G] int32
    first: Array  # [G] int32, first row of each group
    last: Array  # [G] int32, one beyond its last
    total: Array  # int32


def tile_rows(count: int, groups: int) -> int:
    """Rows of a tile. A group's first visit expands its weights, beside the matrix unit's work on the previous ones.

    That takes as long as the products of 128 rows or more: a smaller tile gains nothing, even where a group has one.
    """
    few, many = ROWS
    return min(count, many if count // groups >= 2 * many else few)


def _visits(sizes: Array, count: int, tile: int) -> _Visits:
    """Lists the visits; V is the most there can be: each tile once, and once more for each boundary between groups."""
    last = jnp.cumsum(sizes.astype(jnp.int32))
    first = last - sizes
    tiles = jnp.where(sizes > 0, (last - 1) // tile - first // tile + 1, 0)
    ends = jnp.cumsum(tiles)
    visits = jnp.arange(pl.cdiv(count, tile) + min(count, sizes.shape[0]) - 1)
    group = jnp.sum(ends <= visits[:, None], axis=1, dtype=jnp.int32)
    return _Visits(jnp.minimum(group, sizes.shape[0] - 1), first // tile - (ends - tiles), first, last, ends[-1])


def _cost(rows: Array, weight: Weight, columns: int) -> pl.CostEstimate:
    """Useful products, and the bytes when as many groups as can be are hit: fewer rows than groups touch fewer."""
    (count, depth), (layers, groups, width, _) = rows.shape, weight.shape
    per_group = (weight.nbytes if isinstance(weight, BlockScaled) else bytes_of(weight)) // (layers * groups)
    passes = pl.cdiv(width, columns)
    traffic = min(count, groups) * per_group + (passes * depth + width) * count * rows.dtype.itemsize
    return pl.CostEstimate(flops=2 * count * width * depth, bytes_accessed=traffic, transcendentals=0)


def _kernel(
    layer: Any, group: Any, base: Any, first: Any, last: Any, rows: Any, *rest: Any, form: Form, keeps: bool
) -> None:
    """One visit: `rows` [tile, K] times a tile of the weight into the group's own rows of `out` [tile, columns]."""
    del layer
    *tile, out = rest[:-1] if keeps else rest
    n, visit = pl.program_id(0), pl.program_id(1)
    own, (count, columns) = group[visit], out.shape
    row = (base[own] + visit) * count + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    mine = (first[own] <= row) & (row < last[own])

    def store(here: Any, products: Array) -> None:
        out[:, here] = jnp.where(mine, products.astype(out.dtype), out[:, here])

    kept = None
    if keeps:
        kept = Kept(rest[-1], (visit == 0) | (group[jnp.maximum(visit - 1, 0)] != own))
    multiply(rows, tile, form, n * columns, store, kept=kept)
