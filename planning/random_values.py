"""Random weights and caches in the formats in which real ones lie, made where they lie.

A benchmark of a model of hundreds of gigabytes has nowhere to keep drafts of its weights: every number is a function of
its place in its array, and each device computes its own straight into the format that it holds.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.cache.rows import StoredRows
from v4_jax.number_formats import E2M1_MAX, E4M3, E4M3_MAX, BlockScaled, power_of_two_scale, saturate
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import Parameter, is_parameter, normal


def uniform(shape: tuple[int, ...], seed: int) -> Array:
    """Numbers [*shape] float32 in [-1, 1): a hash of seed and place, which the compiler fuses into whatever uses them.

    Args:
      shape: sizes.
      seed: arrays of different seeds have nothing in common.
    """
    bits = jnp.full(shape, np.uint32(seed * 0x9E3779B1 & 0xFFFFFFFF))
    for axis in range(len(shape)):
        bits = _mixed(bits ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis))
    return (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1


def _mixed(bits: Array) -> Array:
    """Every bit of the result depends on every bit of [...] uint32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return bits ^ (bits >> 16)


def random_weights(config: Architecture, shapes: Any) -> Any:
    """Weights of a fresh model: uniform with the initialisers' deviation; what is not drawn at random, as it begins.

    Args:
      config: the architecture.
      shapes: their shapes, dtypes and places: a tree of `jax.ShapeDtypeStruct` like the parameters, and `BlockScaled`
        of such.
    """
    declared = jax.tree.leaves(declarations(config), is_leaf=is_parameter)
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, BlockScaled))

    def draw() -> list[Any]:
        pairs = enumerate(zip(declared, leaves, strict=True), start=1)
        return [_weight(config, parameter, shape, seed) for seed, (parameter, shape) in pairs]

    return jax.tree.unflatten(tree, _placed(draw, leaves))


def random_cache(shapes: Any) -> Any:
    """A cache of random keys and entries; its lengths are 0.

    Args:
      shapes: from `v4_jax.cache.cache.cache_shapes`.
    """

    def fill(rows: StoredRows, seed: int) -> StoredRows:
        return rows.replace(arrays=rows.encode(uniform((*rows.shape, rows.channels), seed)))

    def draw() -> Any:
        cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        entries, rings = (
            {role: fill(rows, first + number) for number, (role, rows) in enumerate(held.items())}
            for first, held in ((1001, cache.entries), (2001, cache.rings))
        )
        return cache.replace(entries=entries, rings=rings)

    return _placed(draw, shapes)


def _weight(config: Architecture, parameter: Parameter, shape: Any, seed: int) -> Any:
    if parameter.init is not normal(config):
        return parameter.fresh(jax.random.key(seed)).astype(shape.dtype)
    most = config.initializer_range * 3**0.5
    if not isinstance(shape, BlockScaled):
        return (uniform(shape.shape, seed) * most).astype(shape.dtype)
    largest = E4M3_MAX if shape.codes.dtype == E4M3 else E2M1_MAX
    codes = saturate(uniform(shape.shape, seed) * largest, shape.codes.dtype)
    scale = power_of_two_scale(jnp.float32(most), largest, 0.0)
    return shape.replace(codes=codes, scales=jnp.full(shape.scales.shape, scale).astype(shape.scales.dtype))


def _placed(draw: Any, shapes: Any) -> Any:
    return jax.jit(draw, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))()
