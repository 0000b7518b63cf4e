"""Products of queries with keys, and of attention with the keys as values: shared by all queries, or each one's own."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.policy import einsum

# Heads up to which the gradient of a query's own keys is a sum written out: as products, one of so few heads for every
# query, it takes many times as long on CPUs.
FEW_HEADS = 4


def products(queries: Array, keys: Array) -> Array:
    """Float32 products [B, Q, H, K] of queries [B, Q, H, C] with keys: [B, K, C] shared, or [B, Q, K, C] of each."""
    return _contract("bqhc,{}->bqhk", queries, keys, queries.dtype)


def weighted(shares: Array, keys: Array) -> Array:
    """Float32 sums [B, Q, H, C] of keys, as in `products`, each times its share [B, Q, H, K], in the keys' dtype."""
    return _contract("bqhk,{}->bqhc", shares, keys, keys.dtype)


def _contract(spec: str, x: Array, keys: Array, dtype: Any) -> Array:
    own, heads = keys.ndim == 4, x.shape[2]
    contract = _with_own if own and heads <= FEW_HEADS else _product
    return contract(spec.format("bqkc" if own else "bkc"), dtype, x, keys)


def _product(spec: str, dtype: Any, x: Array, keys: Array) -> Array:
    return einsum(spec, x, keys, dtype=dtype, accumulate=jnp.float32)


_with_own = jax.custom_vjp(_product, nondiff_argnums=(0, 1))


def _forward(spec: str, dtype: Any, x: Array, keys: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(spec, dtype, x, keys), (x, keys)


def _backward(spec: str, dtype: Any, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, keys = residuals
    of_x = jax.vjp(lambda x: _product(spec, dtype, x, keys), x)[1](gradient)[0]
    by_key, by_channel = (gradient, x) if spec.endswith("k") else (x, gradient)
    terms = (by_key[:, :, h, :, None] * by_channel[:, :, h, None, :] for h in range(x.shape[2]))
    return of_x, functools.reduce(jnp.add, terms).astype(keys.dtype)


_with_own.defvjp(_forward, _backward)
