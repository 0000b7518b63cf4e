"""Whole experts on more rows than are spread over blocks of E2M1 weights, for TPUs: rows go to them in visits.

A visit takes up to `SPREAD_ROWS` rows that chose one expert, and an expert as many visits as it takes: for the few rows
that an expert gets in a step of a hundred, weights are then expanded by a shift (`stored_weights.py`). The kernel makes
the list of visits itself, takes their rows from VMEM, and adds up there what they yield, in the order of the experts:
as operations of their own, these small steps would take as long as a third of the visits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.block_scales import LANES, SUBLANES
from v4_jax.kernels.experts.feed_forward import VMEM_BYTES, Cut, Visits
from v4_jax.kernels.stored_weights import RUN, SPREAD_ROWS, spread
from v4_jax.kernels.turns import about

_LISTED = (jnp.int32, jnp.int32, jnp.float32)  # of each place: its row, its expert, its weight


def saves(rows: int, cut: Cut) -> bool:
    """Whether so many rows are too many to be spread, and few of them would be spread."""
    return rows > SPREAD_ROWS and cut.wide(rows)[0] is None and cut.wide(SPREAD_ROWS)[0] is not None


def by_visits(
    x: Array,
    assigned: Array,
    scale: Array,
    arrays: Sequence[Array],
    cut: Cut,
    count: int,
    layer: Array,
    *,
    limit: float,
    interpret: bool,
) -> Array:
    """See `tpu.experts`.

    Args:
      x: [T, D], at most `LANES` rows.
      assigned: [T, K] int32.
      scale: [T, K] float32.
      arrays: of the weights.
      cut: how they are cut.
      count: of the experts.
      layer: [1] int32.
      limit: bound of the activations.
      interpret: run in interpret mode.

    Returns:
      [T, D] float32.
    """
    (rows, depth), choices = x.shape, assigned.size
    most = min(count * -(-rows // SPREAD_ROWS), choices // SPREAD_ROWS + min(count, choices))
    places = -(-most * SPREAD_ROWS // LANES) * LANES
    in_vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    return pl.pallas_call(
        functools.partial(_kernel, cut=cut, limit=limit, count=count),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *[in_vmem] * 3,
            *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(arrays),
        ],
        out_specs=in_vmem,
        out_shape=jax.ShapeDtypeStruct((rows, depth), jnp.float32),
        scratch_shapes=[
            *[pltpu.VMEM((1, places), dtype) for dtype in _LISTED],
            *[pltpu.SMEM((1, places), dtype) for dtype in _LISTED],
            pltpu.SemaphoreType.DMA((len(_LISTED),)),
            pltpu.VMEM((rows, depth), jnp.float32),
            *[pltpu.VMEM((SPREAD_ROWS, depth), jnp.float32)] * 2,
            *cut.scratch(SPREAD_ROWS, x.dtype),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=6 * choices * depth * cut.hidden,
            bytes_accessed=min(count, choices) * cut.per_expert + 6 * rows * depth,
            transcendentals=choices * cut.hidden,
        ),
        interpret=interpret,
        name="visit_experts",
    )(layer, assigned, scale, x, *arrays)


def _kernel(layer: Any, assigned: Any, scale: Any, x: Any, *rest: Any, cut: Cut, limit: float, count: int) -> None:
    sources = rest[: len(cut.dtypes)]
    out, *room = rest[len(cut.dtypes) :]
    made, listed, (arrived, rows, taken, yielded, *scratch) = room[:3], room[3:6], room[6:]
    found = _list_visits(assigned[...], scale[...], count, *made)
    copies = [pltpu.make_async_copy(*pair, arrived.at[i]) for i, pair in enumerate(zip(made, listed, strict=True))]
    for copy in copies:
        copy.start()
    for k in range(0, cut.depth, RUN):
        rows[:, k : k + RUN] = x[:, k : k + RUN].astype(jnp.float32)  # of which one can be taken from anywhere
    out[...] = jnp.zeros_like(out)
    for copy in copies:
        copy.wait()
    row_of, expert_of, weight_of = listed

    visits = Visits(cut, sources, scratch, layer[0], lambda number: expert_of[0, number * SPREAD_ROWS], found)

    def visit(number: Any, carry: None) -> None:
        weight = jnp.zeros((SPREAD_ROWS, LANES), jnp.float32)

        def each(do: Callable[[Any, Any], None]) -> None:
            for i in range(SPREAD_ROWS):
                row = row_of[0, number * SPREAD_ROWS + i]
                pl.when(row >= 0)(functools.partial(do, slice(i, i + 1), pl.ds(row, 1)))

        def take(here: Any, row: Any) -> None:
            taken[here, :] = rows[row, :]

        def add(here: Any, row: Any) -> None:
            out[row, :] += yielded[here, :]

        def store(here: Any, products: Array) -> None:
            yielded[:, here] = products.astype(x.dtype).astype(jnp.float32)

        for i in range(SPREAD_ROWS):
            line = jax.lax.broadcasted_iota(jnp.int32, weight.shape, 0)
            weight = jnp.where(line == i, weight_of[0, number * SPREAD_ROWS + i], weight)
        each(take)  # places without a row keep what they have, of which nothing is added
        spread(taken, visits.wide)
        visits.visit(number, taken, lambda active: active * weight[:, :1], limit, store)
        each(add)
        return carry

    visits.begin()
    with about(count):
        jax.lax.fori_loop(0, found, visit, None)


def _list_visits(assigned: Array, scale: Array, count: int, row_of: Any, expert_of: Any, weight_of: Any) -> Array:
    """Finds a place for each choice of one of `count` experts: of the places of a visit, those of its rows come first.

    Args:
      assigned: [T, K] int32.
      scale: [T, K] float32.
      count: of the experts.
      row_of: reference of [1, P] for the row of each place, or -1.
      expert_of: likewise for its expert.
      weight_of: likewise for its weight.

    Returns:
      int32, how many visits there are.
    """
    rows, choices = assigned.shape
    experts = jax.lax.broadcasted_iota(jnp.int32, (rows, -(-count // LANES) * LANES), 1)
    chosen = [assigned[:, k : k + 1] for k in range(choices)]
    chosen = [jnp.where((expert >= 0) & (expert < count), expert, -1) for expert in chosen]
    hot = [(expert == experts).astype(jnp.bfloat16) for expert in chosen]

    def number(shape: tuple[int, int], axis: int) -> Array:
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

    def count_up(before: Array, numbers: Array) -> Array:  # exact: numbers are at most 128, and their sums in float32
        return jnp.dot(before.astype(jnp.bfloat16), numbers.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    square = rows, rows
    above = number(square, 1) < number(square, 0)
    ranks, each = [], jnp.zeros((1, experts.shape[1]), jnp.float32)
    for one in hot:
        ranks.append(count_up(above, one) + each)
        each += jnp.sum(one.astype(jnp.float32), axis=0, keepdims=True)
    turns = jnp.ceil(each / SPREAD_ROWS)
    square = experts.shape[1], experts.shape[1]
    ends = count_up(jnp.broadcast_to(turns, (SUBLANES, square[0])), number(square, 0) <= number(square, 1))[:1]
    first = (ends - turns) * SPREAD_ROWS
    place = [
        jnp.where(expert < 0, -1.0, jnp.sum(jnp.where(one > 0, rank + first, 0.0), axis=1, keepdims=True))
        for expert, one, rank in zip(chosen, hot, ranks, strict=True)
    ]
    shape = rows, LANES
    row = number(shape, 0)

    def fill(i: Any, carry: None) -> None:
        start = pl.multiple_of(i * LANES, LANES)
        here = (start + number(shape, 1)).astype(jnp.float32)
        found, expert, weight = (jnp.zeros(shape, dtype) for dtype in _LISTED)
        for k in range(choices):
            own = place[k] == here
            found = jnp.where(own, row + 1, found)
            expert = jnp.where(own, chosen[k], expert)
            weight = jnp.where(own, scale[:, k : k + 1], weight)
        there = pl.ds(start, LANES)
        row_of[:, there] = jnp.sum(found, axis=0, keepdims=True) - 1
        expert_of[:, there] = jnp.sum(expert, axis=0, keepdims=True)
        weight_of[:, there] = jnp.sum(weight, axis=0, keepdims=True)
        return carry

    jax.lax.fori_loop(0, row_of.shape[1] // LANES, fill, None)
    return jnp.max(ends).astype(jnp.int32)
