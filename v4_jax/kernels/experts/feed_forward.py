"""One expert's feed-forward inside TPU kernels, its weights brought from HBM tile by tile.

A visit to an expert takes the hidden activations in tiles of w1 and w3, and then the outputs in tiles of w2, each of as
many bytes; a tile spans all inputs, and travels while the two before are multiplied, across the border between two
visits too. The weights thus cross from HBM once a visit, as they are stored (`stored_weights.py`), out of the stack of
all layers.

Rounds where the layers do: gate and up to bfloat16, the hidden activation times the weight, each expert's output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.block_scales import LANES
from v4_jax.kernels.stored_weights import Form, Tile, in_memory, lines_shape, multiply, spread, spread_shape, tiles
from v4_jax.kernels.turns import about
from v4_jax.number_formats import BlockScaled, Weight, bytes_of

COLUMNS = 512  # hidden activations of a tile at most: 1 MiB of E2M1 codes at K = 4,096
TILE = 3 << 20  # bytes of a tile of w1 or w3 in VMEM at most: three of each, and as much of w2, are there at a time
AHEAD = 2  # steps that a tile starts on its way before it is used, at most: with one, steps wait for HBM's latency
VMEM_BYTES = 48 << 20  # of the 64 MiB or more that every generation from v5e on has

_STAGES = ((0, 1), (2,))  # which weights of w1, w3, w2 a visit takes for the hidden activations, and for the outputs


class Cut(NamedTuple):
    """How the weights w1, w3 and w2 of experts lie in memory, and come out of it.

    Attributes:
      forms: of each.
      tiles: of each one's arrays.
      dtypes: of these, all in order.
      depth: inputs.
      hidden: hidden activations.
      columns: hidden activations of a tile.
      per_expert: bytes.
    """

    forms: list[Form]
    tiles: list[list[Tile]]
    dtypes: list[Any]
    depth: int
    hidden: int
    columns: int
    per_expert: int

    @property
    def steps(self) -> tuple[int, int]:
        """Of a visit's two stages: tiles of hidden activations, and of outputs."""
        return self.hidden // self.columns, self.depth // self.tiles[2][0].shape[0]

    @property
    def ahead(self) -> int:
        """Steps that a tile is started before its use."""
        return min(AHEAD, *self.steps)

    def scratch(self, rows: int, dtype: Any) -> list[Any]:
        """Shapes of the room that visits of so many rows need; `Visits` takes it in this order."""
        return [
            pltpu.VMEM((rows, self.columns), dtype),
            pltpu.VMEM((rows, self.hidden), dtype),
            pltpu.SemaphoreType.DMA((len(_STAGES), self.ahead + 1)),
            *[pltpu.VMEM(shape, dtype) for shape in self.wide(rows) if shape],
            *[pltpu.VMEM(shape, jnp.float32) for shape in self.lines() if shape],
            *[
                pltpu.VMEM((self.ahead + 1, *tile.shape), dtype)
                for dtype, tile in zip(self.dtypes, itertools.chain(*self.tiles), strict=True)
            ],
        ]

    def wide(self, rows: int) -> list[tuple[int, int] | None]:
        """Shapes of spread inputs and hidden activations, for weights that they are spread for."""
        return [spread_shape(rows, self.depth, self.forms[0]), spread_shape(rows, self.hidden, self.forms[2])]

    def lines(self) -> list[tuple[int, int] | None]:
        """Shapes of the scales of a tile of w1 or w3, and of w2, for weights that `multiply` takes them of."""
        outputs = self.depth // self.steps[1]
        return [
            lines_shape(self.columns, self.depth, self.forms[0]),
            lines_shape(outputs, self.hidden, self.forms[2]),
        ]


def cut(depth: int, weights: Sequence[Weight]) -> tuple[list[Array], Cut]:
    """The arrays of stacked weights [L, E, ...], and how they are cut into tiles.

    Raises:
      ValueError: their shapes do not fit inputs of this depth, or one another.
    """
    layers, count, hidden, _ = weights[0].shape
    shapes = [(layers, count, hidden, depth)] * 2 + [(layers, count, depth, hidden)]
    if [weight.shape for weight in weights] != shapes:
        raise ValueError(f"x [T, {depth}] does not fit weights {[weight.shape for weight in weights]}")
    # An element of E2M1 takes a byte of VMEM, as its dtype says.
    width = depth * max((w.codes if isinstance(w, BlockScaled) else w).dtype.itemsize for w in weights[:2])
    columns = _divisor(hidden, min(COLUMNS, TILE // width))
    widths = (columns, columns, _divisor(depth, 2 * columns * depth // hidden))
    pairs = [in_memory(weight) for weight in weights]
    of_each = [tiles(*pair, width) for pair, width in zip(pairs, widths, strict=True)]
    per_expert = sum(w.nbytes if isinstance(w, BlockScaled) else bytes_of(w) for w in weights) // (layers * count)
    arrays, forms = [array for arrays, _ in pairs for array in arrays], [form for _, form in pairs]
    return arrays, Cut(forms, of_each, [array.dtype for array in arrays], depth, hidden, columns, per_expert)


def _divisor(width: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides a multiple of 128."""
    units = width // LANES
    return LANES * max(size for size in range(1, units + 1) if units % size == 0 and size <= max(1, most // LANES))


class Visits:
    """Visits to experts one after another, inside a kernel."""

    def __init__(
        self,
        cut: Cut,
        sources: Sequence[Any],
        scratch: Sequence[Any],
        layer: Any,
        expert: Callable[[Any], Any],
        found: Any,
    ) -> None:
        """Of a kernel's references.

        Args:
          cut: how the weights are cut.
          sources: references of the weights' arrays.
          scratch: references of the room for them, see `Cut.scratch`.
          layer: number of the layer.
          expert: of each visit.
          found: how many visits there are.
        """
        self.gate, self.hidden, self._arrived, *rest = scratch
        self.wide, self.wide_hidden = (rest.pop(0) if shape else None for shape in cut.wide(self.hidden.shape[0]))
        self._lines = [rest.pop(0) if shape else None for shape in cut.lines()]
        self._sources, self._places = (_by_weight(refs, cut.tiles) for refs in (sources, rest))
        self._cut, self._layer, self._expert, self._found = cut, layer, expert, found

    def begin(self) -> None:
        """Starts to bring the first tiles; before the first visit."""

        @pl.when(self._found > 0)
        def _() -> None:
            for step in range(self._cut.ahead):
                self._start(0, 0, step)

    def visit(self, number: Any, x: Any, weigh: Callable[[Array], Array], limit: float, store: Any) -> None:
        """One visit.

        Args:
          number: of the visit. They are made in order.
          x: reference of rows [T, D]; also in `wide`, where that is not None.
          weigh: takes hidden activations [T, n] float32 and weighs them.
          limit: bound of the activations.
          store: takes a place (`pl.ds`) among the outputs, and these: [T, n] float32.
        """
        cut, steps = self._cut, self._cut.steps

        def take_hidden(step: Any, carry: None) -> None:
            later = step + cut.ahead
            pl.when(later < steps[0])(lambda: self._start(number, 0, later))
            pl.when(later >= steps[0])(lambda: self._start(number, 1, later - steps[0]))
            w1, w3 = self._receive(number, 0, step)
            first = step * cut.columns

            def store_gate(here: Any, products: Array) -> None:
                self.gate[:, here] = products.astype(self.gate.dtype)

            def store_hidden(here: Any, products: Array) -> None:
                up = products.astype(self.gate.dtype).astype(jnp.float32)
                low = jnp.minimum(self.gate[:, here].astype(jnp.float32), limit)
                active = weigh(low * jax.nn.sigmoid(low) * jnp.clip(up, -limit, limit))
                self.hidden[:, _shifted(here, first)] = active.astype(self.hidden.dtype)

            multiply(x, w1, cut.forms[0], first, store_gate, self.wide, lines=self._lines[0])
            multiply(x, w3, cut.forms[1], first, store_hidden, self.wide, lines=self._lines[0])
            return carry

        def take_outputs(step: Any, carry: None) -> None:
            later = step + cut.ahead
            pl.when(later < steps[1])(lambda: self._start(number, 1, later))
            more = number + 1 < self._found
            pl.when((later >= steps[1]) & more)(lambda: self._start(number + 1, 0, later - steps[1]))
            (w2,) = self._receive(number, 1, step)
            first = step * cut.tiles[2][0].shape[0]

            def place(here: Any, products: Array) -> None:
                store(_shifted(here, first), products)

            multiply(self.hidden, w2, cut.forms[2], first, place, self.wide_hidden, lines=self._lines[1])
            return carry

        jax.lax.fori_loop(0, steps[0], take_hidden, None)
        if self.wide_hidden is not None:
            spread(self.hidden, self.wide_hidden)
        jax.lax.fori_loop(0, steps[1], take_outputs, None)

    def _copies(self, number: Any, stage: int, step: Any) -> list[Any]:
        """Of the weights' tiles that a step of the first or second stage of a visit takes."""
        slot = self._slot(number, stage, step)
        return [
            pltpu.make_async_copy(
                source.at[self._layer, self._expert(number), *tile.slices(step)],
                place.at[slot],
                self._arrived.at[stage, slot],
            )
            for i in _STAGES[stage]
            for source, place, tile in zip(self._sources[i], self._places[i], self._cut.tiles[i], strict=True)
        ]

    def _slot(self, number: Any, stage: int, step: Any) -> Any:
        return jax.lax.rem(jnp.int32(number * self._cut.steps[stage] + step), jnp.int32(self._cut.ahead + 1))

    def _start(self, number: Any, stage: int, step: Any) -> None:
        with about(0):  # the compiler's estimate takes each wait to be for the transfer that was started last
            for copy in self._copies(number, stage, step):
                copy.start()

    def _receive(self, number: Any, stage: int, step: Any) -> list[list[Any]]:
        with about(0):
            for copy in self._copies(number, stage, step):
                copy.wait()
        slot = self._slot(number, stage, step)
        return [[place.at[slot] for place in self._places[i]] for i in _STAGES[stage]]


def _by_weight(refs: Sequence[Any], tiles: list[list[Tile]]) -> list[list[Any]]:
    """References to arrays, by the weight that they are of."""
    left = iter(refs)
    return [[next(left) for _ in of_one] for of_one in tiles]


def _shifted(here: Any, first: Any) -> Any:
    return pl.ds(pl.multiple_of(first + here.start, LANES), here.size)
