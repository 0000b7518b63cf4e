"""Experts wherever they are: tokens visit the devices that hold theirs, and what these compute is combined."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.kernels.choose import (
    few_rows_experts,
    many_rows_experts,
    map_groups,
    rows_from_tiles,
    rows_in_tiles,
)
from v4_jax.kernels.grouped_matmul.tpu import grouped_matmul
from v4_jax.kernels.stored_weights import supports
from v4_jax.layers.experts import Experts, expert_ffn
from v4_jax.low_rank import parts_of
from v4_jax.sharding import collectives
from v4_jax.sharding.dispatch import Choices, count_each, visit
from v4_jax.sharding.exchange import back, leave
from v4_jax.sharding.platform import by_platform, interpreting
from v4_jax.sharding.split import Split

FEW_TOKENS = 1024  # up to so many, every device sees all tokens and computes its experts' share of them


@jax.named_scope("experts.dispatch")
def dispatch(
    x: Array,
    assigned: Array,
    weights: Array,
    experts: Experts,
    layer: Any,
    config: Architecture,
    dtype: Any,
    split: Split,
    beside: Array | None = None,
) -> Array:
    """Computes every token's experts wherever they are, and sums them.

    Experts lie on the devices along `split.axes("experts")`. Along those of these axes that also split the tokens, few
    tokens visit all devices and many go to their experts' devices only; along the others every device has the same
    tokens and adds its experts' share.

    Args:
      x: [T, D].
      assigned: [T, K] expert of each choice; `n_routed_experts` for none.
      weights: [T, K] float32 routing weights.
      experts: this device's; see `MixtureOfExperts.__call__`.
      layer: layer number in stacked weights, or None.
      config: the architecture.
      dtype: compute dtype.
      split: where experts and tokens are.
      beside: [T, D] float32, if any, what is summed over the devices that have the same tokens, and added.

    Returns:
      [T, D] float32.
    """
    owners = split.axes("experts")
    same = split.shared("experts")
    away = tuple(axis for axis in owners if axis not in same)
    own = config.n_routed_experts // split.count(owners)
    local = functools.partial(local_experts, count=own, limit=config.swiglu_limit)

    if x.shape[0] * split.count(away) <= FEW_TOKENS or not away:
        first = collectives.index(owners) * own
        rows, assigned, weights = (
            collectives.all_gather(array, away, 0) for array in (x.astype(dtype), assigned, weights)
        )
        here = (assigned >= first) & (assigned < first + own)
        added = None if away else beside
        total = local(rows, jnp.where(here, assigned - first, own), weights, experts, layer, added)
        total = collectives.reduce_scatter(total, away, 0)
        if away and beside is not None:
            total += beside
        return collectives.psum(total, same)

    parts = parts_of(experts)

    def work(rows: Array, scale: Array, sizes: Array, trained: Any, fixed: tuple[Any, Any]) -> Array:
        frozen, layer = fixed
        weights, count = parts.joined(trained, frozen), jnp.sum(sizes)
        matrix = rows_from_tiles(rows, count)
        out = _grouped_experts(matrix, scale, sizes, weights, layer, limit=config.swiglu_limit)
        return rows_in_tiles(out, count)

    places = dict(
        zip(owners, jnp.unravel_index(assigned // own, [split.count((axis,)) for axis in owners]), strict=True)
    )
    mine = assigned < config.n_routed_experts
    for axis in same:
        mine &= places[axis] == collectives.index((axis,))
    owner = jnp.zeros_like(assigned)
    for axis in away:
        owner = owner * split.count((axis,)) + places[axis]
    choices = Choices(jnp.where(mine, owner * own + assigned % own, split.count(away) * own), weights)
    fixed = parts.frozen, layer
    total = visit(work, x.shape[-1], own, away, split.everywhere, x.astype(dtype), choices, parts.trained, fixed)
    total = collectives.psum(total, same)
    return total if beside is None else total + collectives.psum(beside, same)


def local_experts(
    x: Array,
    assigned: Array,
    weights: Array,
    experts: Experts,
    layer: Any,
    beside: Array | None = None,
    *,
    count: int,
    limit: float,
) -> Array:
    """Computes each token's experts, and sums them: few tokens in one kernel on TPUs, or else sorted by expert.

    Args:
      x: [T, D] in the compute dtype.
      assigned: [T, K] which of this device's experts each choice is; `count` for none of them.
      weights: [T, K] float32 routing weights.
      experts: their weights; see `MixtureOfExperts.__call__`.
      layer: layer number in stacked weights, or None.
      beside: [T, D] float32 what is added to their sum, if anything.
      count: experts of this device.
      limit: bound of the experts' activations.

    Returns:
      [T, D] float32.
    """

    def by_expert(
        x: Array, assigned: Array, weights: Array, experts: Sequence[Any], layer: Any, beside: Array | None
    ) -> Array:
        w1, w3, w2 = experts
        total = _sorted_experts(x, assigned, weights, Experts(w1, w2, w3), layer, count=count, limit=limit)
        return total if beside is None else total + beside

    in_order = (experts.w1, experts.w3, experts.w2)
    with jax.named_scope("experts.ffn"):
        return few_rows_experts(by_expert, x, assigned, weights, in_order, layer, beside, limit=limit)


def _sorted_experts(
    x: Array, assigned: Array, weights: Array, experts: Experts, layer: Any, *, count: int, limit: float
) -> Array:
    """`local_experts` with tokens sorted by expert, and their results sorted back."""
    tokens, top = assigned.shape
    with jax.named_scope("experts.sort"):
        order = jnp.argsort(assigned.reshape(-1), stable=True)
        sorted_back = jnp.argsort(order)
        sizes = count_each(assigned, count)
        # Choices of none are sorted to the end: where -1 is taken for a place, it is the last one's, with zeros.
        places = jnp.where(assigned < count, sorted_back.reshape(tokens, top), -1)
        where = order // top, places
        sorted_x = by_platform(x, *where, default=lambda x, source, places: x[source], tpu=leave)
        rows = (sorted_x, weights.reshape(-1)[order])

    out = _grouped_experts(*rows, sizes, experts, layer, limit=limit)

    def combined(out: Array, source: Array, places: Array) -> Array:
        return jnp.sum(out[places.reshape(-1)].reshape(tokens, top, -1), axis=1, dtype=jnp.float32)

    with jax.named_scope("experts.combine"):
        return by_platform(out, *where, default=combined, tpu=back)


@jax.named_scope("experts.ffn")
def _grouped_experts(rows: Array, scale: Array, sizes: Array, experts: Experts, layer: Any, *, limit: float) -> Array:
    """Experts of rows that are sorted by expert: [R, D] of their dtype; see `local_experts`.

    What comes of rows beyond those of `sizes` may be anything in programs for TPUs, and is zero in others.

    Args:
      rows: [R, D]; what lies beyond those of `sizes` may be anything.
      scale: [R] float32 their routing weights.
      sizes: [E] int32 rows of each expert.
      experts: their weights.
      layer: layer number in stacked weights, or None.
      limit: bound of the activations.
    """
    dtype = rows.dtype

    def run(rows: tuple[Array, Array], group: Experts) -> Array:
        return expert_ffn(rows[0], group, rows[1], limit, dtype)

    def run_all(rows: tuple[Array, Array], experts: Experts, sizes: Array, layer: Any) -> Array:
        def products(x: Array, weights: Sequence[Any], dtype: Any) -> list[Array]:
            return [
                grouped_matmul(x.astype(dtype), weight, sizes, layer=layer, interpret=interpreting())
                for weight in weights
            ]

        return expert_ffn(rows[0], experts, rows[1], limit, dtype, products)

    kernel = run_all if all(supports(weight, dtype) for weight in experts) else None

    def by_groups(rows: Array, scale: Array, weights: Sequence[Any], sizes: Array, layer: Any) -> Array:
        (w1, w3, w2), width = weights, rows.shape[-1]
        return map_groups(run, (rows, scale), Experts(w1, w2, w3), sizes, layer=layer, width=width, kernel=kernel)

    in_order = [experts.w1, experts.w3, experts.w2]
    return many_rows_experts(by_groups, rows, scale, in_order, sizes, layer, limit=limit)
