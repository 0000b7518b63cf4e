"""For XLA:CPU: where few heads share a query's own keys, the products' gradients of these keys as sums."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.kernels.attention import reference

# Heads up to which the gradient of a query's own keys is a sum written out: as products, one of so few heads for every
# query, it takes many times as long.
FEW_HEADS = 4


def helps(x: Array, keys: Array) -> bool:
    """Whether they differ from the reference's: of x [B, Q, H, ...] with few heads, and keys of each query."""
    return keys.ndim == 4 and x.shape[2] <= FEW_HEADS


def products_gradients(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """Gradients of queries [B, Q, H, C] and keys [B, Q, K, C] from that of `reference.products`, [B, Q, H, K]."""
    queries, keys = operands
    return _of_first(reference.products, queries, keys, gradient), _of_keys(gradient, queries, keys.dtype)


def weighted_gradients(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """Gradients of shares [B, Q, H, K] and keys [B, Q, K, C] from that of `reference.weighted`, [B, Q, H, C]."""
    shares, keys = operands
    return _of_first(reference.weighted, shares, keys, gradient), _of_keys(shares, gradient, keys.dtype)


def _of_first(form: Callable[[Array, Array], Array], x: Array, keys: Array, gradient: Array) -> Array:
    return jax.vjp(lambda x: form(x, keys), x)[1](gradient)[0]


def _of_keys(by_key: Array, by_channel: Array, dtype: Any) -> Array:
    """[B, Q, K, C] from [B, Q, H, K] and [B, Q, H, C]."""
    terms = (by_key[:, :, h, :, None] * by_channel[:, :, h, None, :] for h in range(by_key.shape[2]))
    return functools.reduce(jnp.add, terms).astype(dtype)
