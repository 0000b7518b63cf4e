"""Whole experts on few rows, for TPUs: routing, feed-forward and the sum over each row's experts in one operation.

    out[t] = sum over the choices (e, w) of row t of  w2[e] . (w * swiglu(w1[e] . x[t], w3[e] . x[t]))

A step with few rows is bound by how many operations it has, and by the bytes of the experts that it visits. So rows are
not sorted: an expert that any row chose is applied to all of them, which costs the matrix unit no more than the tile of
rows that each expert would take anyway, and rows that did not choose it weigh nothing. The list of visits is made by
the scalar unit from the ids; experts that nobody chose are not read.

A visit takes the hidden activations in tiles of w1 and w3, and then the outputs in tiles of w2, each of as many bytes;
a tile spans all inputs, and travels while the one before is multiplied, across the border between two experts too. The
weights thus cross from HBM once, as they are stored (`stored_weights.py`), out of the stack of all layers.

Rounds where the layers do: gate and up to bfloat16, the hidden activation times the weight, each expert's output; these
are summed in float32 in the order in which the experts first occur among the choices, which is that of a row's choices
for a single row.
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

from v4_jax.kernels import stored_weights
from v4_jax.kernels.block_scales import LANES
from v4_jax.kernels.memory import kept_in_hbm
from v4_jax.kernels.stored_weights import Form, Tile, in_memory, multiply, spread, spread_shape, tiles
from v4_jax.number_formats import BlockScaled, Weight, bytes_of

ROWS = 128  # at most: the tile of rows of the grouped product
COLUMNS = 512  # hidden activations of a tile at most: 1 MiB of E2M1 codes at K = 4,096
TILE = 4 << 20  # bytes of a tile of w1 or w3 at most: two of each, and as much of w2, are in VMEM at a time
VMEM_BYTES = 48 << 20  # of the 64 MiB or more that every generation from v5e on has

_STAGES = ((0, 1), (2,))  # which weights of w1, w3, w2 a visit takes for the hidden activations, and for the outputs


def supports(x: Array, weights: Sequence[Weight]) -> bool:
    """Whether `experts` takes rows [T, D] and weights w1, w3, w2."""
    return x.shape[0] <= ROWS and all(stored_weights.supports(weight, x.dtype) for weight in weights)


def experts(
    x: Array,
    assigned: Array,
    scale: Array,
    weights: Sequence[Weight],
    *,
    layer: Any = None,
    limit: float,
    interpret: bool = False,
) -> Array:
    """Applies each row's experts, and sums them.

    Args:
      x: [T, D] bfloat16, at most `ROWS` rows.
      assigned: [T, K] int32 experts of each row; numbers that there is no expert of, for none. Those of a row differ.
      scale: [T, K] float32 what each is weighted by, before the hidden activation is rounded.
      weights: w1 and w3 [E, H, D], and w2 [E, D, H], or [L, E, ...] when `layer` is given: bfloat16, or block-scaled
        E2M1 or E4M3. D and H are multiples of 128.
      layer: int32 scalar, which layer of stacked weights to read; the others are not touched.
      limit: bound of the activations.
      interpret: run in interpret mode, on any platform.

    Returns:
      [T, D] float32. Not differentiable.

    Raises:
      NotImplementedError: `supports` says no.
      ValueError: shapes disagree.
    """
    if not supports(x, weights):
        raise NotImplementedError(
            f"x {x.dtype}{list(x.shape)}, weights {jax.tree.map(jnp.shape, weights)}: expected at most {ROWS} rows, "
            f"bfloat16, weights in bfloat16 or the released blocks, and their axes multiples of {LANES}"
        )
    if layer is None:
        weights, layer = jax.tree.map(lambda w: w[None], list(weights)), 0
    (rows, depth), (layers, count, hidden, _) = x.shape, weights[0].shape
    if [weight.shape for weight in weights] != [(layers, count, *two) for two in _shapes(depth, hidden)]:
        raise ValueError(f"x {x.shape} does not fit weights {[weight.shape for weight in weights]}")
    if not assigned.shape == scale.shape == (rows, assigned.shape[-1]):
        raise ValueError(f"x {x.shape} does not fit choices {assigned.shape} weighted by {scale.shape}")

    width = max(bytes_of(w.codes if isinstance(w, BlockScaled) else w) // math.prod(w.shape[:-1]) for w in weights[:2])
    columns = _divisor(hidden, min(COLUMNS, TILE // width))
    widths = (columns, columns, _divisor(depth, 2 * columns * depth // hidden))
    pairs = [in_memory(weight) for weight in weights]
    forms, arrays = [form for _, form in pairs], [array for arrays, _ in pairs for array in arrays]
    x, arrays = kept_in_hbm(x, arrays, interpret=interpret)
    cut = [tiles(*pair, width) for pair, width in zip(pairs, widths, strict=True)]
    wide = spread_shape(rows, depth, forms[0]), spread_shape(rows, hidden, forms[2])
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    per_expert = sum(w.nbytes if isinstance(w, BlockScaled) else bytes_of(w) for w in weights) // (layers * count)
    return pl.pallas_call(
        functools.partial(_kernel, forms=forms, cut=cut, limit=limit, wide=wide),
        in_specs=[
            *[pl.BlockSpec(memory_space=pltpu.SMEM)] * 2,
            *[whole] * 3,
            *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(arrays),
        ],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct((rows, depth), jnp.float32),
        scratch_shapes=[
            pltpu.SMEM((count,), jnp.int32),
            pltpu.SMEM((count,), jnp.int32),
            pltpu.VMEM((rows, columns), x.dtype),
            pltpu.VMEM((rows, hidden), x.dtype),
            pltpu.SemaphoreType.DMA((2, 2)),
            *[pltpu.VMEM(shape, x.dtype) for shape in wide if shape],
            *[pltpu.VMEM((2, *tile.shape), a.dtype) for a, tile in zip(arrays, itertools.chain(*cut), strict=True)],
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=6 * assigned.size * depth * hidden,
            bytes_accessed=min(count, assigned.size) * per_expert + 6 * rows * depth,
            transcendentals=assigned.size * hidden,
        ),
        interpret=interpret,
        name="experts",
    )(jnp.asarray(layer, jnp.int32).reshape(1), assigned, x, assigned, scale, *arrays)


def _shapes(depth: int, hidden: int) -> list[tuple[int, int]]:
    return [(hidden, depth), (hidden, depth), (depth, hidden)]


def _divisor(width: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides a multiple of 128."""
    units = width // LANES
    return LANES * max(size for size in range(1, units + 1) if units % size == 0 and size <= max(1, most // LANES))


def _kernel(
    layer: Any,
    ids: Any,
    x: Any,
    assigned: Any,
    scale: Any,
    *rest: Any,
    forms: list[Form],
    cut: list[list[Tile]],
    limit: float,
    wide: Sequence[Any],
) -> None:
    """All visits: `ids` [T, K] are those of `assigned`, for the scalar unit; x and the hidden activations are spread to
    references of the shapes `wide`, where these are not None."""
    sources, others = _apart(rest, cut)
    out, visits, seen, gate, hidden, arrived, *buffers = others
    wide_x, wide_hidden = (buffers.pop(0) if shape else None for shape in wide)
    places, _ = _apart(buffers, cut)
    if wide_x is not None:
        spread(x, wide_x)
    found = _list_visits(ids, visits, seen)
    out[...] = jnp.zeros_like(out)
    (of_hidden, of_outputs) = (tile[0].shape[0] for tile in cut[1:])
    steps = hidden.shape[1] // of_hidden, out.shape[1] // of_outputs

    def copies(visit: Any, stage: int, step: Any) -> list[Any]:
        """Of the weights' tiles that a step of the first or second stage of a visit takes."""
        slot = (visit * steps[stage] + step) & 1
        return [
            pltpu.make_async_copy(
                source.at[layer[0], visits[visit], *tile.slices(step)], place.at[slot], arrived.at[stage, slot]
            )
            for i in _STAGES[stage]
            for source, place, tile in zip(sources[i], places[i], cut[i], strict=True)
        ]

    def start(visit: Any, stage: int, step: Any) -> None:
        for copy in copies(visit, stage, step):
            copy.start()

    def receive(visit: Any, stage: int, step: Any) -> list[list[Any]]:
        for copy in copies(visit, stage, step):
            copy.wait()
        slot = (visit * steps[stage] + step) & 1
        return [[place.at[slot] for place in places[i]] for i in _STAGES[stage]]

    def visit_expert(visit: Any, carry: None) -> None:
        mine = assigned[...] == visits[visit]
        weight = jnp.sum(jnp.where(mine, scale[...], 0.0), axis=1, keepdims=True)
        chosen = jnp.sum(mine.astype(jnp.float32), axis=1, keepdims=True) > 0

        def take_hidden(step: Any, carry: None) -> None:
            pl.when(step + 1 < steps[0])(lambda: start(visit, 0, step + 1))
            pl.when(step + 1 == steps[0])(lambda: start(visit, 1, 0))
            w1, w3 = receive(visit, 0, step)
            first = step * of_hidden

            def store_gate(here: Any, products: Array) -> None:
                gate[:, here] = products.astype(gate.dtype)

            def store_hidden(here: Any, products: Array) -> None:
                up = products.astype(gate.dtype).astype(jnp.float32)
                low = jnp.minimum(gate[:, here].astype(jnp.float32), limit)
                active = low * jax.nn.sigmoid(low) * jnp.clip(up, -limit, limit)
                # What overflows in one row is nothing to the experts of others.
                active = jnp.where(chosen, active * weight, 0.0)
                hidden[:, _shifted(here, first)] = active.astype(hidden.dtype)

            multiply(x, w1, forms[0], first, store_gate, wide_x)
            multiply(x, w3, forms[1], first, store_hidden, wide_x)
            return carry

        def take_outputs(step: Any, carry: None) -> None:
            pl.when(step + 1 < steps[1])(lambda: start(visit, 1, step + 1))
            pl.when((step + 1 == steps[1]) & (visit + 1 < found))(lambda: start(visit + 1, 0, 0))
            (w2,) = receive(visit, 1, step)
            first = step * of_outputs

            def add(here: Any, products: Array) -> None:
                out[:, _shifted(here, first)] += products.astype(x.dtype).astype(jnp.float32)

            multiply(hidden, w2, forms[2], first, add, wide_hidden)
            return carry

        jax.lax.fori_loop(0, steps[0], take_hidden, None)
        if wide_hidden is not None:
            spread(hidden, wide_hidden)
        jax.lax.fori_loop(0, steps[1], take_outputs, None)
        return carry

    pl.when(found > 0)(lambda: start(0, 0, 0))
    jax.lax.fori_loop(0, found, visit_expert, None)


def _apart(refs: Sequence[Any], cut: list[list[Tile]]) -> tuple[list[list[Any]], list[Any]]:
    """The references of each weight's arrays, which come first, and the rest."""
    left = list(refs)
    return [[left.pop(0) for _ in tiles] for tiles in cut], left


def _shifted(here: Any, first: Any) -> Any:
    return pl.ds(pl.multiple_of(first + here.start, LANES), here.size)


def _list_visits(ids: Any, visits: Any, seen: Any) -> Array:
    """Fills the front of `visits` [E] with the experts among the ids [T, K] in the order of their first occurrence.

    Returns how many they are. `seen` [E] is room to mark them in.
    """
    rows, choices, count = ids.shape[0], jnp.int32(ids.shape[1]), seen.shape[0]

    def clear(expert: Any, carry: None) -> None:
        seen[expert] = 0
        return carry

    def look(place: Any, found: Any) -> Any:
        # Not `//` and `%`: the sign that they look at lowers differently by chip, which a CPU host cannot tell.
        expert = ids[jax.lax.div(place, choices), jax.lax.rem(place, choices)]
        there = jnp.clip(expert, 0, count - 1)
        new = (expert == there) & (seen[there] == 0)

        @pl.when(new)
        def _() -> None:
            seen[there] = 1
            visits[found] = expert

        return found + new.astype(jnp.int32)

    jax.lax.fori_loop(0, count, clear, None)
    return jax.lax.fori_loop(0, rows * ids.shape[1], look, jnp.int32(0))
