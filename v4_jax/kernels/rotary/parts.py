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
from v4_jax.layer_stack import one_layer, stack_of


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
    tokens, layer = len(sums), one_layer([x.norm for x in thens if x is not None and x.norm is not None])
    operands, specs = [sums], [pl.BlockSpec(sums.shape, lambda i, layer: (0, 0))]
    for then in thens:
        if then is None:
            continue
        if then.norm is not None:
            operands.append(stack_of(then.norm)[0])
            specs.append(vector_spec(operands[-1], lambda i, layer: layer[0]))
        if then.turn is not None:
            operands += [part.reshape(tokens, -1) for part in then.turn]
            specs += [pl.BlockSpec((tokens, then.turn.channels), lambda i, layer: (0, 0))] * 2
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
            out_specs=[pl.BlockSpec(shape.shape, lambda i, layer: (0, 0)) for shape in shapes],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=2 * sums.nbytes, transcendentals=0),
        interpret=interpret,
        name="settle",
    )(jnp.asarray(layer, jnp.int32).reshape(1), *operands)
    return list(found)


def _kernel(layer: Any, sums: Any, *refs: Any, firsts: list[int], forms: list[Any]) -> None:
    """Refs: norms [N, C] and the two parts of a turn [T, R], of each product that has them; products [T, C]."""
    given = iter(refs)
    out = refs[-len(firsts) :]
    for first, form, one in zip(firsts, forms, out, strict=True):
        rows = sums[:, first : first + one.shape[1]]
        if form is not None:
            norm, turn, steps = form
            weight = vector(next(given), layer[0]) if norm else None
            angles = (next(given)[...], next(given)[...]) if turn else None
            rows = settled(rounded(rows, one.dtype), weight, angles, steps, one.dtype)
        one[...] = rows.astype(one.dtype)
