"""Rows to the devices that own what they need, sorted by it, and sums back: the exchange behind expert parallelism.

Every device owns some groups, such as experts. A device sorts its choices by group and sends each device its stretch of
every group that it owns; they land there sorted by group, those of one group by the device that they come from. What
the groups make of them goes back to where it came from.

Dropless with bounded memory: a device has room for half as many rows again as come to it on the mean, and as many
rounds follow as the fullest needs. One round is the rule; crowded groups cost another.

On TPUs many rows go in two waves, one half of a device's tokens after the other: while the groups work on one the other
travels. Over a torus of 128 chips an exchange takes about as long as what experts do with its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.sharding.collectives import Axes, all_to_all, pmax, size
from v4_jax.sharding.exchange import LANES, Segments, after, back, exchange, in_tiles, leave
from v4_jax.sharding.platform import platform_of_mesh

MANY = 2048  # rows of a group: beside what is done to so many, reading its weights takes no time

# Rows as they travel, sorted by group, what belongs to each row, rows of each group [G], weights, and fixed ones ->
# [R, width] as it travels. What lies beyond the groups' rows is undefined, and so may be what comes of it.
Work = Callable[[Array, Any, Array, Any, Any], Array]


class Choices(NamedTuple):
    """Which of a device's rows go where.

    Attributes:
      group: [T, K] int32 group that each choice of each row goes to, counted over all devices in their order; their
        count for none.
      extra: pytree of [T, K] arrays that travel along.
    """

    group: Array
    extra: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def visit(
    function: Work,
    width: int,
    groups: int,
    axes: Axes,
    everywhere: Axes,
    x: Array,
    choices: Choices,
    weights: Any,
    fixed: Any,
) -> Array:
    """Runs every choice of every row on the device that owns its group, and adds the results of a row up.

    Args:
      function: `function(rows, extra, sizes, weights, fixed)`, run on the owner with the rows that reached it. These
        are [R, D / 128, 128] where that many channels fit, and so may the result be.
      width: size of the last axis of its output.
      groups: of each device.
      axes: mesh axes to exchange over.
      everywhere: mesh axes whose devices must agree on the number of rounds: all that run this program together.
      x: [T, D] this device's rows.
      choices: where they go.
      weights: this device's own weights, as `function` takes them.
      fixed: more of them, which have no gradients.

    Returns:
      [T, width] float32. Differentiable in `x`, float `extra` and float `weights`.
    """
    waves = _waves(choices.group, groups, axes, everywhere)

    def of_round(number: Array) -> Array:
        return _round(function, _Wave.all_in(number, waves, x, choices.extra, axes), (weights, fixed))

    return _sum_of_rounds(of_round, _rounds(waves), jax.ShapeDtypeStruct((x.shape[0], width), jnp.float32))


def capacity(rows: int, devices: int) -> int:
    """Rows that a device has room for when each of so many sends as many: half more, in multiples of 8 or of lanes."""
    multiple = LANES if rows >= LANES else 8
    return min(rows * devices, -(-3 * rows // (2 * multiple)) * multiple)


class _Routes(NamedTuple):
    """How a device's choices travel."""

    order: Array  # [T * K] choices by group
    group: Array  # [T, K] of each choice, or their count for none
    places: Array  # [T, K] where each stands in that order
    leaving: Segments  # by destination; there: among all the rows that reach it, whatever it has room for
    arriving: Segments  # by origin; here: likewise
    rounds: Array


def _waves(group: Array, groups: int, axes: Axes, everywhere: Axes) -> list[_Routes]:
    """How the choices of each part of a device's rows travel: one part, or two that go one after another."""
    rows, top = group.shape
    count = 2 if platform_of_mesh() == "tpu" and rows % 2 == 0 and rows * top >= 2 * MANY * groups else 1
    return [_routes(part, groups, axes, everywhere) for part in jnp.split(group, count)]


def _rounds(waves: Sequence[_Routes]) -> Array:
    """Rounds that the fullest device of any wave needs."""
    return functools.reduce(jnp.maximum, (routes.rounds for routes in waves))


def _routes(group: Array, groups: int, axes: Axes, everywhere: Axes) -> _Routes:
    devices, flat = size(axes), group.reshape(-1)
    count = count_each(flat, devices * groups)
    first = jnp.cumsum(count) - count
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    places = jnp.argsort(order).astype(jnp.int32).reshape(group.shape)

    told = all_to_all(jnp.stack([count, first]).reshape(2, devices, groups), axes, 1)
    got, origin = told[:, 0], told[:, 1]
    by_group = got.T.reshape(-1)
    position = (jnp.cumsum(by_group) - by_group).reshape(groups, devices).T
    landing = all_to_all(position, axes, 0)

    leaving = Segments(first, landing.reshape(-1), count)
    arriving = Segments(position.reshape(-1), origin.reshape(-1), got.reshape(-1))
    rounds = -(-jnp.sum(got) // capacity(flat.shape[0], devices))
    return _Routes(order, group, places, leaving, arriving, pmax(rounds, everywhere))


def count_each(numbers: Array, length: int) -> Array:
    """[length] int32 how often each of 0 .. length - 1 occurs: a sum, where TPUs would scatter one by one."""
    return jnp.sum(numbers.reshape(-1) == jnp.arange(length, dtype=numbers.dtype)[:, None], axis=1, dtype=jnp.int32)


def _in_round(number: Array, room: int, routes: _Routes) -> tuple[Segments, Segments, Array]:
    """What of the segments, leaving and arriving, travels in a round, and of the places: -1 for the others."""
    begin = number * room

    def within(position: Array, rows: Array) -> tuple[Array, Array, Array]:
        """Rows of each segment before the round's, where its own land, and how many they are."""
        start, end = (jnp.clip(row, begin, begin + room) for row in (position, position + rows))
        return jnp.minimum(start - position, rows), start - begin, end - start

    skipped, landing, sent = within(routes.leaving.there, routes.leaving.size)
    leaving = Segments(routes.leaving.here + skipped, landing, sent)
    skipped, landing, got = within(routes.arriving.here, routes.arriving.size)
    arriving = Segments(landing, routes.arriving.there + skipped, got)

    count = routes.leaving.here.shape[0]
    segment = jnp.minimum(routes.group, count - 1)
    position = (routes.leaving.there - routes.leaving.here)[segment] + routes.places
    travels = (routes.group < count) & (begin <= position) & (position < begin + room)
    return leaving, arriving, jnp.where(travels, routes.places, -1)


def _sum_of_rounds(of_round: Callable[[Array], Any], rounds: Array, shapes: Any) -> Any:
    """What rounds come to, a tree of sums that have these shapes.

    On TPUs the first stands before the loop of the others: to write zeros and to add to them would take as long as all
    else that is done to the sums, and what stands outside of a loop can run beside an exchange. Other compilers take
    their time for code that is there twice.
    """
    begun = platform_of_mesh() == "tpu"
    first = of_round(jnp.int32(0)) if begun else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(
        int(begun), rounds, lambda number, total: jax.tree.map(jnp.add, total, of_round(number)), first
    )


class _Trip(NamedTuple):
    """How rows of a wave travel in a round: there, and what becomes of them back.

    Attributes:
      source: [T * K] int32 row of each place among those that leave.
      places: [T, K] int32 places of each row; -1 for choices that do not travel in this round.
      leaving: segments of the places.
      arriving: segments of the room for what comes.
      room: its length.
      axes: mesh axes to exchange over.
    """

    source: Array
    places: Array
    leaving: Segments
    arriving: Segments
    room: int
    axes: Axes

    def of_choices(self, order: Array) -> _Trip:
        """The same for what belongs to choices: each has a place of its own."""
        return self._replace(source=order, places=self.places.reshape(-1, 1))

    def send(self, rows: Array, done: Any = None) -> Array:
        """Rows [T, ...] to where they go, once others are done: [R, ...]. The transpose of `bring_back`."""
        lengths = self.source.shape[0], self.room
        rows = after(leave(rows, self.source, self.places), done)
        return exchange(rows, self.leaving, self.arriving, lengths, self.axes)

    def bring_back(self, rows: Array, meanwhile: Any = None) -> Array:
        """[T, ...] float32 sums of what has come of rows [R, ...], which travel while others are made."""
        lengths = self.room, self.source.shape[0]
        home = exchange(rows, self.arriving, self.leaving, lengths, self.axes)
        return back(after(home, meanwhile), self.source, self.places)


class _Wave(NamedTuple):
    """A part of a device's rows, in a round."""

    trip: _Trip
    of_choices: _Trip
    x: Array  # [T, D]
    extra: Any
    sizes: Array  # rows of each of this device's groups

    @classmethod
    def all_in(cls, number: Array, waves: Sequence[_Routes], x: Array, extra: Any, axes: Axes) -> list[_Wave]:
        """The waves of a round."""
        return [
            cls._of(number, routes, *part, axes)
            for routes, part in zip(waves, _cut((x, extra), len(waves)), strict=True)
        ]

    @classmethod
    def _of(cls, number: Array, routes: _Routes, x: Array, extra: Any, axes: Axes) -> _Wave:
        devices, (rows, top) = size(axes), routes.group.shape
        room = capacity(rows * top, devices)
        leaving, arriving, places = _in_round(number, room, routes)
        trip = _Trip(routes.order // top, places, leaving, arriving, room, axes)
        sizes = jnp.sum(arriving.size.reshape(devices, -1), axis=0)
        return cls(trip, trip.of_choices(routes.order), x, extra, sizes)

    def send(self) -> tuple[Array, Any]:
        """Its rows and what belongs to them, where they go."""
        found = jax.tree.map(lambda values: self.of_choices.send(values.reshape(-1)), self.extra)
        return self.trip.send(in_tiles(self.x)), found


def _cut(tree: Any, parts: int) -> list[Any]:
    """Equal parts of arrays, along their first axis."""
    leaves, structure = jax.tree.flatten(tree)
    return [
        jax.tree.unflatten(structure, part) for part in zip(*(jnp.split(leaf, parts) for leaf in leaves), strict=True)
    ]


def _round(function: Work, waves: Sequence[_Wave], weights: tuple[Any, Any]) -> Array:
    """There and back."""
    results = [wave.trip.bring_back(function(*wave.send(), wave.sizes, *weights)) for wave in waves]
    return jnp.concatenate([rows.reshape(len(rows), -1) for rows in results])


def _gradients(
    function: Work, waves: Sequence[_Wave], weights: tuple[Any, Any], gradient: Array
) -> tuple[Array, Any, Any]:
    """What comes of the gradient [T, width] of a round's result: those of x, of float extras and of float weights, in
    trees that have None for the others. Rows travel once more, and their gradients as they do."""
    trained, fixed = weights
    done: list[Any] = []
    for wave, part in zip(waves, _cut(gradient, len(waves)), strict=True):
        # Beside the gradients of the last wave's rows its own travel, and beside those of the weights its gradient.
        rows, *_, of_weights = done[-1] if done else (None, None)
        floats, restore = _floats((*after(wave.send(), rows), trained))

        def run(floats: list[Array], restore: Any = restore, wave: _Wave = wave) -> Array:
            found, extra, trained = restore(floats)
            return function(found, extra, wave.sizes, trained, fixed)

        out, pull = jax.vjp(run, floats)
        part = part.astype(out.dtype).reshape(len(part), *out.shape[1:])
        (parts,) = pull(after(wave.trip.send(part, rows), of_weights))
        done.append(restore(parts, absent=None))

    of_x, of_extra = [], []
    for wave, (found, extra, _), following in zip(waves, done, [*done[1:], None], strict=True):
        of_x.append(wave.trip.bring_back(found, following).reshape(wave.x.shape).astype(wave.x.dtype))

        def home(like: Array, found: Array | None, wave: _Wave = wave) -> Array | None:
            return None if found is None else wave.of_choices.bring_back(found).reshape(like.shape).astype(like.dtype)

        of_extra.append(jax.tree.map(home, wave.extra, extra, is_leaf=lambda x: x is None))
    of_weights = jax.tree.map(lambda *parts: functools.reduce(jnp.add, parts), *(weights for _, _, weights in done))
    return jnp.concatenate(of_x), jax.tree.map(lambda *parts: jnp.concatenate(parts), *of_extra), of_weights


def _visit_forward(*given: Any) -> tuple[Array, Any]:
    return visit(*given), given[5:]  # all but the static ones


def _visit_backward(
    function: Work, width: int, groups: int, axes: Axes, everywhere: Axes, residuals: Any, gradient: Array
) -> Any:
    """Repeats each round and pulls the gradient back through it."""
    x, choices, weights, fixed = residuals
    waves = _waves(choices.group, groups, axes, everywhere)
    floats, restore = _floats((x, choices.extra, weights))

    def of_round(number: Array) -> list[Array]:
        in_round = _Wave.all_in(number, waves, x, choices.extra, axes)
        return jax.tree.leaves(_gradients(function, in_round, (weights, fixed), gradient))

    of_x, of_extra, of_weights = restore(_sum_of_rounds(of_round, _rounds(waves), floats), absent=None)
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
