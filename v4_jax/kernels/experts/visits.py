"""Whole experts on more rows than are spread over blocks of E2M1 weights, for TPUs: rows go to them in visits.

A visit takes up to `SPREAD_ROWS` rows that chose one expert, and an expert as many visits as it takes: for the few rows
that an expert gets in a step of a hundred, weights are then expanded by a shift (`stored_weights.py`). Each visit has
places for its rows in one array, where these are gathered before; what the visits yield is gathered back and summed in
the order of a row's choices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.experts.feed_forward import VMEM_BYTES, Cut, Visits
from v4_jax.kernels.stored_weights import SPREAD_ROWS, spread
from v4_jax.sharding.dispatch import back, count_each


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
      x: [T, D].
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
    depth, choices = x.shape[1], assigned.shape[1]
    plan = _plan(assigned, count)
    number, places = len(plan.expert), len(plan.choice)
    by_place = pl.BlockSpec((SPREAD_ROWS, depth), lambda v, *_: (v, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, cut=cut, limit=limit),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(jnp.maximum(plan.found, 1),),  # a grid of no steps is not worth finding out about
            in_specs=[
                by_place,
                pl.BlockSpec((SPREAD_ROWS, 1), lambda v, *_: (v, 0)),
                *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(arrays),
            ],
            out_specs=by_place,
            scratch_shapes=cut.scratch(SPREAD_ROWS, x.dtype),
        ),
        out_shape=jax.ShapeDtypeStruct((places, depth), x.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=6 * places * depth * cut.hidden,
            bytes_accessed=number * cut.per_expert + 4 * places * depth,
            transcendentals=places * cut.hidden,
        ),
        interpret=interpret,
        name="visit_experts",
    )(layer, plan.expert, x[plan.choice // choices], scale.reshape(-1)[plan.choice][:, None], *arrays)

    return back(out, plan.choice // choices, plan.place)


class _Plan(NamedTuple):
    """Which choice goes where.

    Attributes:
      expert: [V] int32 of each visit.
      found: int32, how many visits there are; those beyond are of any expert.
      choice: [V * `SPREAD_ROWS`] int32 which of all choices takes each place; places without one repeat any.
      place: [T, K] int32 of each choice; -1 for those of no expert.
    """

    expert: Array
    found: Array
    choice: Array
    place: Array


def _plan(assigned: Array, count: int) -> _Plan:
    """Of choices [T, K] of `count` experts. As sums over experts: a gather takes a TPU two or three operations."""
    rows, size = assigned.shape[0], assigned.size
    most = min(count * -(-rows // SPREAD_ROWS), size // SPREAD_ROWS + min(count, size))
    flat = jnp.where((assigned < 0) | (assigned >= count), count, assigned).reshape(-1)
    numbers = jnp.arange(count)[:, None]
    each = count_each(flat, count)
    turns = jax.lax.div(each + (SPREAD_ROWS - 1), SPREAD_ROWS)
    until = numbers >= numbers.T  # [E, E] each one's own and those before it
    ends, last = jnp.sum(jnp.where(until, turns, 0), axis=1), jnp.sum(jnp.where(until, each, 0), axis=1)
    first_place, first_rank = (ends - turns) * SPREAD_ROWS, last - each

    visits = jnp.arange(most)
    expert = jnp.minimum(jnp.sum(ends[:, None] <= visits, axis=0, dtype=jnp.int32), count - 1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    start = jnp.sum(jnp.where(expert == numbers, (first_rank - first_place)[:, None], 0), axis=0)
    ranks = (start + visits * SPREAD_ROWS)[:, None] + jnp.arange(SPREAD_ROWS)
    choice = order[jnp.clip(ranks, 0, size - 1)].reshape(-1)

    place = jnp.sum(jnp.where(flat == numbers, (first_place - first_rank)[:, None], 0), axis=0)
    place = jnp.where(flat < count, place + jnp.argsort(order).astype(jnp.int32), -1)
    return _Plan(expert, ends[-1], choice, place.reshape(assigned.shape))


def _kernel(layer: Any, expert: Any, x: Any, scale: Any, *rest: Any, cut: Cut, limit: float) -> None:
    """One visit: rows x [`SPREAD_ROWS`, D] and their weights [.., 1] to `out`."""
    sources = rest[: len(cut.dtypes)]
    out, *scratch = rest[len(cut.dtypes) :]
    number = pl.program_id(0)
    visits = Visits(cut, sources, scratch, layer[0], lambda number: expert[number], pl.num_programs(0))
    pl.when(number == 0)(visits.begin)
    spread(x, visits.wide)

    def store(here: Any, products: Array) -> None:
        out[:, here] = products.astype(out.dtype)

    visits.visit(number, x, lambda active: active * scale[...], limit, store)
