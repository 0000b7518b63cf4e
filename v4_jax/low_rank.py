"""A frozen weight with a low-rank update beside it (LoRA, arXiv 2106.09685), as one node of the parameter tree.

The weight stays in the format that it is held in: its product and those of the update are added up, so that no copy of
it is made, in training either. What is trained are the two factors alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from v4_jax.number_formats import BlockScaled, Weight, dequantise

Axes = tuple[str | None, ...]


class Adapted(struct.PyTreeNode):
    """A weight that stands for `base + scale * b @ a`, wherever an array or a `BlockScaled` would.

    Leading axes (layers, experts) are shared.

    Attributes:
      base: [..., out, in], which has no gradient.
      a: [..., rank, in].
      b: [..., out, rank]; zeros at first.
      scale: alpha / rank.
    """

    base: Any
    a: Any
    b: Any
    scale: float = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it stands for."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Dimensions of the weight that it stands for."""
        return self.base.ndim


def is_adapted(node: Any) -> bool:
    """Whether a tree node is a weight with an update: an `is_leaf` of tree operations on parameters."""
    return isinstance(node, Adapted)


def factor_axes(axes: Axes) -> tuple[Axes, Axes]:
    """Logical axes of the factors a and b, from those of their weight: a rank is never split."""
    *lead, out, into = axes
    return (*lead, None, into), (*lead, out, None)


def base_of(weight: Any) -> Weight:
    """The weight without its update."""
    return weight.base if isinstance(weight, Adapted) else weight


def merged(weight: Adapted) -> Array:
    """What the weight stands for, as one float32 array."""
    update = jnp.matmul(weight.b.astype(jnp.float32), weight.a.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return dequantise(weight.base, jnp.float32) + weight.scale * update


class Parts(NamedTuple):
    """Some weights, told apart by whether they have gradients, weight by weight.

    Attributes:
      trained: arrays that have: weights in floats, and the factors of updates.
      frozen: what has not: weights in blocks, and those with an update beside them; None of all others.
      joined: puts such lists together again. Without what is frozen there is None in its place, as gradients have it.
    """

    trained: list[list[Array]]
    frozen: list[Any]
    joined: Callable[..., Any]


def parts_of(weights: Any) -> Parts:
    """The parts of a tree of arrays, `BlockScaled` and `Adapted`."""
    nodes, tree = jax.tree.flatten(weights, is_leaf=lambda node: isinstance(node, Adapted | BlockScaled))

    def joined(trained: list[list[Array]], frozen: list[Any] | None = None) -> Any:
        made = []
        for node, floats, fixed in zip(nodes, trained, frozen or [None] * len(nodes), strict=True):
            adapted = isinstance(node, Adapted)
            made.append(node.replace(base=fixed, a=floats[0], b=floats[1]) if adapted else [*floats, fixed][0])
        return jax.tree.unflatten(tree, made)

    trained = [
        [node.a, node.b] if isinstance(node, Adapted) else [] if isinstance(node, BlockScaled) else [node]
        for node in nodes
    ]
    frozen = [
        node.base if isinstance(node, Adapted) else node if isinstance(node, BlockScaled) else None for node in nodes
    ]
    return Parts(trained, frozen, joined)
