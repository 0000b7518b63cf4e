"""Few rows times one E4M3 weight, for TPUs: tiles of the weight start on their way from HBM some tiles ahead.

Such a product takes as long as its weight takes to arrive. A grid has one tile on its way at a time, so that each also
costs the latency of HBM, a third of its time on v6e; here `AHEAD` are. Otherwise as in `tpu.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.block_scales import FEW_ROWS, LANES, SUBLANES, lines_of, some_lines, times_tile
from v4_jax.kernels.memory import cores
from v4_jax.number_formats import E4M3

ROWS = 128  # at most: with more, the matrix unit takes longer than the weight's way
OUT_BYTES = 4 << 20  # of results, which stay in VMEM, at most
TILE = 1 << 20  # codes of a tile at most, where 128 outputs have no more
AHEAD = 4  # tiles on their way at a time


def takes(rows: int, width: int) -> bool:
    """Whether `matmul` is for so many rows and outputs, on the chip that it is traced for: not if that has two cores,
    between which it has no grid to split.
    """
    return cores() == 1 and rows <= ROWS and 2 * rows * width <= OUT_BYTES


def matmul(
    x: Array,
    codes: Array,
    scales: Array,
    layer: Array,
    *,
    across: bool,
    groups: int,
    vmem: int,
    cost: pl.CostEstimate,
    interpret: bool,
) -> Array:
    """See `tpu.matmul`.

    Args:
      x: [M, groups * K] bfloat16.
      codes: [L, N, K] of all layers.
      scales: [L, N / 128, K / 128], or with the last two swapped.
      layer: [1] int32.
      across: whether they are swapped.
      groups: matrices in the weight.
      vmem: bytes that the kernel may have.
      cost: of the product.
      interpret: run in interpret mode.

    Returns:
      [M, N] bfloat16.
    """
    (_, width, depth), rows = codes.shape, x.shape[0]
    columns = _columns(width // groups, depth)
    tiles = width // columns
    lines = (depth // LANES, width) if rows <= FEW_ROWS else (width // LANES * SUBLANES, depth // LANES)
    in_vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    return pl.pallas_call(
        functools.partial(_kernel, across=across, per_group=tiles // groups),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[
                in_vmem,
                pl.BlockSpec(memory_space=pltpu.HBM),
                pl.BlockSpec((None, *scales.shape[1:]), lambda i, layer: (layer[0], 0, 0)),
            ],
            out_specs=in_vmem,
            scratch_shapes=[
                pltpu.VMEM((min(AHEAD, tiles), columns, depth), E4M3),
                pltpu.SemaphoreType.DMA((min(AHEAD, tiles),)),
                pltpu.VMEM(lines, jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem),
        cost_estimate=cost,
        interpret=interpret,
        name="few_rows_matmul",
    )(layer, x, codes, scales)


def _columns(width: int, depth: int) -> int:
    """Outputs of a tile: 128 times a divisor of the weight's, so that there are `AHEAD` tiles where possible."""
    units = width // LANES
    most = max(1, min(TILE // (depth * LANES), units // AHEAD))
    return LANES * max(size for size in range(1, most + 1) if units % size == 0)


def _kernel(layer: Any, x: Any, codes: Any, scales: Any, out: Any, *scratch: Any, across: bool, per_group: int) -> None:
    """Scratch: [`AHEAD`, columns, K] for tiles, the n-th at n modulo `AHEAD`; a semaphore for each; lines of scales."""
    room, arrived, lines = scratch
    (slots, columns, depth), tiles = room.shape, out.shape[1] // room.shape[1]

    def copy(tile: Any, slot: int) -> Any:
        here = pl.ds(pl.multiple_of(tile * columns, columns), columns)
        return pltpu.make_async_copy(codes.at[layer[0], here, :], room.at[slot], arrived.at[slot])

    def take(tile: Any, slot: int, *, more: bool) -> None:
        first = pl.multiple_of(tile * columns, columns)
        group = pl.multiple_of(jax.lax.div(tile, jnp.int32(per_group)) * depth, LANES)
        copy(tile, slot).wait()
        few = x.shape[0] <= FEW_ROWS
        own = lines[:, pl.ds(first, columns)] if few else some_lines(lines, first, columns)
        product = times_tile(x.at[:, pl.ds(group, depth)], room.at[slot], own)
        out[:, pl.ds(first, columns)] = product.astype(out.dtype)
        if more:
            copy(tile + slots, slot).start()

    def take_all(turn: Any, carry: None) -> None:
        for slot in range(slots):
            take(turn * slots + slot, slot, more=True)
        return carry

    for slot in range(slots):
        copy(slot, slot).start()
    lines[...] = lines_of(scales[...], x.shape[0], 0, out.shape[1], across)
    turns = tiles // slots - 1  # after which all tiles but those on their way have begun it
    jax.lax.fori_loop(0, turns, take_all, None)
    for tile in range(turns * slots, tiles):
        take(jnp.int32(tile), tile % slots, more=tile + slots < tiles)
