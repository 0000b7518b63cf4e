"""The same products for XLA:CPU: where few heads share a query's own keys, these keys' gradients as sums."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.kernels.attention import reference

# Heads up to which the gradient of a query's own keys is a sum written out: as products, one of so few heads for every
# query, it takes many times as long.
FEW_HEADS = 4


def helps(x: Array, keys: Array) -> bool:
    """Whether these forms differ from the reference: x [B, Q, H, ...] of few heads, keys of each query."""
    return keys.ndim == 4 and x.shape[2] <= FEW_HEADS


@jax.custom_vjp
def products(queries: Array, keys: Array) -> Array:
    """See `reference.products`."""
    return reference.products(queries, keys)


@jax.custom_vjp
def weighted(shares: Array, keys: Array) -> Array:
    """See `reference.weighted`."""
    return reference.weighted(shares, keys)


def _forward(form: Any, x: Array, keys: Array) -> tuple[Array, tuple[Array, Array]]:
    return form(x, keys), (x, keys)


def _of_x(form: Any, x: Array, keys: Array, gradient: Array) -> Array:
    return jax.vjp(lambda x: form(x, keys), x)[1](gradient)[0]


def _of_keys(by_key: Array, by_channel: Array, dtype: Any) -> Array:
    """[B, Q, K, C] from [B, Q, H, K] and [B, Q, H, C]."""
    terms = (by_key[:, :, h, :, None] * by_channel[:, :, h, None, :] for h in range(by_key.shape[2]))
    return functools.reduce(jnp.add, terms).astype(dtype)


def _products_backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    queries, keys = operands
    return _of_x(reference.products, queries, keys, gradient), _of_keys(gradient, queries, keys.dtype)


def _weighted_backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    shares, keys = operands
    return _of_x(reference.weighted, shares, keys, gradient), _of_keys(shares, gradient, keys.dtype)


products.defvjp(functools.partial(_forward, reference.products), _products_backward)
weighted.defvjp(functools.partial(_forward, reference.weighted), _weighted_backward)
