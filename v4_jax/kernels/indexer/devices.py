"""The best of the candidates of all devices, for TPUs: which of a device's own they are, in one operation.

Every device has the scores of all candidates and finds the same threshold. Attention wants to know those that lie here
alone, one after another: sorts, of all candidates and of those that were chosen, would be longer than it is.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.indexer.cut import LANES, LEAST, QUERIES, SUBLANES, rank_of
from v4_jax.kernels.indexer.packing import contract, ones, sums_before
from v4_jax.kernels.indexer.threshold import kept, limit_of_ties, narrow, total_of

MOST = 1 << 24  # numbers are below: three digits of a byte, exact in bfloat16
CANDIDATES = 1 << 15  # of a query on all devices, at most
VMEM_BYTES = 32 << 20


def supports(top: int, devices: int) -> bool:
    """Whether `best_of_devices` takes so many of a query from each device."""
    room = -(-top // LANES) * LANES * devices
    return room % (SUBLANES * LANES) == 0 and room <= CANDIDATES


def joined(scores: Array | None, local: Array) -> Array:
    """Candidates of this device [..., 2 K], see `indexer.tpu.candidates`, of scores and local numbers [..., k]."""
    assert scores is not None
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    room = [(0, 0)] * (local.ndim - 1) + [(0, -local.shape[-1] % LANES)]
    return jnp.concatenate([jnp.pad(x, room, constant_values=-1) for x in (bits, local)], axis=-1)


def best_of_devices(
    candidates: Array, index: Any, top: int, *, interpret: bool = False
) -> tuple[Array, Array, Array, Array]:
    """Chooses among the candidates of all devices, of equal scores the earlier entries.

    Args:
      candidates: [devices, N, 2 K] int32, see `indexer.tpu.candidates`; entry `n * devices + device` has the local
        number n.
      index: this device's.
      top: how many of a query are chosen.
      interpret: run in interpret mode, on any platform.

    Returns:
      [N, K] int32 local numbers of those of this device that are chosen, -1 after the last; [N] how many they are; and
      what `chosen` takes, [N] each.
    """
    devices, count, room = candidates.shape
    block, slots = min(count, QUERIES), room // 2
    candidates = jnp.pad(candidates, ((0, 0), (0, -count % block), (0, 0)), constant_values=-1)
    total = candidates.shape[1]
    by_query = jax.ShapeDtypeStruct((total,), jnp.int32)
    found = pl.pallas_call(
        functools.partial(_kernel, top=top),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(total // block,),
            in_specs=[pl.BlockSpec((devices, block, room), lambda i, _: (0, i, 0))],
            out_specs=[
                pl.BlockSpec((block, slots), lambda i, _: (i, 0)),
                *[pl.BlockSpec(memory_space=pltpu.SMEM)] * 3,
            ],
            scratch_shapes=[pltpu.VMEM((block, SUBLANES, devices * slots // SUBLANES), jnp.int32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct((total, slots), jnp.int32), *[by_query] * 3],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=4 * candidates.size, transcendentals=0),
        interpret=interpret,
        name="best_of_devices",
    )(jnp.asarray(index, jnp.int32).reshape(1), candidates)
    here, filled, thresholds, limits = (x[:count] for x in found)
    return here, filled, thresholds, limits


def chosen(candidates: Array, thresholds: Array, limits: Array, top: int) -> Array:
    """Numbers [N, top] of all that `best_of_devices` chose, in falling order, -1 after the last."""
    (devices, count, _), (bits, local) = candidates.shape, jnp.split(candidates, 2, axis=-1)
    numbers = local * devices + jnp.arange(devices, dtype=jnp.int32)[:, None, None]
    found = kept(_ranked(bits, local), numbers, thresholds[:, None], limits[:, None])
    numbers = jnp.moveaxis(jnp.where(found, numbers, -1), 0, 1).reshape(count, -1)
    return -jnp.sort(-numbers, axis=1)[:, :top]


def _ranked(bits: Array, local: Array) -> Array:
    """Integers that order as scores do, of their bits; `LEAST` for none."""
    return jnp.where(local < 0, LEAST, rank_of(bits))


def _kernel(
    index: Any,
    candidates: Any,
    here: Any,
    counts: Any,
    thresholds: Any,
    limits: Any,
    ranks: Any,
    numbers: Any,
    *,
    top: int,
) -> None:
    """A block of queries; scratch: ranks and numbers of their candidates, each query's over eight sublanes."""
    devices, queries, room = candidates.shape
    slots, share, first = room // 2, ranks.shape[2], pl.program_id(0) * queries
    size = min(slots, share)
    for place in range(0, devices * slots, size):
        device, line = place // slots, place // share
        begin, lane = place % slots, place % share
        bits, local = (candidates[device, :, at : at + size] for at in (begin, slots + begin))
        ranks[:, line, lane : lane + size] = _ranked(bits, local)
        numbers[:, line, lane : lane + size] = local * devices + device

    def count(*reached: Any) -> list[Array]:
        """How many candidates fulfil each of `reached`, which map ranks and numbers [Q, 8, 128]."""
        totals = [jnp.zeros((queries, SUBLANES, LANES), jnp.int32)] * len(reached)
        for lane in range(0, share, LANES):
            some = ranks[:, :, lane : lane + LANES], numbers[:, :, lane : lane + LANES]
            totals = [n + reach(*some).astype(jnp.int32) for n, reach in zip(totals, reached, strict=True)]
        return list(map(total_of, totals))

    most = functools.reduce(jnp.maximum, [ranks[:, :, lane : lane + LANES] for lane in range(0, share, LANES)])
    most = jnp.broadcast_to(jnp.max(jnp.max(most, axis=1, keepdims=True), axis=2, keepdims=True), most.shape)
    k = jnp.full(most.shape, top, jnp.int32)
    all_kept = count(lambda rank, _: rank > LEAST)[0] <= top
    threshold, reach, beyond = narrow(
        lambda *points: count(*[lambda rank, _, point=point: rank >= point for point in points]),
        k,
        jnp.where(all_kept, LEAST + 1, LEAST),
        jnp.where(all_kept, LEAST + 1, most),
        jnp.where(all_kept, k, devices * slots),
        slack=0,
        several=True,
    )
    limit = limit_of_ties(
        lambda end: count(lambda rank, number: (rank == threshold) & (number < end))[0], k, reach, beyond, MOST
    )

    slot = jax.lax.broadcasted_iota(jnp.int32, (1, slots), 1)
    order = jax.lax.broadcasted_iota(jnp.int32, (slots, 1), 0).astype(jnp.float32)
    for t in range(queries):
        bits, local = (candidates[index[0], t : t + 1, at : at + slots] for at in (0, slots))
        bound, end = (x[t, :1, :1] for x in (threshold, limit))
        heights = kept(_ranked(bits, local), local * devices + index[0], bound, end).astype(jnp.float32)
        before = sums_before(heights)
        digits = [((local >> shift) & 255).astype(jnp.float32) for shift in (0, 8, 16)]
        lines = jnp.concatenate([*digits, jnp.zeros((SUBLANES - len(digits), slots), jnp.float32)], axis=0)
        found = contract(lines.astype(jnp.bfloat16), ones((before <= order) & (order < before + heights)))
        low, middle, high = (found[i : i + 1].astype(jnp.int32) for i in range(len(digits)))
        total = jnp.sum(heights).astype(jnp.int32)
        here[t : t + 1, :] = jnp.where(slot < total, low | (middle << 8) | (high << 16), -1)
        counts[first + t] = total
        thresholds[first + t], limits[first + t] = jnp.max(bound), jnp.max(end)
