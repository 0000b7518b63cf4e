"""Matrix products with weights that may be block-scaled.

A block-scaled weight is expanded for the product alone, or, on TPUs, read as it is stored (`kernels/linear`). Where a
low-rank update is beside it, rows meet the weight as it is held, and the update's two factors in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from v4_jax.kernels import choose
from v4_jax.kernels.linear import reference
from v4_jax.kernels.rotary.reference import Projection
from v4_jax.low_rank import Adapted, base_of, is_adapted
from v4_jax.number_formats import Weight
from v4_jax.sharding import collectives
from v4_jax.sharding.collectives import Axes

FEW_ROWS = 32  # sums of more rows take longer on their way between devices than the weights do from memory


def linear(x: Array, weight: Weight, dtype: Any) -> Array:
    """[..., in] times a released-layout [out, in] weight: [..., out] of `dtype`."""
    return linears(x, [weight], dtype)[0]


def linears(x: Array, weights: Sequence[Weight], dtype: Any) -> list[Array]:
    """`linear` with several weights of the same input, which may thus go in one operation."""
    found = choose.products_with(x, [base_of(weight) for weight in weights], dtype)
    for place, weight in enumerate(weights):
        if isinstance(weight, Adapted):
            found[place] += weight.scale * linear(linear(x, weight.a, dtype), weight.b, dtype)
    return found


def project(x: Array, projections: Sequence[Projection], axes: Axes = ()) -> list[Array]:
    """Several products with a layer's input, in as few operations as there can be.

    Args:
      x: [B, S, in].
      projections: the weights.
      axes: mesh axes whose devices all have the same rows and the whole weights. Where rows are few, each device reads
        a share of every weight, and the products are added up: that takes less time than to read them all.

    Returns:
      [B, S, out] for each, and what is to become of it done.
    """
    rows, devices = math.prod(x.shape[:-1]), collectives.size(axes)
    shared = not any(is_adapted(p.weight) for p in projections) and devices > 1 and rows <= FEW_ROWS
    if shared and all(reference.divides(p.weight, devices) for p in projections):
        weights, dtypes = [p.weight for p in projections], [p.dtype for p in projections]
        sums = choose.partial_products(x.reshape(rows, -1), weights, dtypes, collectives.index(axes), devices)
        found = choose.settle(collectives.psum(sums, axes), projections)
        return [part.reshape(*x.shape[:-1], -1) for part in found]
    results: dict[int, Array] = {}
    alike: dict[tuple[Any, bool], list[int]] = {}
    for place, projection in enumerate(projections):
        alike.setdefault((projection.dtype, projection.detached), []).append(place)
    for (dtype, detached), places in alike.items():
        weights = [projections[place].weight for place in places]
        found = linears(jax.lax.stop_gradient(x) if detached else x, weights, dtype)
        results |= dict(zip(places, found, strict=True))
    for place, projection in enumerate(projections):
        if (then := projection.then) is not None:
            results[place] = choose.norm_rotate(results[place], then.norm, then.turn, then.steps)
    return [results[place] for place in range(len(projections))]


def grouped_linear(x: Array, weight: Weight, dtype: Any) -> Array:
    """[..., G, in] times G matrices that lie one below the other, [G * out, in]: [..., G, out] of `dtype`.

    Each group of inputs meets its own matrix.
    """
    product = choose.grouped_product(x, base_of(weight), dtype)
    if not isinstance(weight, Adapted):
        return product
    return product + weight.scale * choose.grouped_product(linear(x, weight.a, dtype), weight.b, dtype)
