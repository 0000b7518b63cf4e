"""Adapters of a model: which matrices get a low-rank update, and what each of its factors is, by their declarations.

LoRA, arXiv 2106.09685. A factor is declared as its matrix is: it is stacked and split along the same axes, updated by
the same optimiser, and named after it, as PEFT does.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.draft_stages import without_stages
from v4_jax.low_rank import Adapted, factor_axes
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import Family, Parameter, is_parameter

FAMILIES: tuple[Family, ...] = typing.get_args(Family)

A, B = "lora_A", "lora_B"  # names of the factors, in the tree of adapters and on disk


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Low-rank updates of a model's matrices.

    Attributes:
      rank: of each.
      alpha: an update counts alpha / rank.
      families: which matrices have one. DSpark's stages never have.
    """

    rank: int
    alpha: float
    families: tuple[Family, ...]

    @property
    def scale(self) -> float:
        """What a product of factors counts."""
        return self.alpha / self.rank

    def declarations(self, config: Architecture) -> Any:
        """The factors: a tree like the model's, of the adapted matrices alone, each {A: Parameter, B: Parameter}."""

        def of(node: Any) -> Any:
            if is_parameter(node):
                return self._factors(node) if node.family in self.families else None
            found = {name: of(child) for name, child in node.items()}
            return {name: child for name, child in found.items() if child} or None

        return of(without_stages(declarations(config))) or {}

    def _factors(self, matrix: Parameter) -> dict[str, Parameter]:
        *lead, out, into = matrix.shape
        a_axes, b_axes = factor_axes(matrix.axes)

        def factor(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Any) -> Parameter:
            value: Any = jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)
            released = f"{matrix.released.removesuffix('.weight')}.{name}.weight"
            return dataclasses.replace(
                matrix, value=value, axes=axes, released=released, storage="f32", init=init, matrices=1, family=None
            )

        return {A: factor(A, (self.rank, into), a_axes, _uniform), B: factor(B, (out, self.rank), b_axes, _zeros)}

    def onto(self, base: Any, factors: Any) -> Any:
        """A model's parameters with the updates beside them, of which nothing is computed.

        Args:
          base: the parameters.
          factors: the tree of `declarations`, unboxed.
        """
        if not isinstance(base, dict):
            return Adapted(base, factors[A], factors[B], self.scale)
        return {name: self.onto(node, factors[name]) if name in factors else node for name, node in base.items()}


def _uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """As LoRA begins: what linear layers of so many inputs are drawn from."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _zeros(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    del key
    return jnp.zeros(shape, dtype)
