"""Products with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.layer_stack import uncut
from v4_jax.number_formats import BlockScaled, dequantise
from v4_jax.policy import einsum
from v4_jax.sharding.platform import platform_of_mesh

LANES = 128


def matmul(x: Array, weight: Array, dtype: Any) -> Array:
    """[..., in] times a [out, in] weight as released: [..., out] of `dtype`."""
    return einsum("...i,oi->...o", x, weight, dtype=dtype)


def grouped(x: Array, weight: Array, dtype: Any) -> Array:
    """[..., G, in] times G matrices one below the other, [G * out, in]: [..., G, out], each group by its own."""
    *leading, groups, size = x.shape
    if platform_of_mesh() != "tpu":
        return einsum("...gi,goi->...go", x, weight.reshape(groups, -1, size), dtype=dtype)
    # Of a batch of products the TPU compiler wants groups or rows in other places, and copies all to them and back.
    side_by_side = jnp.split(x.reshape(*leading, groups * size), groups, axis=-1)
    pairs = zip(side_by_side, jnp.split(weight, groups), strict=True)
    return jnp.concatenate([einsum("...i,oi->...o", a, b, dtype=dtype) for a, b in pairs], axis=-1).reshape(
        *leading, groups, -1
    )


def divides(weight: Any, devices: int) -> bool:
    """Whether the inputs of a weight [out, in] split into so many shares, each of whole blocks."""
    block = weight.block[1] if isinstance(weight, BlockScaled) else 1
    return weight.shape[1] % (devices * block) == 0


def partial_products(x: Array, weights: Sequence[Any], share: Any, *, devices: int, dtypes: Sequence[Any]) -> Array:
    """Multiplies a share of the inputs by the same share of several weights'.

    Args:
      x: [M, in].
      weights: [out, in] each.
      share: int32 number of the share.
      devices: shares in all, see `divides`.
      dtypes: of the operands of each weight's products.

    Returns:
      [M, sum of outs, each made up to a multiple of 128] float32, the weights' products in order, see `parts`.
    """
    found = []
    for weight, dtype in zip(uncut(weights), dtypes, strict=True):
        own = dequantise(_own(weight, share, devices), dtype)
        product = einsum("mi,oi->mo", _share(x, share, devices), own, dtype=dtype, accumulate=jnp.float32)
        found.append(jnp.pad(product, ((0, 0), (0, made_up(weight) - product.shape[1]))))
    return jnp.concatenate(found, axis=1)


def parts(sums: Array, weights: Sequence[Any]) -> list[Array]:
    """What of `partial_products` belongs to each weight: [M, out]."""
    found, first = [], 0
    for weight in weights:
        found.append(sums[:, first : first + weight.shape[0]])
        first += made_up(weight)
    return found


def made_up(weight: Any) -> int:
    """Outputs of a weight, made up to a multiple of 128."""
    return -(-weight.shape[0] // LANES) * LANES


def _own(weight: Any, share: Any, devices: int) -> Any:
    if not isinstance(weight, BlockScaled):
        return _share(weight, share, devices)
    codes, scales = (_share(x, share, devices) for x in (weight.codes, weight.scales))
    return BlockScaled(codes, scales, weight.block)


def _share(x: Array, share: Any, devices: int) -> Array:
    """The share of the last axis."""
    size = x.shape[-1] // devices
    return jax.lax.dynamic_slice_in_dim(x, share * size, size, axis=-1)
