"""One declaration per parameter, made where the parameter is used; everything else about it is derived from there.

A module calls `self.declare(...)`. The declaration travels through Flax's init, `nn.scan` and `jax.eval_shape` as a
metadata box, so that `declarations(config)` returns the whole model's without allocating anything. Initialisation,
sharding, the optimiser split, conversion in both directions and memory reports read it; nothing matches on names.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from v4_jax.architecture import Architecture, Period
from v4_jax.layer_stack import Cut, uncut
from v4_jax.low_rank import Adapted, factor_axes
from v4_jax.number_formats import BlockScaled
from v4_jax.sharding.axes import Rules, sharding
from v4_jax.sharding.split import UNSPLIT, Split

# Who updates a parameter: the two optimisers of the technical report (section 2.4), the rule that balances the experts'
# load ("bias", the router's), or nobody ("frozen", the hash table).
Group = Literal["muon", "adamw", "bias", "frozen"]

# Which loss trains a parameter: the model's, or the indexer's own.
Loss = Literal["model", "indexer"]

# How the release stores it: "fp8" (E4M3 in 128x128 blocks), "expert" (as `Architecture.expert_dtype` says), or plain.
Storage = Literal["fp8", "expert", "bf16", "f32", "i64"]

# Which matrices it is one of: those of a family are adapted together (`v4_jax.adapters`).
Family = Literal["attention", "compressor", "indexer", "router", "shared", "experts", "mtp"]

LAYERS, EXPERTS = "layers", "experts"


Initializer = Callable[[Array, tuple[int, ...], Any], Array]


@functools.cache  # declarations compare initialisers by identity
def normal(config: Architecture) -> Initializer:
    """Normal with the configured standard deviation."""
    return nn.initializers.normal(config.initializer_range)


class Parameter(struct.PyTreeNode, nn.meta.AxisMetadata[Any]):
    """A parameter's value boxed with its declaration.

    Attributes:
      value: the array (or its shape, under `jax.eval_shape`).
      axes: one logical axis name per dimension, None where nothing is ever split; see `v4_jax.sharding.axes`.
      group: which optimiser updates it.
      released: name in the released checkpoint; a format string over `{expert}`, the index along the "experts" axis,
        and `{layers[p]}`, the number of the layer at place p of a repeat of the period, on the "layers" axis.
      storage: number format in the released checkpoint.
      init: initialiser of one layer's value.
      matrices: independent matrices of equal size that lie one below the other in a [out, in] weight.
      loss: which loss trains it.
      period: the layers that the "layers" axis stands for; None without one.
      family: of a [out, in] matrix that `layers.linear` multiplies with, which ones it belongs to; None for all else.
    """

    value: Any
    axes: tuple[str | None, ...] = struct.field(pytree_node=False)
    group: Group = struct.field(pytree_node=False)
    released: str = struct.field(pytree_node=False)
    storage: Storage = struct.field(pytree_node=False)
    init: Initializer = struct.field(pytree_node=False)
    matrices: int = struct.field(pytree_node=False, default=1)
    loss: Loss = struct.field(pytree_node=False, default="model")
    period: Period | None = struct.field(pytree_node=False, default=None)
    family: Family | None = struct.field(pytree_node=False, default=None)

    def unbox(self) -> Any:
        """The value alone."""
        return self.value

    def replace_boxed(self, val: Any) -> Parameter:
        """The same declaration with another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Parameter:
        """Called by `nn.scan` when it stacks layers."""
        axes = list(self.axes)
        axes.insert(index, LAYERS)
        return self.replace(axes=tuple(axes), period=params[LAYERS])

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Parameter:
        """Called by `nn.scan` when it cuts one layer out."""
        del params
        axes = list(self.axes)
        del axes[index]
        return self.replace(axes=tuple(axes), period=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value, stacked axes included."""
        return self.value.shape

    def fresh(self, key: Array) -> Array:
        """A freshly initialised value."""
        if self.period is None:
            return self.init(key, self.shape, self.value.dtype)
        keys = jax.random.split(key, self.period.repeats)
        return jnp.stack([self.init(key, self.shape[1:], self.value.dtype) for key in keys])

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yields (index into the stacked axes, released name) of each released tensor that makes up this parameter."""
        repeats = range(self.period.repeats) if self.period else (None,)
        experts = range(self.shape[self.axes.index(EXPERTS)]) if "{expert}" in self.released else (None,)
        for repeat, expert in itertools.product(repeats, experts):
            layers = self.period.layers(repeat) if self.period and repeat is not None else ()
            index = tuple(i for i in (repeat, expert) if i is not None)
            yield index, self.released.format(layers=layers, expert=expert)


def is_parameter(node: Any) -> bool:
    """Whether a tree node is a declared parameter: the `is_leaf` of tree operations on declarations."""
    return isinstance(node, Parameter)


class Module(nn.Module, kw_only=True):
    """A Linen module whose parameters are declared for the release, the optimiser and the mesh at once.

    Attributes:
      prefix: released name of the module, ending in a dot (`layers.3.attn.`, `layers.{layers[0]}.ffn.`).
      split: how a mesh splits this call's tokens and the parameters; by default not at all.
      loss: which loss trains the module's parameters.
    """

    prefix: str = ""
    split: Split = UNSPLIT
    loss: Loss = "model"

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        released: str,
        storage: Storage,
        group: Group,
        init: Initializer,
        dtype: Any = jnp.float32,
        gather: bool = True,
        matrices: int = 1,
        stacked: bool = False,
        family: Family | None = None,
    ) -> Any:
        """Declares a parameter and returns its value: an array, or a `BlockScaled` or `Adapted` where that is given.

        On a mesh the value is this device's part of it, along the logical axes that `Split.shared` names; along all
        others it is whole.

        Args:
          name: leaf name in the parameter tree.
          shape: shape of one layer's parameter.
          axes: logical axis of each dimension.
          released: name in the released checkpoint after `self.prefix`.
          storage: its number format there.
          group: its optimiser group.
          init: initialiser for fresh models.
          dtype: dtype of a fresh parameter.
          gather: False returns the device's shard as it is stored.
          matrices: see `Parameter`.
          stacked: whether the user takes a `Cut`, which an array is where layers are stacked.
          family: see `Parameter`.

        Raises:
          ValueError: a supplied value has another shape than declared.
        """
        if len(axes) != len(shape):
            raise ValueError(f"{self.prefix}{released}: {len(axes)} axes for a shape of {len(shape)} dimensions")

        stored = self.split.stored(shape, axes)

        def boxed(key: Array) -> Parameter:
            value = init(key, stored, dtype)
            return Parameter(
                value, axes, group, self.prefix + released, storage, init, matrices, self.loss, family=family
            )

        value: Any = self.param(name, boxed)
        if tuple(value.shape) != stored:
            raise ValueError(
                f"{self.prefix}{released}: the given value has shape {tuple(value.shape)}, expected {stored}"
            )
        moved = gather and self.split.used(shape, axes) != stored  # gathered, it lies elsewhere
        if isinstance(value, Adapted):
            base = _at_hand(value.base, moved=moved, stacked=stacked)
            value = Adapted(base, *uncut((value.a, value.b)), value.scale)
        else:
            value = _at_hand(value, moved=moved, stacked=stacked)
        return gathered(self.split, value, axes) if moved else value

    def linear(
        self,
        name: str,
        shape: tuple[int, int],
        axes: tuple[str | None, str | None],
        *,
        config: Architecture,
        storage: Storage = "fp8",
        released: str | None = None,
        matrices: int = 1,
        family: Family | None = None,
    ) -> Any:
        """Declares a [out, in] matrix, or several one below the other, updated by Muon."""
        return self.declare(
            name,
            shape,
            axes,
            released=(released or name) + ".weight",
            storage=storage,
            group="muon",
            init=normal(config),
            matrices=matrices,
            stacked=True,
            family=family,
        )

    def norm(self, name: str, size: int, *, released: str | None = None) -> Any:
        """Declares an RMSNorm weight [size]."""
        return self.declare(
            name,
            (size,),
            (None,),
            released=(released or name) + ".weight",
            storage="bf16",
            group="adamw",
            init=nn.initializers.ones,
            stacked=True,
        )


def _at_hand(value: Any, *, moved: bool, stacked: bool) -> Any:
    """A value that forgets where layers are stacked, where it is to lie elsewhere or nobody would ask."""
    if isinstance(value, Cut) and (moved or not stacked):
        return value.value
    return value.replace(stack=None) if isinstance(value, BlockScaled) and moved else value


def gathered(split: Split, value: Any, axes: tuple[str | None, ...]) -> Any:
    """A parameter's value joined with those of other devices, see `Split.gather`; an update's factors as their weight.

    Args:
      split: how the mesh splits the call's tokens and the parameters.
      value: array, `BlockScaled` or `Adapted`.
      axes: logical axis of each dimension.
    """
    if not isinstance(value, Adapted):
        return split.gather(value, axes)
    a, b = map(split.gather, (value.a, value.b), factor_axes(axes))
    return Adapted(split.gather(value.base, axes), a, b, value.scale)


@functools.lru_cache(maxsize=64)
def declared(model: nn.Module) -> Any:
    """A whole model's parameter tree with a `Parameter` holding a `jax.ShapeDtypeStruct` at every leaf.

    Args:
      model: a `Transformer` that stands alone: without a mesh, parent or name.
    """
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def named(path: Any) -> str:
    """A leaf's path in the parameter tree, as messages name it: `layer_0/attn/wq_a`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def places(declared: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> Any:
    """Where every parameter lies: a tree of `NamedSharding` like the tree of declarations.

    Raises:
      ShardingError: a parameter that does not split evenly; the message lists the legal sizes.
    """

    def place(path: Any, parameter: Parameter) -> NamedSharding:
        return sharding(mesh, parameter.axes, parameter.shape, rules, name=named(path))

    return jax.tree_util.tree_map_with_path(place, declared, is_leaf=is_parameter)


def specs(declared: Any, params: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> Any:
    """Which mesh axes split the dimensions of given parameters: a tree of `PartitionSpec`s, or a prefix of theirs.

    Raises:
      ShardingError: as `places`.
    """

    def one(path: Any, parameter: Parameter, value: Any) -> Any:
        def spec(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> Any:
            return sharding(mesh, axes, shape, rules, name=named(path)).spec

        whole = spec(parameter.axes, parameter.shape)
        if not isinstance(value, Adapted):
            return whole
        a, b = factor_axes(parameter.axes)
        return Adapted(whole, spec(a, value.a.shape), spec(b, value.b.shape), value.scale)

    return jax.tree_util.tree_map_with_path(one, declared, params, is_leaf=is_parameter)


def bytes_in_memory(params: Any) -> int:
    """Bytes of a parameter tree as held, low-precision leaves included."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, BlockScaled))
    return sum(leaf.nbytes for leaf in leaves)
