"""Work on rows grouped by expert: every group's rows meet that group's weights, dropless, whatever the group sizes.

Groups are processed one after another in tiles of rows. A group's weights are cut out (and, where block-scaled,
expanded) once, for that group alone; empty groups cost nothing. This is what XLA turns into plain matmuls on any
backend, where `lax.ragged_dot` on CPU runs at a twentieth of a matmul's rate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.low_rank import parts_of

# Rows of one group that are multiplied at once: more of them reuse the weights that a tile reads, and each group's last
# tile multiplies more rows for nothing.
TILE, LARGEST_TILE = 128, 1024


def map_groups(
    function: Callable[[Any, Any], Array],
    rows: Any,
    weights: Any,
    sizes: Array,
    *,
    layer: Any = None,
    width: int,
) -> Array:
    """Applies `function(rows of a tile, weights of its group)` to every group.

    Args:
      function: pure; maps a tile of row arrays [T, ...] and one group's weights to [T, width]; rows are independent.
      rows: pytree of [M, ...] arrays, sorted by group.
      weights: pytree with a leading group axis, or with leading (layer, group) axes when `layer` is given.
      sizes: [G] int32 rows of each group; their sum is at most M. Rows beyond it may be anything, and come out as
        zeros.
      layer: which layer of stacked weights to use, without cutting it out first.
      width: size of the output's last axis.

    Returns:
      [M, width] in the dtype that `function` returns. Differentiable in `rows` and `weights` unless `layer` is given.
    """
    if layer is None:
        return _map_groups(function, width, rows, weights, sizes)
    return _forward(function, width, rows, weights, sizes, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _map_groups(function: Any, width: int, rows: Any, weights: Any, sizes: Array) -> Array:
    return _forward(function, width, rows, weights, sizes, None)


def tile_rows(count: int, groups: int) -> int:
    """Rows per tile: near the mean group for few rows, then `TILE`, then an eighth of the mean group."""
    mean = max(1, count // groups)
    small, large = (1 << (n - 1).bit_length() for n in (mean, max(1, mean // 8)))
    return min(max(min(small, TILE), large), LARGEST_TILE)


def _cut(tree: Any, start: Any, size: int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tree)


def _put(array: Array, tile: Array, start: Any) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, tile, start, 0)


def _group(weights: Any, group: Any, layer: Any) -> Any:
    """One group's weights."""

    def cut(x: Array) -> Array:
        lead = (group,) if layer is None else (layer, group)
        sizes = (*(1 for _ in lead), *x.shape[len(lead) :])
        zero = jnp.zeros((), jnp.int32)
        starts = (*(jnp.asarray(i, jnp.int32) for i in lead), *(zero for _ in x.shape[len(lead) :]))
        return jax.lax.dynamic_slice(x, starts, sizes).reshape(x.shape[len(lead) :])

    return jax.tree.map(cut, weights)


def _pad(rows: Any, tile: int) -> Any:
    """Room for the last tile of the last group to run over."""
    return jax.tree.map(lambda x: jnp.pad(x, [(0, tile)] + [(0, 0)] * (x.ndim - 1)), rows)


def _walk(sizes: Array, tile: int, load: Any, visit: Any, carry: Any) -> Any:
    """Visits each tile of each non-empty group in row order: `carry = visit(carry, load(group), group, first row)`.

    A tile that runs over its group's end covers rows of the next one, which is visited later and overwrites them.
    """
    starts = jnp.cumsum(sizes) - sizes
    active = jnp.argsort(sizes == 0, stable=True)

    def each_group(i: Any, carry: Any) -> Any:
        group = active[i]
        loaded = load(group)

        def each_tile(j: Any, carry: Any) -> Any:
            return visit(carry, loaded, group, starts[group] + j * tile)

        return jax.lax.fori_loop(0, -(-sizes[group] // tile), each_tile, carry)

    return jax.lax.fori_loop(0, jnp.sum(sizes > 0), each_group, carry)


def _masked(tree: Any, keep: Array) -> Any:
    return jax.tree.map(lambda x: jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, 0), tree)


def _forward(function: Any, width: int, rows: Any, weights: Any, sizes: Array, layer: Any) -> Array:
    count = jax.tree.leaves(rows)[0].shape[0]
    tile = tile_rows(count, sizes.shape[0])
    padded = _pad(rows, tile)
    group_0 = functools.partial(_group, group=0, layer=None if layer is None else 0)
    dtype = jax.eval_shape(lambda: function(_cut(padded, 0, tile), group_0(weights))).dtype

    def visit(out: Array, group_weights: Any, group: Any, first: Any) -> Array:
        del group
        return _put(out, function(_cut(padded, first, tile), group_weights), first)

    def load(group: Any) -> Any:
        return _group(weights, group, layer)

    out = _walk(sizes, tile, load, visit, jnp.zeros((count + tile, width), dtype))
    return _masked(out[:count], jnp.arange(count) < jnp.sum(sizes))


def _forward_with_residuals(function: Any, width: int, rows: Any, weights: Any, sizes: Array) -> tuple[Array, Any]:
    return _forward(function, width, rows, weights, sizes, None), (rows, weights, sizes)


def _backward(function: Any, width: int, residuals: Any, gradient: Array) -> Any:
    """Recomputes each tile and pulls the gradient back through it; weight gradients accumulate per group.

    Weights in blocks, and those with a low-rank update beside them, have none.
    """
    del width
    rows, weights, sizes = residuals
    count = gradient.shape[0]
    tile = tile_rows(count, sizes.shape[0])
    padded, padded_gradient = _pad(rows, tile), _pad(gradient, tile)
    ends, parts = jnp.cumsum(sizes), parts_of(weights)

    def visit(carry: Any, group_weights: Any, group: Any, first: Any) -> Any:
        of_rows, of_weights = carry
        inside = first + jnp.arange(tile) < ends[group]
        own = parts_of(group_weights)
        run = lambda rows, trained: function(rows, own.joined(trained, own.frozen))  # noqa: E731
        # What lies beyond all groups may be no numbers, which times a gradient of zero are none either.
        _, pull = jax.vjp(run, _masked(_cut(padded, first, tile), inside), own.trained)
        row_tile, weight_tile = pull(_masked(_cut(padded_gradient, first, tile), inside))
        of_rows = jax.tree.map(lambda out, x: _put(out, x, first), of_rows, row_tile)
        of_weights = jax.tree.map(lambda out, x: out.at[group].add(x.astype(out.dtype)), of_weights, weight_tile)
        return of_rows, of_weights

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (padded, parts.trained))
    of_rows, of_weights = _walk(sizes, tile, lambda group: _group(weights, group, None), visit, zeros)
    of_rows = _masked(jax.tree.map(lambda x: x[:count], of_rows), jnp.arange(count) < ends[-1])
    return of_rows, parts.joined(of_weights), None


_map_groups.defvjp(_forward_with_residuals, _backward)
