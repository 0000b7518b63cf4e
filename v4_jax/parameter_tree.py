"""What every parameter of a configuration is: declared by the layers, read here from a model that is never run.

Initialisation, sharding, the optimiser split, conversion in both directions and memory reports read the declarations.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from v4_jax.architecture import Architecture
from v4_jax.parameters import declared, is_parameter, places
from v4_jax.sharding.axes import Rules, resolve
from v4_jax.transformer import Transformer


def declarations(config: Architecture) -> Any:
    """The model's parameter tree with a `Parameter` holding a `jax.ShapeDtypeStruct` at every leaf."""
    return declared(Transformer(config, policy="float32"))


def placements(config: Architecture, mesh: Mesh | AbstractMesh, rules: Rules | str | None) -> Any:
    """Where every parameter lies: a tree of `NamedSharding` like the parameters.

    Raises:
      ShardingError: a parameter that does not split evenly; the message lists the legal sizes.
    """
    return places(declarations(config), mesh, resolve(rules))


def init(config: Architecture, key: Array, *, mesh: Mesh | None = None, rules: Rules | str | None = None) -> Any:
    """Fresh float32 parameters (int32 for the hash tables) from the declarations: an unboxed tree.

    Args:
      config: the architecture.
      key: a random key; the same key gives the same parameters on any mesh.
      mesh: devices to place them on, each its own shards; None is the default device.
      rules: which mesh axes split which logical axes, or the name of a preset.

    Raises:
      ShardingError: a parameter that does not split evenly.
    """
    return drawn(declarations(config), key, mesh=mesh, rules=rules)


def drawn(declared: Any, key: Array, *, mesh: Mesh | None = None, rules: Rules | str | None = None) -> Any:
    """Fresh values of a tree of declarations, unboxed; see `init`."""
    leaves, tree = jax.tree.flatten(declared, is_leaf=is_parameter)
    where = None if mesh is None else jax.tree.leaves(places(declared, mesh, resolve(rules)))

    @functools.partial(jax.jit, out_shardings=where)
    def draw(key: Array) -> list[Array]:
        keys = jax.random.split(key, len(leaves))
        return [leaf.fresh(key) for leaf, key in zip(leaves, keys, strict=True)]

    return jax.tree.unflatten(tree, draw(key))
