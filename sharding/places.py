"""Rows to places, and what lies in places summed up by row: two maps that are each other's gradients.

As gathers both ways. The gradient that JAX takes of a gather is a scatter, which adds one row after another and, on
TPUs, in float32 places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Places(NamedTuple):
    """Which of P places hold which of T rows, each of which lies in at most K.

    Attributes:
      row: [P] int32 row that lies in each place; any where none does.
      place: [T, K] int32 places of each row; negative for none.
    """

    row: Array
    place: Array


@jax.custom_vjp
def spread(x: Array, places: Places) -> Array:
    """[T, ...] rows to [P, ...] places. The gradients that come back are summed in float32."""
    return x[places.row]


@jax.custom_vjp
def collect(y: Array, places: Places) -> Array:
    """[P, ...] places to [T, ...] rows, float32, each the sum of what lies in its places.

    What lies in places that no row has is not used, and gets any gradient.
    """
    total = jnp.zeros((places.place.shape[0], *y.shape[1:]), jnp.float32)
    for place in places.place.T:
        there = (place >= 0).reshape(-1, *(1,) * (y.ndim - 1))
        total += jnp.where(there, y[jnp.maximum(place, 0)], 0).astype(jnp.float32)
    return total


def _spread_forward(x: Array, places: Places) -> tuple[Array, Any]:
    return spread(x, places), places


def _spread_backward(places: Places, gradient: Array) -> tuple[Array, None]:
    return collect(gradient, places).astype(gradient.dtype), None


def _collect_forward(y: Array, places: Places) -> tuple[Array, Any]:
    return collect(y, places), (places, jnp.zeros((0,), y.dtype))


def _collect_backward(residuals: Any, gradient: Array) -> tuple[Array, None]:
    places, like = residuals
    return spread(gradient.astype(like.dtype), places), None


spread.defvjp(_spread_forward, _spread_backward)
collect.defvjp(_collect_forward, _collect_backward)
