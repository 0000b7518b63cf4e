"""One expert, or rows of all of them: a clamped SwiGLU (technical report, sections 2.1 and 4.2.3)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.kernels import choose
from v4_jax.layers.linear import linears


class Experts(NamedTuple):
    """Routed expert weights, [E, out, in] each or [layers, E, out, in] when shared by a scan over layers."""

    w1: Any
    w2: Any
    w3: Any


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def swiglu(gate: Array, up: Array, limit: float) -> Array:
    """silu(min(gate, limit)) * clip(up, -limit, limit) in float32; computed again backwards, as `rms_norm` is."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def expert_ffn(
    x: Array, weights: Experts, scale: Array | None, limit: float, dtype: Any, products: Any = linears
) -> Array:
    """One expert on rows [T, D]: [T, D] of `dtype`. `scale` [T] multiplies the hidden activation before its rounding.

    Or each row's own expert, when `products` (of rows, weights and dtype) are grouped ones.
    """
    hidden = swiglu(*products(x, [weights.w1, weights.w3], dtype), limit)
    if scale is not None:
        hidden = hidden * scale[:, None]
    return products(hidden.astype(dtype), [weights.w2], dtype)[0]


def shared_expert(x: Array, weights: Experts, limit: float, dtype: Any) -> Array:
    """The expert that all rows [T, D] visit: [T, D] float32, rounded to `dtype` before."""

    def by_products(x: Array, weights: Sequence[Any]) -> Array:
        w1, w3, w2 = weights
        return expert_ffn(x, Experts(w1, w2, w3), None, limit, dtype).astype(jnp.float32)

    return choose.expert_of_all(by_products, x.astype(dtype), [weights.w1, weights.w3, weights.w2], limit=limit)
