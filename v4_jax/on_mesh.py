"""The model on a mesh: which part of each argument a device gets, and the one `jax.shard_map` that runs a call.

Inside, every layer sees its device's shards and writes its own communication (`sharding`); nothing is left for the
compiler to partition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from v4_jax.architecture import RATIO_OF_ROLE, Architecture
from v4_jax.cache.cache import cache_specs
from v4_jax.outputs import Logits, Output, Routing, RoutingStatistics
from v4_jax.parameters import declared, specs
from v4_jax.sharding.axes import Rules, resolve, sharding
from v4_jax.sharding.split import Split

UNIT = RATIO_OF_ROLE["hca"]  # a device's share of a long sequence is a multiple of the longest compression block


class MeshModel(Protocol):
    """What is asked of a model here: a Linen module that is bound, and says which mesh it runs on."""

    config: Architecture
    mesh: Mesh | None
    rules: str | Rules | None

    @property
    def variables(self) -> Any:
        """Its parameters."""

    def clone(self, **fields: Any) -> Any:
        """The module with other fields, unbound."""


def check_rows(mesh: Mesh | AbstractMesh, rules: Rules, batch: int) -> None:
    """Checks that `batch` rows split evenly over a mesh.

    Raises:
      ShardingError: they do not.
    """
    sharding(mesh, ("batch",), (batch,), rules, name="the batch")


def on_mesh(
    model: MeshModel,
    call: Callable[..., Output],
    arguments: dict[str, Any],
    logits: Logits,
    returns_routing: bool,
    returns_taps: bool = False,
) -> Output:
    """Runs `call(model, **arguments)` on every device of the model's mesh with that device's shards.

    Args:
      model: a bound model with a mesh.
      call: one of its methods.
      arguments: arrays of the whole mesh, by name; None is left out.
      logits: which logits the call returns.
      returns_routing: whether it returns routing decisions.
      returns_taps: whether it returns taps.

    Raises:
      ShardingError: something does not split evenly over the mesh.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    on = _OnMesh.of(model, *given["tokens" if "tokens" in given else "next_tokens"].shape)
    split, cache = on.split, given.get("cache")

    batch, sequence = (tuple(axes) or None for axes in (split.axes("batch"), split.sequence))
    tokens, decisions, row = P(batch, sequence), P(None, batch, sequence), P(batch)
    specs: dict[str, Any] = {name: tokens for name in ("tokens", "streams", "next_tokens")}
    specs |= {name: row for name in ("positions", "segment_ids", "lengths", "sealed")}
    specs |= {"routing": decisions, "cache": None if cache is None else cache_specs(cache, on.rules, on.mesh)}
    vocab = (split.short if logits == "last" else split).shared("vocab") or None
    output = Output(
        logits=P(batch, None if logits == "last" else sequence, vocab),  # type: ignore[arg-type]
        cache=specs["cache"],
        streams=tokens,  # type: ignore[arg-type]
        routing=Routing(decisions, decisions) if returns_routing else None,  # type: ignore[arg-type]
        statistics=RoutingStatistics(decisions, P(), P(None, batch), decisions) if returns_routing else None,  # type: ignore[arg-type]
        taps=tokens if returns_taps else None,  # type: ignore[arg-type]
    )
    return on.run(call, given, {name: specs[name] for name in given}, output)


def drafting_on_mesh(
    model: MeshModel, call: Callable[..., dict[str, Any]], arguments: dict[str, Any], names: tuple[str, ...]
) -> dict[str, Any]:
    """Runs `call(model, **arguments)`, of what `Transformer.dspark*` do, on every device, as `on_mesh` does.

    Args:
      model: a bound model with a mesh.
      call: one of its methods.
      arguments: arrays of the whole mesh, by name; None is left out.
      names: what the call returns.

    Raises:
      ShardingError: something does not split evenly over the mesh.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    on = _OnMesh.of(model, *(given["taps"].shape[:2] if "taps" in given else (len(given["previous"]), 1)))
    batch, sequence = (tuple(axes) or None for axes in (on.split.axes("batch"), on.split.sequence))
    vocab = on.split.short.shared("vocab") or None  # the drafts' tokens are few: on all devices of a row
    by_row = ("anchor", "lengths", "previous", "hidden", "confidence", "tokens", "segment_ids", "anchors", "weights")
    specs: dict[str, Any] = dict.fromkeys(by_row, P(batch))
    specs |= dict.fromkeys(("taps", "streams"), P(batch, sequence))
    specs |= {"logits": P(batch, None, vocab), "bias": P(batch, vocab)}
    sums = dict.fromkeys(("loss", "cross_entropy", "distance", "confidence_loss", "length", "load"), P())
    specs |= sums
    if "cache" in given:
        specs["cache"] = cache_specs(given["cache"], on.rules, on.mesh)
    return on.run(call, given, {name: specs[name] for name in given}, {name: specs[name] for name in names})


def head_on_mesh(
    model: MeshModel,
    call: Callable[..., Any],
    arguments: dict[str, Array | None],
    *,
    tables: tuple[str, ...] = (),
    whole: bool = False,
) -> Any:
    """Runs `call(model, **arguments)`, of what is done with the head, on every device of the mesh, as `on_mesh` does.

    Args:
      model: a bound model with a mesh.
      call: one of its methods, which returns arrays [B, S, ...].
      arguments: arrays [B, S, ...] of the whole mesh, by name; None is left out.
      tables: names of those that are [V, D] instead, and lie as the model's own head does.
      whole: whether the call returns a number instead, the same on every device.

    Raises:
      ShardingError: something does not split evenly over the mesh.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    on = _OnMesh.of(model, *given["streams"].shape[:2])
    tokens = P(tuple(on.split.axes("batch")) or None, tuple(on.split.sequence) or None)
    specs = dict.fromkeys(given, tokens)
    for name in set(tables) & set(given):
        specs[name] = sharding(on.mesh, ("vocab", "embed"), given[name].shape, on.rules, name=name).spec
    return on.run(call, given, specs, P() if whole else tokens)


class _OnMesh(NamedTuple):
    """A call of a model on its mesh.

    Attributes:
      model: as it is bound.
      mesh: its devices.
      rules: what they split.
      split: how they split this call's tokens and the parameters.
    """

    model: MeshModel
    mesh: Mesh
    rules: Rules
    split: Split

    @classmethod
    def of(cls, model: MeshModel, rows: int, length: int) -> _OnMesh:
        mesh, rules = model.mesh, resolve(model.rules)
        assert mesh is not None
        check_rows(mesh, rules, rows)
        return cls(model, mesh, rules, Split.on(mesh, rules, length, UNIT))

    def run(self, call: Callable[..., Any], arguments: dict[str, Any], places: dict[str, Any], returned: Any) -> Any:
        """`call` of each device's part of the model with its part of the arguments."""
        model = self.model
        local = model.clone(parent=None, name=None, mesh=None, rules=None, split=self.split)
        alone: Any = type(model)(model.config, policy="float32", parent=None)  # type: ignore[call-arg]
        values = nn.meta.unbox(model.variables["params"])
        params = specs(declared(alone), values, self.mesh, self.rules)

        def on_device(params: Any, arguments: dict[str, Any]) -> Any:
            return local.apply({"params": params}, **arguments, method=call)

        mapped = jax.shard_map(
            on_device, mesh=self.mesh, in_specs=(params, places), out_specs=returned, check_vma=False
        )
        return mapped(values, arguments)
