"""Layers and what there is of each: some stand alone, the repeating period is stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.number_formats import BlockScaled, Stack
from v4_jax.outputs import Decided, Routing


def unrolled(config: Architecture) -> list[int]:
    """Layers outside the repeating period."""
    period = config.period
    return [i for i in range(config.num_hidden_layers) if not period.start <= i < period.stop]


def role_index(config: Architecture, layer: int) -> int:
    """A layer's number among those of its attention role."""
    roles = [roles.attention for roles in config.layers]
    return roles[:layer].count(roles[layer])


def replayed(config: Architecture, routing: Routing | None, layers: Sequence[int]) -> Routing:
    """The decisions to replay of layers with the same roles, stacked again; empty without any."""
    if routing is None:
        return Routing()
    csa = config.layers[layers[0]].attention == "csa"
    indices = jnp.asarray([role_index(config, i) for i in layers])
    return Routing(
        None if routing.experts is None else routing.experts[jnp.asarray(layers)],
        routing.entries[indices] if csa and routing.entries is not None else None,
    )


def stacked(decided: Sequence[Decided]) -> Decided:
    """What layers decided, in order, with a layer axis: of those that have each field."""

    def stack(*values: Array | None) -> Array | None:
        present = [value for value in values if value is not None]
        return jnp.stack(present) if present else None

    return jax.tree.map(stack, *decided, is_leaf=lambda node: node is None)


class Cut(struct.PyTreeNode):
    """A layer's array that was cut out of the stack of all layers, in which a kernel reads it instead.

    To cut it out takes an operation for each array and layer, which the compiler leaves out where nobody uses `value`.

    Attributes:
      value: [...] the array.
      stack: [layers, ...] those of all layers.
      layer: int32 number of the layer among them.
    """

    value: Any
    stack: Any
    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's array."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """Its dtype."""
        return self.value.dtype


def uncut(tree: Any) -> Any:
    """The tree with plain arrays in place of those that know where they were cut out."""
    return jax.tree.map(lambda x: x.value if isinstance(x, Cut) else x, tree, is_leaf=lambda x: isinstance(x, Cut))


def stack_of(x: Array | Cut) -> tuple[Array, Any]:
    """An array as one of the stack [layers, ...] of all layers, and its number there."""
    return (x.stack, x.layer) if isinstance(x, Cut) else (x[None], 0)


def one_layer(weights: Sequence[Any]) -> Any:
    """The number, in the stacks of all layers, of the layer that all these weights are of; 0 where they stand alone.

    A kernel that reads several weights of a layer takes it once: a second scalar takes longer to come than to be used.

    Raises:
      ValueError: they are not of one layer, for their stacks have different layers, or some have none.
    """
    stacks = [weight.stack if isinstance(weight, Cut | BlockScaled) else None for weight in weights]
    counts = {None if stack is None else jax.tree.leaves(stack)[0].shape[0] for stack in stacks}
    if len(counts) > 1:
        raise ValueError(f"weights of one layer lie in stacks of {sorted(map(str, counts))} layers: expected the same")
    first = next(iter(weights), None)
    if not isinstance(first, Cut | BlockScaled) or first.stack is None:
        return 0
    return first.layer if isinstance(first, Cut) else first.stack.layer


def in_stack(values: Any, stacks: Any, layer: Any) -> Any:
    """A layer's parameters, knowing where in the stacks of all layers they lie, but for the matrices of experts.

    Args:
      values: tree of the layer's parameters, as cut out of the stacks.
      stacks: the same tree with a layer axis in front.
      layer: int32 number of the layer in the stacks.
    """

    def place(value: Any, stack: Any) -> Any:
        if not isinstance(value, BlockScaled):
            return Cut(value, stack, layer)
        return value.replace(stack=Stack(stack.codes, stack.scales, layer)) if value.ndim == 2 else value

    return jax.tree.map(place, values, stacks, is_leaf=lambda node: isinstance(node, BlockScaled))


def by_layer(config: Architecture, values: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Values of all layers, arranged as parameters are.

    Args:
      config: the architecture.
      values: [layers, ...] array, with the MTP block's as the last where there is one.

    Returns:
      Pairs of the path of a layer's parameters in the tree, or of one place of the repeating period, and its value; in
      the period they are stacked.
    """
    period = config.period
    found: list[tuple[tuple[str, ...], Any]] = [((f"layer_{i}",), values[i]) for i in unrolled(config)]
    if period.repeats:
        for place in range(period.length):
            found.append((("period", f"block_{place}"), values[period.start + place : period.stop : period.length]))
    if config.num_nextn_predict_layers:
        found.append((("mtp",), values[-1]))
    return found
