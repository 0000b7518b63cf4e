"""Segments of rows to other devices, and what stands before and after them: rows put in their places, and added up.

On TPUs rows travel by a ragged exchange, as whole tiles of memory; what need not wait for them is computed meanwhile.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from v4_jax.sharding.collectives import Axes, all_gather, size
from v4_jax.sharding.platform import by_platform, interpreting, platform_of_mesh

LANES = 128  # of a TPU's registers


class Segments(NamedTuple):
    """Stretches of rows that travel between this device and others: one for each device and group, in that order.

    Attributes:
      here: [devices * groups] int32 where each begins in this device's array.
      there: likewise in the other's.
      size: its rows.
    """

    here: Array
    there: Array
    size: Array


@jax.custom_vjp
def leave(x: Array, source: Array, places: Array) -> Array:
    """What stands in each place: rows [P, ...] of x [T, ...], the transpose of `back`.

    Either is its other's gradient, so that rows are gathered in both directions: on TPUs a scatter goes row by row.

    Args:
      x: [T, ...].
      source: [P] int32 row of each place. Places that hold none repeat any.
      places: [T, K] int32 places that hold a row; -1 for none.
    """
    del places
    return x[source]


@jax.custom_vjp
def back(rows: Array, source: Array, places: Array) -> Array:
    """[T, ...] float32 sum over the places that hold each row; see `leave`."""
    del source
    held = places.reshape(*places.shape, *(1,) * (rows.ndim - 1)) >= 0

    # Behind the barrier the TPU compiler widens rows where it adds them, and not each gather by itself.
    gathered = jax.lax.optimization_barrier([rows[jnp.maximum(place, 0)] for place in places.T])
    terms = (jnp.where(held[:, k], x.astype(jnp.float32), 0) for k, x in enumerate(gathered))
    return functools.reduce(jnp.add, terms)


def _leave_backward(residuals: Any, gradient: Array) -> tuple[Array, None, None]:
    return back(gradient, *residuals).astype(gradient.dtype), None, None


def _back_backward(residuals: Any, gradient: Array) -> tuple[Array, None, None]:
    like, *where = residuals
    return leave(gradient.astype(like.dtype), *where), None, None


leave.defvjp(lambda x, *where: (leave(x, *where), where), _leave_backward)
back.defvjp(lambda rows, *where: (back(rows, *where), (rows[:0], *where)), _back_backward)


def in_tiles(rows: Array) -> Array:
    """Rows as whole tiles of a TPU's memory. Else its compiler cuts them for the exchange in a way of its own, in which
    all that is done to them before and after takes ten times as long."""
    return rows.reshape(rows.shape[0], -1, LANES) if rows.shape[1] % LANES == 0 else rows


def exchange(x: Array, leaving: Segments, arriving: Segments, lengths: tuple[int, int], axes: Axes) -> Array:
    """Sends segments of rows to other devices.

    Args:
      x: [lengths[0], ...] rows, or numbers.
      leaving: segments of x, by the device that they go to.
      arriving: segments of the result, by the device that they come from.
      lengths: rows of x and of the result.
      axes: mesh axes to exchange over.

    Returns:
      [lengths[1], ...]. What lies in no segment is undefined, on TPUs memory as it was found.
    """

    def ragged(x: Array, leaving: Segments, arriving: Segments) -> Array:
        rows = x if x.ndim > 1 else _in_lanes(x)
        out = _room_beside(rows, lengths[1])
        where = (leaving.here, leaving.size, leaving.there, arriving.size)
        found = jax.lax.ragged_all_to_all(rows, out, *where, axis_name=axes)
        return found if x.ndim > 1 else _first_lane(found)

    def gathered(x: Array, leaving: Segments, arriving: Segments) -> Array:
        del leaving
        row = jnp.arange(lengths[1], dtype=jnp.int32)
        inside = (arriving.here <= row[:, None]) & (row[:, None] < arriving.here + arriving.size)
        segment = jnp.argmax(inside, axis=1)
        origin = segment // (arriving.here.shape[0] // size(axes)) * lengths[0]
        source = origin + (arriving.there - arriving.here)[segment] + row
        return all_gather(x, axes, 0)[jnp.where(jnp.any(inside, axis=1), source, 0)]

    if interpreting():
        return gathered(x, leaving, arriving)
    if platform_of_mesh() == "tpu":  # beside an exchange in a choice that the compiler is left with, nothing runs
        return ragged(x, leaving, arriving)
    # XLA:CPU has no ragged exchange; there every device sees all rows.
    return by_platform(x, leaving, arriving, tpu=ragged, default=gathered)


def _room_beside(x: Array, length: int) -> Array:
    """[length, ...] memory as it was found, of the dtype of x [R, ...], for an exchange on a TPU to fill.

    `jax.lax.empty` depends on nothing: the compiler moves it out of a loop over layers, and copies it in each of them.
    """
    return _nothing("room", (length, *x.shape[1:]), x)


def _in_lanes(x: Array) -> Array:
    """[P] numbers as [P, 1, 128]. Without the barrier TPUs fill the lanes of one row after another."""
    return jax.lax.optimization_barrier(jnp.broadcast_to(x[:, None], (x.shape[0], LANES)))[:, None]


def _first_lane(x: Array) -> Array:
    """[R] numbers of [R, 1, 128] that have the same in all lanes: one lane of each row, as TPUs are quick to take."""
    if x.shape[0] % LANES:
        return x[:, 0, 0]
    return jnp.sum(jnp.where(jnp.eye(LANES, dtype=bool), x.reshape(-1, LANES, LANES), 0), axis=1).reshape(-1)


def after(values: Any, done: Any) -> Any:
    """Arrays that on TPUs are not there before others are `done`: what comes of them waits for those.

    Where it may choose, its compiler does all work before a trip or behind it, and has nothing to do meanwhile.
    """
    others = jax.tree.leaves(done)
    if not others or platform_of_mesh() != "tpu" or interpreting():
        return values
    return jax.tree.map(lambda x: _nothing("after", x.shape, x, *others, input_output_aliases={0: 0}), values)


def _nothing(name: str, shape: tuple[int, ...], x: Array, *others: Array, **options: Any) -> Array:
    """An array of the dtype of x from a TPU's kernel that does nothing but depend on its operands."""
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        lambda *refs: None,
        in_specs=[anywhere] * (1 + len(others)),
        out_specs=anywhere,
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=0, transcendentals=0),
        name=name,
        **options,
    )(x, *others)
