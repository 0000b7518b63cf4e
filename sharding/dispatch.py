"""Rows to the devices that own what they need, and sums back: the exchange behind expert parallelism.

Dropless with bounded memory: a pair of devices exchanges at most a fixed number of rows at a time, twice the mean, and
as many rounds follow as the fullest pair needs. One round is the rule; a crowded expert costs another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.sharding.collectives import Axes, index, pmax, size
from v4_jax.sharding.platform import by_platform

LANES = 128  # of a TPU's registers

# Rows [R, D], what belongs to each row, weights, and fixed ones -> [R, width]; rows without a valid choice are ignored.
Work = Callable[[Array, Any, Any, Any], Array]


class Choices(NamedTuple):
    """Which of a device's rows go where.

    Attributes:
      owner: [T, K] int32 device along the axes that each choice of each row goes to; its count for nowhere.
      extra: pytree of [T, K] arrays that travel along.
    """

    owner: Array
    extra: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def visit(
    function: Work, width: int, axes: Axes, everywhere: Axes, x: Array, choices: Choices, weights: Any, fixed: Any
) -> Array:
    """Runs every choice of every row on the device that owns it, and adds the results of a row up.

    Args:
      function: `function(rows, extra, weights, fixed)`, run on the owner with the rows that reached it. Places without
        a row repeat any, come with every `extra` zero, and what they yield is not used.
      width: size of the last axis of its output.
      axes: mesh axes to exchange over.
      everywhere: mesh axes whose devices must agree on the number of rounds: all that run this program together.
      x: [T, D] this device's rows.
      choices: where they go.
      weights: this device's own weights, as `function` takes them.
      fixed: more of them, which have no gradients.

    Returns:
      [T, width] float32. Differentiable in `x`, float `extra` and float `weights`.
    """
    departures = _departures(choices.owner, axes, everywhere)

    def step(number: Array, total: Array) -> Array:
        return total + _round(function, axes, number, departures, x, choices.extra, (weights, fixed))

    return jax.lax.fori_loop(0, departures.rounds, step, jnp.zeros((x.shape[0], width), jnp.float32))


def capacity(rows: int, devices: int) -> int:
    """Rows that a pair of devices exchanges at once: twice the mean, in multiples of 8."""
    return min(rows, max(8, -(-2 * rows // devices // 8) * 8))


class _Departures(NamedTuple):
    """The order in which a device's choices leave it."""

    order: Array  # [T * K] choices by owner
    owner: Array  # [T, K] of each choice, or its count for nowhere
    rank: Array  # [T, K] how many of its owner's choices are before each
    first: Array  # [devices] where each owner's begin
    counts: Array  # [devices] how many each owner gets
    rounds: Array


def _departures(owner: Array, axes: Axes, everywhere: Axes) -> _Departures:
    devices, flat = size(axes), owner.reshape(-1)
    count = count_each(flat, devices)
    rounds = -(-jnp.max(count) // capacity(flat.shape[0], devices))
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    first = jnp.cumsum(count) - count
    rank = jnp.argsort(order).astype(jnp.int32).reshape(owner.shape) - first[jnp.minimum(owner, devices - 1)]
    return _Departures(order, owner, rank, first, count, pmax(rounds, everywhere))


def count_each(numbers: Array, length: int) -> Array:
    """[length] int32 how often each of 0 .. length - 1 occurs: a sum, where TPUs would scatter one by one."""
    return jnp.sum(numbers.reshape(-1) == jnp.arange(length, dtype=numbers.dtype)[:, None], axis=1, dtype=jnp.int32)


def _round(
    function: Work, axes: Axes, number: Array, departures: _Departures, x: Array, extra: Any, weights: tuple[Any, Any]
) -> Array:
    """One exchange there and back."""
    devices, (rows, top) = size(axes), departures.owner.shape
    room = capacity(rows * top, devices)
    place = number * room + jnp.arange(room, dtype=jnp.int32)
    used = place < departures.counts[:, None]
    choice = departures.order[jnp.clip(departures.first[:, None] + place, 0, rows * top - 1)].reshape(-1)
    sent = jnp.sum(used, axis=1, dtype=jnp.int32)
    got = jax.lax.all_to_all(sent, axes, 0, 0, tiled=True)

    within = departures.rank - number * room
    inside = (departures.owner < devices) & (within >= 0) & (within < room)
    places = jnp.where(inside, departures.owner * room + within, -1)

    def by_choice(values: Array) -> Array:
        chosen = leave(values.reshape(-1), choice, places.reshape(-1, 1))
        return exchange(jnp.where(used.reshape(-1), chosen, 0), None, sent, got, axes)

    def in_tiles(rows: Array) -> Array:
        """Rows as whole tiles of a TPU's memory. Else its compiler cuts them for the exchange in a way of its own, in
        which all that is done to them before and after takes ten times as long."""
        return rows.reshape(rows.shape[0], -1, LANES) if rows.shape[1] % LANES == 0 else rows

    leaving = leave(in_tiles(x), choice // top, places)
    there = exchange(leaving, None, sent, got, axes)
    out = function(there.reshape(-1, x.shape[1]), jax.tree.map(by_choice, extra), *weights)
    out = in_tiles(out)
    alike = (leaving.shape, leaving.dtype) == (out.shape, out.dtype)
    total = back(exchange(out, leaving if alike else None, got, sent, axes), choice // top, places)
    return total.reshape(rows, -1)


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

    def one(k: int) -> Array:
        return jnp.where(held[:, k], rows[jnp.maximum(places[:, k], 0)].astype(jnp.float32), 0)

    return functools.reduce(jnp.add, map(one, range(places.shape[1])))


def _leave_backward(residuals: Any, gradient: Array) -> tuple[Array, None, None]:
    return back(gradient, *residuals).astype(gradient.dtype), None, None


def _back_backward(residuals: Any, gradient: Array) -> tuple[Array, None, None]:
    like, *where = residuals
    return leave(gradient.astype(like.dtype), *where), None, None


leave.defvjp(lambda x, *where: (leave(x, *where), where), _leave_backward)
back.defvjp(lambda rows, *where: (back(rows, *where), (rows[:0], *where)), _back_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def exchange(x: Array, onto: Array | None, sent: Array, got: Array, axes: Axes) -> Array:
    """Swaps blocks of rows between all pairs of devices.

    Args:
      x: [devices * room, ...] rows for each device; only the first `sent` of each device's block count.
      onto: an array like it that nobody needs any more, in whose place rows may come on TPUs, and their gradients too.
        None: there is none, and they come onto a copy of x.
      sent: [devices] int32 rows for each device.
      got: [devices] int32 rows from each device.
      axes: mesh axes to exchange over.

    Returns:
      [devices * room, ...] rows from each device. Beyond `got` they are any rows of a device's x, or of `onto`.
    """

    def dense(x: Array, onto: Array | None, sent: Array, got: Array) -> Array:
        del onto, sent, got
        return jax.lax.all_to_all(x, axes, 0, 0, tiled=True)

    def ragged(x: Array, onto: Array | None, sent: Array, got: Array) -> Array:
        room = x.shape[0] // size(axes)
        start = jnp.arange(size(axes), dtype=jnp.int32) * room
        mine = jnp.full_like(start, index(axes) * room)
        # What is not received stays as it was, which costs less than to clear it.
        return jax.lax.ragged_all_to_all(x, x if onto is None else onto, start, sent, mine, got, axis_name=axes)

    if x.ndim == 1:  # a handful of bytes
        return dense(x, onto, sent, got)
    # XLA:CPU has no ragged exchange; there the unused places travel too.
    return by_platform(x, onto, sent, got, tpu=ragged, default=dense)


def _exchange_forward(x: Array, onto: Array | None, sent: Array, got: Array, axes: Axes) -> tuple[Array, Any]:
    return exchange(x, onto, sent, got, axes), (onto, sent, got)


def _exchange_backward(axes: Axes, residuals: Any, gradient: Array) -> tuple[Array, None, None, None]:
    onto, sent, got = residuals
    return exchange(gradient, onto, got, sent, axes), None, None, None


exchange.defvjp(_exchange_forward, _exchange_backward)


def _visit_forward(
    function: Work, width: int, axes: Axes, everywhere: Axes, x: Array, choices: Choices, weights: Any, fixed: Any
) -> tuple[Array, Any]:
    return visit(function, width, axes, everywhere, x, choices, weights, fixed), (x, choices, weights, fixed)


def _visit_backward(function: Work, width: int, axes: Axes, everywhere: Axes, residuals: Any, gradient: Array) -> Any:
    """Repeats each round and pulls the gradient back through it."""
    x, choices, weights, fixed = residuals
    departures = _departures(choices.owner, axes, everywhere)
    floats, restore = _floats((x, choices.extra, weights))

    def step(number: Array, total: list[Array]) -> list[Array]:
        def run(floats: list[Array]) -> Array:
            x, extra, weights = restore(floats)
            return _round(function, axes, number, departures, x, extra, (weights, fixed))

        (part,) = jax.vjp(run, floats)[1](gradient)
        return jax.tree.map(lambda a, b: a + b, total, part)

    total = jax.lax.fori_loop(0, departures.rounds, step, [jnp.zeros_like(x) for x in floats])
    of_x, of_extra, of_weights = restore(total, absent=None)
    return of_x, Choices(cast(Any, None), of_extra), of_weights, None


visit.defvjp(_visit_forward, _visit_backward)


def _floats(tree: Any) -> tuple[list[Array], Callable[..., Any]]:
    """The leaves that have gradients, and a function that puts such leaves back among the others."""
    leaves, structure = jax.tree.flatten(tree)
    chosen = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def restore(floats: list[Array], **others: Any) -> Any:
        replaced = iter(floats)
        filled = [
            next(replaced) if yes else others.get("absent", leaf) for leaf, yes in zip(leaves, chosen, strict=True)
        ]
        return jax.tree.unflatten(structure, filled)

    return [leaf for leaf, yes in zip(leaves, chosen, strict=True) if yes], restore
