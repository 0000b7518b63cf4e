"""Products of a layer's input that came side by side, each normed, turned and rounded as it is meant to be, for TPUs.

In a step of few rows, to cut one out takes an operation, and to norm it another: each longer than the work.
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

from v4_jax.kernels.linear.reference import made_up
from v4_jax.kernels.rotary.reference import Projection, Settle
from v4_jax.kernels.rotary.tpu import VMEM_BYTES, rounded, settled
from v4_jax.kernels.rotary.tpu import supports as takes
from v4_jax.kernels.vectors import vector, vector_spec
from v4_jax.layer_stack import stack_of


def supports(projections: Sequence[Projection]) -> bool:
    """Whether `settle` takes products of these weights and dtypes."""
    return all(
        p.dtype in (jnp.bfloat16, jnp.float32)
        and (p.then is None or takes((1, p.weight.shape[0]), jnp.dtype(p.dtype), p.then.turn))
        for p in projections
    )


def settle(
    sums: Array, projections: Sequence[Projection], thens: Sequence[Settle | None], *, interpret: bool = False
) -> list[Array]:
    """See `reference.settle`, for what `supports` takes; not differentiable."""
    tokens, layers = len(sums), list[Any]()
    operands, specs = [sums], [pl.BlockSpec(sums.shape, lambda i, layers: (0, 0))]
    for then in thens:
        if then is None:
            continue
        if then.norm is not None:
            stack, layer = stack_of(then.norm)
            specs.append(vector_spec(stack, functools.partial(_layer, len(layers))))
            operands.append(stack)
            layers.append(layer)
        if then.turn is not None:
            operands += [part.reshape(tokens, -1) for part in then.turn]
            specs += [pl.BlockSpec((tokens, then.turn.channels), lambda i, layers: (0, 0))] * 2
    shapes = [jax.ShapeDtypeStruct((tokens, p.weight.shape[0]), p.dtype) for p in projections]
    found = pl.pallas_call(
        functools.partial(
            _kernel,
            firsts=[sum(made_up(p.weight) for p in projections[:i]) for i in range(len(projections))],
            forms=[None if x is None else (x.norm is not None, x.turn is not None, x.steps) for x in thens],
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=specs,
            out_specs=[pl.BlockSpec(shape.shape, lambda i, layers: (0, 0)) for shape in shapes],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=2 * sums.nbytes, transcendentals=0),
        interpret=interpret,
        name="settle",
    )(jnp.stack([jnp.asarray(layer, jnp.int32) for layer in layers or [0]]), *operands)
    return list(found)


def _layer(place: int, i: Any, layers: Any) -> Any:
    del i
    return layers[place]


def _kernel(layers: Any, sums: Any, *refs: Any, firsts: list[int], forms: list[Any]) -> None:
    """Refs: norms [N, C] and the two parts of a turn [T, R], of each product that has them; products [T, C]."""
    given, place = iter(refs), 0
    out = refs[-len(firsts) :]
    for first, form, one in zip(firsts, forms, out, strict=True):
        rows = sums[:, first : first + one.shape[1]]
        if form is not None:
            norm, turn, steps = form
            weight = vector(next(given), layers[place]) if norm else None
            place += norm
            angles = (next(given)[...], next(given)[...]) if turn else None
            rows = settled(rounded(rows, one.dtype), weight, angles, steps, one.dtype)
        one[...] = rows.astype(one.dtype)
