"""One device's view of a mesh during one call: which axes split the tokens, and what that means for everything else.

A weight that is split over a mesh axis is either used where it lies or gathered first. It is used where it lies when
every device along that axis holds the same tokens and can do its share of the work (its heads, its experts): the
shares are then added up. Where the axis also splits the tokens, or the dimension is one that work is not shared
along, the weight is gathered for the time of its use, and in the backward pass its gradient is reduced back. One table
of rules thus serves one-token steps (tokens replicated, weights in place) and long prefills (tokens split, weights
gathered) over the same placement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from v4_jax.sharding import collectives
from v4_jax.sharding.axes import Rules, ShardingError, shards_of

# Logical axes along which a device can do its own share of the work.
SHARED_WORK = frozenset({"experts", "heads", "index_heads", "mlp", "o_groups", "sinks", "vocab"})


@dataclasses.dataclass(frozen=True)
class Split:
    """What each logical axis is split over, inside `jax.shard_map` on a mesh.

    Attributes:
      rules: which mesh axes split which logical axes.
      sizes: mesh axes with more than one device, and how many.
      long: whether this call's tokens are split along the sequence; short chunks are on all devices of the axis.
    """

    rules: Rules
    sizes: tuple[tuple[str, int], ...] = ()
    long: bool = False

    @classmethod
    def on(cls, mesh: Mesh | AbstractMesh, rules: Rules, length: int, unit: int) -> Split:
        """The split of a call with `length` tokens per row.

        Args:
          mesh: the devices.
          rules: the table.
          length: tokens per row, all devices together.
          unit: what a device's share of a long sequence must be a multiple of.

        Raises:
          ShardingError: the sequence is too long to be on all devices, and does not split evenly.
        """
        split = cls(rules, tuple((name, count) for name, count in mesh.shape.items() if count > 1))
        whole = cls.whole(mesh, rules, unit)
        if whole == unit or length < whole:
            return split
        if length % whole:
            raise ShardingError(
                f"{length} tokens do not split over {whole // unit} devices ({' x '.join(split.axes('sequence'))}) in "
                f"multiples of {unit}: expected a multiple of {whole}, or fewer than {whole} tokens"
            )
        return dataclasses.replace(split, long=True)

    @staticmethod
    def whole(mesh: Mesh | AbstractMesh, rules: Rules, unit: int) -> int:
        """The shortest sequence that is split: `unit` tokens on every device that a sequence is split over."""
        return unit * shards_of("sequence", rules, mesh)

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes of more than one device that split a logical axis."""
        if name is None or not self.sizes:
            return ()
        present = dict(self.sizes)
        return tuple(axis for axis in self.rules[name] if axis in present)

    def count(self, axes: Sequence[str]) -> int:
        """Devices along mesh axes."""
        return math.prod(dict(self.sizes)[axis] for axis in axes)

    @property
    def sequence(self) -> tuple[str, ...]:
        """Mesh axes that split this call's tokens along the sequence."""
        return self.axes("sequence") if self.long else ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """Mesh axes that split this call's tokens at all."""
        return self.axes("batch") + self.sequence

    @property
    def everywhere(self) -> tuple[str, ...]:
        """All mesh axes."""
        return tuple(name for name, _ in self.sizes)

    @property
    def short(self) -> Split:
        """The same with the sequence on all devices, as for the last token of a long chunk."""
        return dataclasses.replace(self, long=False)

    def shared(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes along which devices with the same tokens each work on their own part of a logical axis."""
        if name not in SHARED_WORK:
            return ()
        return tuple(axis for axis in self.axes(name) if axis not in self.tokens)

    def share(self, name: str, size: int) -> int:
        """This device's part of `size` elements of a logical axis that work is shared along."""
        return size // self.count(self.shared(name))

    def stored(self, shape: Sequence[int], axes: Sequence[str | None]) -> tuple[int, ...]:
        """Shape of a device's shard of a parameter."""
        return tuple(n // self.count(self.axes(name)) for n, name in zip(shape, axes, strict=True))

    def used(self, shape: Sequence[int], axes: Sequence[str | None]) -> tuple[int, ...]:
        """Shape of a parameter as `gather` returns it."""
        return tuple(n // self.count(self.shared(name)) for n, name in zip(shape, axes, strict=True))

    def gather(self, value: Any, axes: Sequence[str | None]) -> Any:
        """A parameter's shard joined with those of the devices that work on other tokens or cannot share the work.

        Args:
          value: array, or a pytree of arrays with the same axes (codes and scales).
          axes: logical axis of each dimension.
        """
        for dimension, name in enumerate(axes):
            away = tuple(axis for axis in self.axes(name) if axis not in self.shared(name))
            if not away:
                continue
            if away != self.axes(name)[-len(away) :]:
                # Joining an outer axis across an inner one that stays split would interleave the parts.
                raise ShardingError(
                    f"{name!r} is split over {self.axes(name)}, of which {away} also split the tokens: list those last"
                )
            value = jax.tree.map(lambda x, away=away, d=dimension: _gather_bits(x, away, d), value)
        return value


UNSPLIT = Split(Rules({}))


def _gather_bits(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """`all_gather` of any dtype: not every backend communicates 8-bit floats."""
    if x.dtype.itemsize > 1 or jnp.issubdtype(x.dtype, jnp.integer):
        return collectives.all_gather(x, axes, dimension)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return jax.lax.bitcast_convert_type(collectives.all_gather(bits, axes, dimension), x.dtype)
