"""Where things lie: a mesh with its rules for one job, what splits evenly over it, and which meshes would do."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from v4_jax.cache.cache import Cache, CacheDtype, cache_shapes, init_cache
from v4_jax.cache.entries import PAGE
from v4_jax.config import Config
from v4_jax.number_formats import bytes_of, layout
from v4_jax.on_mesh import UNIT, check_rows
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import is_parameter, named
from v4_jax.sharding.axes import Rules, ShardingError, resolve, sharding, shards_of
from v4_jax.sharding.mesh import abstract_mesh, format_mesh, mesh_shapes
from v4_jax.sharding.split import Split


class Place(NamedTuple):
    """Where a job runs: a mesh and the rules for it, or the default device.

    Attributes:
      mesh: the devices; None is the default device.
      rules: which mesh axes split which logical axes, or the name of a preset.
    """

    mesh: Mesh | None = None
    rules: Rules | str | None = None

    def cache(
        self, config: Config, batch: int, max_length: int, dtype: CacheDtype, *, pages: int | None = None
    ) -> Cache:
        """An empty cache there."""
        return init_cache(config, batch, max_length, dtype=dtype, pages=pages, mesh=self.mesh, rules=self.rules)

    def cache_shapes(
        self, config: Config, batch: int, max_length: int, dtype: CacheDtype, *, pages: int | None = None
    ) -> Cache:
        """The shapes of `cache` and where they lie, to compile for."""
        return cache_shapes(config, batch, max_length, dtype=dtype, pages=pages, mesh=self.mesh, rules=self.rules)

    def check(self, batch: int) -> None:
        """Checks that rows split evenly.

        Raises:
          ShardingError: they do not.
        """
        if self.mesh is not None:
            check_rows(self.mesh, resolve(self.rules), batch)

    @property
    def row_shards(self) -> int:
        """Shards that rows are split into: their number is a multiple of it."""
        return shards_of("batch", resolve(self.rules), self.mesh)

    @property
    def page(self) -> int:
        """Tokens of a page of the cache: `PAGE` for every device that a row's entries are spread over."""
        return PAGE * shards_of("entries", resolve(self.rules), self.mesh)

    def pages(self, tokens: int) -> int:
        """Pages that so many tokens of a row fill or begin."""
        return -(-tokens // self.page)

    @property
    def platform(self) -> str:
        """What the devices are: "cpu", "tpu", ..."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

    def chunk(self, size: int) -> int:
        """The smallest legal chunk of at least `size` tokens: short ones of any size are on all devices."""
        if self.mesh is None:
            return size
        whole = Split.whole(self.mesh, resolve(self.rules), UNIT)
        return size if size < whole else -(-size // whole) * whole

    @property
    def replicated(self) -> NamedSharding | None:
        """On every device; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def shape(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An input of a program that every device gets whole."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.replicated)

    def shapes(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, as inputs of a program that every device gets whole."""
        return jax.tree.map(lambda x: self.shape(x.shape, x.dtype), jax.eval_shape(make))

    def put(self, tree: Any) -> Any:
        """Host arrays, equal in all processes, to every device."""
        return jax.device_put(tree, self.replicated, may_alias=False)

    def put_rows(self, array: Any) -> Array:
        """A host array [B, ...], equal in all processes, to the devices of its rows."""
        table = resolve(self.rules)
        where = None if self.mesh is None else sharding(self.mesh, ("batch",), array.shape[:1], table)
        return jax.device_put(array, where, may_alias=False)

    def put_tokens(self, array: Any, axis: int = 0) -> Array:
        """A host array, equal in all processes, whose axes from `axis` on are [B, S, ...], to its tokens' devices."""
        where = None
        if self.mesh is not None:
            split = Split.on(self.mesh, resolve(self.rules), array.shape[axis + 1], UNIT)
            axes = (tuple(axes) or None for axes in (split.axes("batch"), split.sequence))
            where = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, *axes))
        return jax.device_put(array, where, may_alias=False)

    def keep(self, tree: Any) -> Any:
        """Within a program: makes arrays whole on every device, as for the last token's logits before sampling."""
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, self.replicated)


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of shapes on each device, without padding; those that lie nowhere in particular are whole."""

    def part(x: Any) -> Any:
        return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)

    return sum(bytes_of(jax.ShapeDtypeStruct(part(x), x.dtype)) for x in jax.tree.leaves(tree))


def check_mesh(
    config: Config,
    mesh: Mesh | AbstractMesh,
    rules: Rules | str | None,
    *,
    batch: int = 1,
    length: int = 1,
    native: bool = True,
) -> None:
    """Checks that the model, `batch` rows and chunks of `length` tokens per row split evenly over a mesh.

    Args:
      config: the architecture.
      mesh: the devices, or a mesh of none in particular.
      rules: which mesh axes split which logical axes.
      batch: rows.
      length: tokens per row.
      native: whether weights are in their released formats, whose blocks of one scale are not split.

    Raises:
      ShardingError: they do not; the message says what does not, and what would.
    """
    table = resolve(rules)
    for axes, shape, multiples, name in _distinct(config, native):
        sharding(mesh, axes, shape, table, multiples=multiples, name=name)
    check_rows(mesh, table, batch)
    Split.on(mesh, table, length, UNIT)


def legal_meshes(
    config: Config, devices: int, rules: Rules | str | None, *, batch: int = 1, length: int = 1, native: bool = True
) -> list[dict[str, int]]:
    """All mesh shapes of so many devices that pass `check_mesh`."""
    found = []
    for sizes in mesh_shapes(devices):
        try:
            check_mesh(config, abstract_mesh(sizes), rules, batch=batch, length=length, native=native)
        except ShardingError:
            continue
        found.append(sizes)
    return found


def alternatives(config: Config, devices: int, rules: Rules | str | None, *, most: int = 12, **call: Any) -> str:
    """The legal meshes as an error's last clause: at most `most` of them by name; `call` as in `legal_meshes`."""
    legal = [format_mesh(sizes) for sizes in legal_meshes(config, devices, rules, **call)]
    if not legal:
        return f"no mesh of {devices} devices is legal"
    more = f" and {len(legal) - most} more" if len(legal) > most else ""
    return f"legal meshes of {devices} device{'' if devices == 1 else 's'} are {'; '.join(legal[:most])}{more}"


@functools.lru_cache(maxsize=32)
def _distinct(config: Config, native: bool) -> tuple[tuple[Any, ...], ...]:
    """(axes, shape, multiples, name) of every parameter, leaving out those that others stand for.

    A shard holds whole heads and groups and, in the released formats, whole blocks of one scale.
    """
    whole = {"heads": config.num_attention_heads, "index_heads": config.index_n_heads, "o_groups": config.o_groups}
    found: dict[Any, str] = {}
    for path, parameter in jax.tree_util.tree_leaves_with_path(declarations(config), is_leaf=is_parameter):
        held = layout(parameter.storage, config.expert_dtype) if native else None
        units = (1,) * len(parameter.shape) + (held.block if held else (1, 1))
        multiples = tuple(
            math.lcm(unit, size // whole.get(name, size))
            for unit, size, name in zip(units[-len(parameter.shape) :], parameter.shape, parameter.axes, strict=True)
        )
        found.setdefault((parameter.axes, parameter.shape, multiples), named(path))
    return tuple((*key, name) for key, name in found.items())
