"""Vectors of a layer, such as a norm's weight, inside TPU kernels: read from the stack of all layers.

To cut one out in the compiler's own operations takes longer than a kernel does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

LINES = 16  # of a block: what a tile of 16-bit numbers holds


def vector_spec(stack: Array, layer: Callable[..., Any]) -> pl.BlockSpec:
    """The block of a stack [layers, n] in which a layer's vector lies.

    Args:
      stack: the vectors of all layers.
      layer: the layer's number, from what an index map is given.
    """
    count = min(LINES, stack.shape[0])
    return pl.BlockSpec((count, stack.shape[1]), lambda *given: (jax.lax.div(layer(*given), jnp.int32(count)), 0))


def vector(block: Any, layer: Any, here: Any = slice(None)) -> Array:
    """The layer's vector [1, n] float32, or what is `here` of it, from a reference of its block."""
    number = jax.lax.rem(layer, jnp.int32(block.shape[0]))
    own = jax.lax.broadcasted_iota(jnp.int32, (block.shape[0], 1), 0) == number
    return jnp.sum(jnp.where(own, block[:, here].astype(jnp.float32), 0.0), axis=0, keepdims=True)
