"""Whole experts on few rows, for TPUs: routing, feed-forward and the sum over each row's experts in one operation.

    out[t] = sum over the choices (e, w) of row t of  w2[e] . (w * swiglu(w1[e] . x[t], w3[e] . x[t]))

A step with few rows is bound by how many operations it has, and by the bytes of the experts that it visits. So rows are
not sorted: an expert that any row chose is applied to all of them, which costs the matrix unit no more than the tile of
rows that each expert would take anyway, and rows that did not choose it weigh nothing. The list of visits is made by
the scalar unit from the ids; experts that nobody chose are not read. More rows of E2M1 than are spread over blocks go
to their experts in visits of so many (`visits.py`).

Results are summed in float32 in the order in which the experts first occur among the choices, which is that of a row's
choices for a single row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels import stored_weights
from v4_jax.kernels.block_scales import LANES
from v4_jax.kernels.experts.feed_forward import VMEM_BYTES, Cut, Visits, cut
from v4_jax.kernels.experts.visits import by_visits, saves
from v4_jax.kernels.memory import kept_in_hbm
from v4_jax.kernels.stored_weights import spread
from v4_jax.kernels.turns import about
from v4_jax.number_formats import Weight

ROWS = 128  # at most: the tile of rows of the grouped product


def supports(x: Array, weights: Sequence[Weight]) -> bool:
    """Whether `experts` takes rows [T, D] and weights w1, w3, w2."""
    return x.shape[0] <= ROWS and all(stored_weights.supports(weight, x.dtype) for weight in weights)


def experts(
    x: Array,
    assigned: Array,
    scale: Array,
    weights: Sequence[Weight],
    beside: Array | None = None,
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
      beside: [T, D] float32 what is added to the sum, if anything.
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
    (rows, depth), count = x.shape, weights[0].shape[1]
    if not assigned.shape == scale.shape == (rows, assigned.shape[-1]):
        raise ValueError(f"x {x.shape} does not fit choices {assigned.shape} weighted by {scale.shape}")

    arrays, whole = cut(depth, weights)
    x, arrays = kept_in_hbm(x, arrays, interpret=interpret)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    if saves(rows, whole):
        found = by_visits(x, assigned, scale, arrays, whole, count, layer, limit=limit, interpret=interpret)
        return found if beside is None else found + beside
    in_vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    more = [] if beside is None else [beside]
    return pl.pallas_call(
        functools.partial(_kernel, cut=whole, limit=limit, adds=bool(more)),
        in_specs=[
            *[pl.BlockSpec(memory_space=pltpu.SMEM)] * 2,
            *[in_vmem] * (3 + len(more)),
            *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(arrays),
        ],
        out_specs=in_vmem,
        out_shape=jax.ShapeDtypeStruct((rows, depth), jnp.float32),
        scratch_shapes=[
            pltpu.SMEM((count,), jnp.int32),
            pltpu.SMEM((count,), jnp.int32),
            *whole.scratch(rows, x.dtype),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=6 * assigned.size * depth * whole.hidden,
            bytes_accessed=min(count, assigned.size) * whole.per_expert + 6 * rows * depth,
            transcendentals=assigned.size * whole.hidden,
        ),
        interpret=interpret,
        name="experts",
    )(layer, assigned, x, assigned, scale, *more, *arrays)


def _kernel(
    layer: Any, ids: Any, x: Any, assigned: Any, scale: Any, *rest: Any, cut: Cut, limit: float, adds: bool
) -> None:
    """All visits: `ids` [T, K] are those of `assigned`, for the scalar unit. The rest begins with what is added."""
    beside, rest = (rest[0], rest[1:]) if adds else (None, rest)
    sources = rest[: len(cut.dtypes)]
    out, numbers, seen, *scratch = rest[len(cut.dtypes) :]
    found = _list_visits(ids, numbers, seen)
    visits = Visits(cut, sources, scratch, layer[0], lambda number: numbers[number], found)
    if visits.wide is not None:
        spread(x, visits.wide)
    out[...] = jnp.zeros_like(out)

    def visit(number: Any, carry: None) -> None:
        mine = assigned[...] == numbers[number]
        weight = jnp.sum(jnp.where(mine, scale[...], 0.0), axis=1, keepdims=True)
        chosen = jnp.sum(mine.astype(jnp.float32), axis=1, keepdims=True) > 0

        def weigh(active: Array) -> Array:
            # What overflows in one row is nothing to the experts of others.
            return jnp.where(chosen, active * weight, 0.0)

        def add(here: Any, products: Array) -> None:
            out[:, here] += products.astype(x.dtype).astype(jnp.float32)

        visits.visit(number, x, weigh, limit, add)
        return carry

    visits.begin()
    with about(min(seen.shape[0], ids.shape[0] * ids.shape[1])):
        jax.lax.fori_loop(0, found, visit, None)
    if beside is not None:
        out[...] += beside[...]


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
