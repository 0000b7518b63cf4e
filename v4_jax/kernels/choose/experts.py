"""The router's choice, and products of rows with their experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from v4_jax.kernels.choose.forms import Form, pull, with_gradients, without_gradients
from v4_jax.kernels.experts import tpu as experts_tpu
from v4_jax.kernels.experts import training as experts_training
from v4_jax.kernels.grouped_matmul import groups
from v4_jax.kernels.router import reference as router
from v4_jax.kernels.router import tpu as router_tpu
from v4_jax.kernels.row_tiles import reference as row_tiles
from v4_jax.kernels.row_tiles import tpu as row_tiles_tpu
from v4_jax.kernels.stored_weights import one_in_stack
from v4_jax.layer_stack import uncut
from v4_jax.number_formats import BlockScaled, Weight
from v4_jax.sharding.platform import by_platform, interpreting


def best_experts(affinities: Array, scores: Array, top: int, factor: float) -> tuple[Array, Array]:
    """See `router.reference.best_experts`."""
    plain = functools.partial(router.best_experts, top=top, factor=factor)
    if not router_tpu.supports(scores):
        return plain(affinities, scores)
    kernel = functools.partial(router_tpu.best_experts, top=top, factor=factor, interpret=interpreting())
    return without_gradients(plain, tpu=kernel)(affinities, scores)


def map_groups(
    function: Callable[[Any, Any], Array],
    rows: Any,
    weights: Any,
    sizes: Array,
    *,
    layer: Any = None,
    width: int,
    kernel: Callable[[Any, Any, Array, Any], Array] | None,
) -> Array:
    """See `grouped_matmul.groups.map_groups` for all arguments but the kernel.

    Args:
      kernel: maps (rows, weights, sizes, layer) to the same result by `grouped_matmul.tpu`, but for rows of no group,
        which may come out as anything; takes the place of the loop over groups in programs for TPUs, except where
        gradients are asked for. None where there is none.
    """

    def plain(rows: Any, weights: Any, sizes: Array, layer: Any) -> Array:
        return groups.map_groups(function, rows, weights, sizes, layer=layer, width=width)

    if kernel is None:
        return plain(rows, weights, sizes, layer)
    if layer is not None:
        return by_platform(rows, weights, sizes, layer, default=plain, tpu=kernel)
    return without_gradients(plain, tpu=kernel)(rows, weights, sizes, None)


def few_rows_experts(
    plain: Form,
    x: Array,
    assigned: Array,
    scale: Array,
    weights: Sequence[Weight],
    layer: Any,
    beside: Array | None = None,
    *,
    limit: float,
) -> Array:
    """See `experts.tpu.experts` for all arguments but the first.

    Args:
      plain: the same of the arrays and the layer, in whose place the kernel runs in programs for TPUs where rows are
        few, but where gradients are asked for.
      x: [T, D].
      assigned: [T, K] experts of each row.
      scale: [T, K] their weights.
      weights: w1, w3 and w2 of all experts.
      layer: layer number in stacked weights, or None.
      beside: [T, D] float32 what is added, if anything.
      limit: bound of the activations.
    """

    def kernel(
        x: Array, assigned: Array, scale: Array, weights: Sequence[Weight], layer: Any, beside: Array | None
    ) -> Array:
        return experts_tpu.experts(
            x, assigned, scale, weights, beside, layer=layer, limit=limit, interpret=interpreting()
        )

    operands = (x, assigned, scale, list(weights), layer, beside)
    if not experts_tpu.supports(x, weights):
        return plain(*operands)
    if layer is not None:
        return by_platform(*operands, default=plain, tpu=kernel)
    return without_gradients(plain, tpu=kernel)(*operands)


def many_rows_experts(
    plain: Form, rows: Array, scale: Array, weights: Sequence[Weight], sizes: Array, layer: Any, *, limit: float
) -> Array:
    """See `experts.training.forward` for all arguments but the first and the layer.

    Args:
      plain: the same of the arrays and the layer, in whose place kernels run in programs for TPUs, and give the
        gradients, where weights are such as training has.
      rows: [M, D], sorted by expert.
      scale: [M].
      weights: w1, w3 and w2 of all experts.
      sizes: rows of each.
      layer: layer number in stacked weights, or None.
      limit: bound of the activations.
    """
    if layer is not None or not experts_training.supports(rows, weights):
        return plain(rows, scale, weights, sizes, layer)

    def in_groups(rows: Array, scale: Array, weights: Sequence[Array], sizes: Array) -> Array:
        return plain(rows, scale, weights, sizes, None)

    def call(*operands: Any) -> Array:
        kernel = functools.partial(experts_training.forward, limit=limit, interpret=interpreting())
        return by_platform(*operands, default=in_groups, tpu=kernel)

    def gradients(operands: Any, gradient: Array) -> Any:
        rows, scale, weights, sizes = operands
        return *experts_training.gradients(
            rows, scale, weights, sizes, gradient, limit=limit, interpret=interpreting()
        ), None

    whole = with_gradients(call, default=pull(in_groups), tpu=gradients)
    return whole(rows, scale, list(weights), sizes)


def rows_in_tiles(rows: Array, count: Array) -> Array:
    """Rows of a matrix as they travel between devices, see `rows_from_tiles`: [R, D / 128, 128], or as they are."""
    if rows.shape[1] % row_tiles.LANES:
        return rows
    return _relaid(rows, count, rows.shape[1], into=True)


def rows_from_tiles(tiles: Array, count: Array) -> Array:
    """Rows that travelled as those of a matrix [R, D].

    Args:
      tiles: [R, D / 128, 128], or [R, D] where D is no multiple of 128.
      count: [] int32; what lies beyond so many rows may come out as anything.
    """
    return tiles if tiles.ndim == 2 else _relaid(tiles, count, tiles.shape[1] * row_tiles.LANES, into=False)


def _relaid(x: Array, count: Array, width: int, *, into: bool) -> Array:
    """Rows in tiles, or from them. Either is the gradient of the other."""
    plain, kernel = (
        (row_tiles.in_tiles, row_tiles_tpu.in_tiles) if into else (row_tiles.from_tiles, row_tiles_tpu.from_tiles)
    )
    if not row_tiles_tpu.supports(width, x.dtype):
        return plain(x)

    def call(x: Array, count: Array) -> Array:
        kernels = functools.partial(kernel, interpret=interpreting())
        return by_platform(x, count, default=lambda x, count: plain(x), tpu=kernels)

    def gradients(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
        return _relaid(gradient, operands[1], width, into=not into), None

    return with_gradients(call, default=gradients)(x, count)


def expert_of_all(plain: Form, x: Array, weights: Sequence[Weight], *, limit: float) -> Array:
    """One expert that all rows visit: [T, D] float32.

    Args:
      plain: the same of rows and weights; see `few_rows_experts`.
      x: [T, D].
      weights: w1 and w3 [H, D], and w2 [D, H]; the kernel takes block-scaled ones, which it reads in their stack.
      limit: bound of the activations.
    """

    def kernel(x: Array, weights: Sequence[Any]) -> Array:
        one = (x.shape[0], 1)
        stacks, layers = zip(*map(one_in_stack, weights), strict=True)
        return experts_tpu.experts(
            x,
            jnp.zeros(one, jnp.int32),
            jnp.ones(one, jnp.float32),
            stacks,
            layer=layers[0],
            limit=limit,
            interpret=interpreting(),
        )

    if not (all(isinstance(weight, BlockScaled) for weight in weights) and experts_tpu.supports(x, weights)):
        return plain(x, uncut(list(weights)))
    return without_gradients(plain, tpu=kernel)(x, list(weights))
