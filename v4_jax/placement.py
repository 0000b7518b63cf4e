"""The model on a mesh: which part of each argument a device gets, and the one `jax.shard_map` that runs a call.

Inside, every layer sees its device's shards and writes its own communication (`sharding`); nothing is left for the
compiler to partition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v4_jax.cache.cache import PAGE, Cache, CacheDtype, cache_shapes, cache_specs, init_cache
from v4_jax.config import RATIO_OF_ROLE, Config
from v4_jax.number_formats import FP4_BLOCK, FP8_BLOCK, bytes_of
from v4_jax.outputs import Logits, Output, Routing
from v4_jax.parameters import Parameter, declarations, is_parameter
from v4_jax.sharding.axes import Rules, ShardingError, resolve, sharding, shards_of
from v4_jax.sharding.mesh import abstract_mesh, format_mesh, mesh_shapes
from v4_jax.sharding.split import Split

if TYPE_CHECKING:
    from v4_jax.transformer import Transformer

UNIT = RATIO_OF_ROLE["hca"]  # a device's share of a long sequence is a multiple of the longest compression block


def placements(config: Config, mesh: Mesh | AbstractMesh, rules: Rules | str | None) -> Any:
    """Where every parameter lies: a tree of `NamedSharding` like the parameters.

    Raises:
      ShardingError: a parameter that does not split evenly; the message lists the legal sizes.
    """
    table = resolve(rules)

    def place(path: Any, parameter: Parameter) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return sharding(mesh, parameter.axes, parameter.shape, table, name=name)

    return jax.tree_util.tree_map_with_path(place, declarations(config), is_leaf=is_parameter)


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
            _check_rows(self.mesh, resolve(self.rules), batch)

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
        return None if self.mesh is None else NamedSharding(self.mesh, P())

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
    _check_rows(mesh, table, batch)
    Split.on(mesh, table, length, UNIT)


def _check_rows(mesh: Mesh | AbstractMesh, rules: Rules, batch: int) -> None:
    sharding(mesh, ("batch",), (batch,), rules, name="the batch")


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
    return f"legal meshes of {devices} devices are {'; '.join(legal[:most])}{more}"


@functools.lru_cache(maxsize=32)
def _distinct(config: Config, native: bool) -> tuple[tuple[Any, ...], ...]:
    """(axes, shape, multiples, name) of every parameter, leaving out those that others stand for.

    A shard holds whole heads and groups and, in the released formats, whole blocks of one scale.
    """
    block = {"fp8": FP8_BLOCK, "expert": FP8_BLOCK if config.expert_dtype == "fp8" else FP4_BLOCK} if native else {}
    whole = {"heads": config.num_attention_heads, "index_heads": config.index_n_heads, "o_groups": config.o_groups}
    found: dict[Any, str] = {}
    for path, parameter in jax.tree_util.tree_leaves_with_path(declarations(config), is_leaf=is_parameter):
        units = (1,) * len(parameter.shape) + block.get(parameter.storage, (1, 1))
        multiples = tuple(
            math.lcm(unit, size // whole.get(name, size))
            for unit, size, name in zip(units[-len(parameter.shape) :], parameter.shape, parameter.axes, strict=True)
        )
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.setdefault((parameter.axes, parameter.shape, multiples), name)
    return tuple((*key, name) for key, name in found.items())


def on_mesh(
    model: Transformer, call: Callable[..., Output], arguments: dict[str, Any], logits: Logits, returns_routing: bool
) -> Output:
    """Runs `call(model, **arguments)` on every device of the model's mesh with that device's shards.

    Args:
      model: a bound model with a mesh.
      call: one of its methods.
      arguments: arrays of the whole mesh, by name; None is left out.
      logits: which logits the call returns.
      returns_routing: whether it returns routing decisions.

    Raises:
      ShardingError: something does not split evenly over the mesh.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    mesh, table, split, local = _local(model, *given["tokens" if "tokens" in given else "next_tokens"].shape)

    batch, sequence = (tuple(axes) or None for axes in (split.axes("batch"), split.sequence))
    tokens, decisions, row = P(batch, sequence), P(None, batch, sequence), P(batch)
    specs: dict[str, Any] = {name: tokens for name in ("tokens", "streams", "next_tokens")}
    specs |= {name: row for name in ("positions", "segment_ids", "lengths", "sealed")}
    specs |= {"routing": decisions, "cache": cache_specs(given["cache"], table, mesh) if "cache" in given else None}
    vocab = (split.short if logits == "last" else split).shared("vocab") or None
    returned = {"logits": P(batch, None if logits == "last" else sequence, vocab), "cache": specs["cache"]}
    returned |= {"streams": tokens, "routing": None}
    if returns_routing:
        decided: dict[str, Any] = dict.fromkeys(("experts", "entries", "affinities", "indexer_loss"), decisions)
        returned["routing"] = Routing(**decided | {"load": P(), "balance": P(None, batch)})

    def run(params: Any, given: dict[str, Any]) -> Any:
        return local.apply({"params": params}, **given, method=call)

    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(_param_specs(model), {name: specs[name] for name in given}),
        out_specs=Output(**returned),
        check_vma=False,
    )
    return mapped(nn.meta.unbox(model.variables["params"]), given)


def loss_on_mesh(model: Transformer, call: Callable[..., Array], streams: Array, *arrays: Array) -> Array:
    """Runs `call(model, streams, *arrays)`, arrays [B, S] and a number, on every device of the mesh, as `on_mesh` does.

    Raises:
      ShardingError: something does not split evenly over the mesh.
    """
    mesh, _, split, local = _local(model, *streams.shape[:2])
    tokens = P(tuple(split.axes("batch")) or None, tuple(split.sequence) or None)

    def run(params: Any, *arrays: Array) -> Any:
        return local.apply({"params": params}, *arrays, method=call)

    specs = (_param_specs(model), tokens, *(tokens for _ in arrays))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return mapped(nn.meta.unbox(model.variables["params"]), streams, *arrays)


def _local(model: Transformer, rows: int, length: int) -> tuple[Mesh, Rules, Split, Transformer]:
    """The mesh and rules of a model, how they split a call, and the model that runs on one of its devices."""
    mesh, table = model.mesh, resolve(model.rules)
    assert mesh is not None
    _check_rows(mesh, table, rows)
    split = Split.on(mesh, table, length, UNIT)
    return mesh, table, split, model.clone(parent=None, name=None, mesh=None, rules=None, split=split)


def _param_specs(model: Transformer) -> Any:
    assert model.mesh is not None
    return jax.tree.map(lambda place: place.spec, placements(model.config, model.mesh, model.rules))
