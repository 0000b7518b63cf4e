"""The grouped matrix product."""

from __future__ import annotations

from typing import Any

from jax import Array

from v4_jax.kernels.grouped_matmul.groups import map_groups
from v4_jax.kernels.linear.reference import matmul
from v4_jax.number_formats import Weight, dequantise


def grouped_matmul(rows: Array, weight: Weight, sizes: Array, *, layer: Any = None) -> Array:
    """Every group's rows times the group's weight.

    Args:
      rows: [M, in], sorted by group.
      weight: [G, out, in], or [layers, G, out, in] when `layer` is given; may be block-scaled.
      sizes: [G] int32 rows of each group; rows beyond their sum come out as zeros.
      layer: which layer of stacked weights to use.

    Returns:
      [M, out] in the dtype of the rows.
    """

    def product(rows: Array, weight: Weight) -> Array:
        return matmul(rows, dequantise(weight, rows.dtype), rows.dtype)

    return map_groups(product, rows, weight, sizes, layer=layer, width=weight.shape[-2])
