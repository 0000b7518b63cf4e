"""Which mesh to run on: what each would hold and move by estimate, and how close a compiled program comes to the least.

A floor on time takes the larger of three: the program's FLOPs at the chip's peak, its memory traffic at full bandwidth,
and what it sends over the interconnect at full bandwidth. No program is faster; most are slower. Nothing is measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from v4_jax import costs
from v4_jax.architecture import RATIO_OF_ROLE, Architecture
from v4_jax.layers.expert_parallelism import FEW_TOKENS
from v4_jax.layers.partials import STATISTICS
from v4_jax.number_formats import BlockScaled
from v4_jax.on_mesh import UNIT
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import EXPERTS, Parameter, is_parameter
from v4_jax.placement import bytes_per_device, check_mesh, legal_meshes
from v4_jax.planning.compile import Compiled, Workload
from v4_jax.planning.job import Task, abstract_cache, abstract_params, training
from v4_jax.sharding.axes import Preset, resolve
from v4_jax.sharding.chips import Chip
from v4_jax.sharding.mesh import abstract_mesh, format_mesh
from v4_jax.sharding.split import Split

HEADROOM = 0.15  # of a device's memory: what an estimate leaves for temporaries

# What a call goes through: the layers once; in training forward, once more for the backward pass, and backward, but
# where DSpark's stages are trained, which are few.
PASSES: dict[Task, int] = {"decode": 1, "prefill": 1, "train": 3, "sft": 3, "dspark": 1}


def presets_of(task: Task, config: Architecture, devices: int) -> tuple[Preset, ...]:
    """The sharding presets that suit a task, on devices of one slice; the last one is the first choice."""
    if task == "decode":
        return ("decode",)
    if task == "prefill":
        return "prefill", "long-context"
    return ("train-split-experts" if config.n_routed_experts % devices else "train",)


@dataclasses.dataclass(frozen=True)
class Floor:
    """Seconds that a call takes at least, by what bounds it.

    Attributes:
      flops: at the chip's peak.
      hbm: at full memory bandwidth.
      ici: at full interconnect bandwidth.
    """

    flops: float
    hbm: float
    ici: float

    @classmethod
    def of(cls, chip: Chip, flops: float, hbm: float, sent: float) -> Floor:
        """The floor of one device's work."""
        return cls(flops / chip.flops, hbm / chip.hbm_bandwidth, sent / chip.ici_bandwidth)

    @property
    def seconds(self) -> float:
        """The largest, as if all three overlapped perfectly."""
        return max(self.flops, self.hbm, self.ici)

    @property
    def bound(self) -> str:
        """Which one that is."""
        return max(("flops", "hbm", "ici"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Least:
    """The least that the algorithm needs for a call, all devices together.

    Attributes:
      flops: FLOPs; in training, see `Job.training_flops`.
      weights: bytes of weights read once: all dense ones, and the experts that the call's tokens can reach at most. In
        training, of masters and moments read and written once, and the base of what is trained beside it read.
      cache: bytes of cache read once: windows, open blocks, index keys and HCA entries of every row, and the CSA
        entries that its last token picks.
    """

    flops: float
    weights: float
    cache: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a workload would take on one device, without compiling it.

    Attributes:
      workload: the workload.
      weights: bytes; in training, of masters and moments, and of the base of what is trained beside it.
      cache: bytes.
      fits: whether both leave `HEADROOM` of the memory.
      floor: a rough floor of its time.
    """

    workload: Workload
    weights: int
    cache: int
    fits: bool
    floor: Floor

    @property
    def order(self) -> tuple[Any, ...]:
        """Better ones compare smaller: those that fit, the fastest, those with fewer axes."""
        total = self.floor.flops + self.floor.hbm + self.floor.ici
        used = sum(size > 1 for size in self.workload.mesh.values())
        size = 0 if self.fits else self.weights + self.cache
        return (not self.fits, size, total, used, -self.workload.mesh["seq"])

    def __str__(self) -> str:
        return f"{self.workload.preset} {format_mesh(self.workload.mesh)}"


def candidates(workload: Workload, presets: Sequence[str]) -> list[Estimate]:
    """Estimates of a workload on every legal mesh of its topology under each preset, the most promising first."""
    found, least = [], least_work(workload)  # the same on every mesh
    for preset in presets:
        native = workload.dtype == "native"
        shapes = legal_meshes(
            workload.config,
            workload.topology.devices,
            preset,
            batch=workload.batch,
            length=workload.chunk,
            native=native,
        )
        found += [estimate(dataclasses.replace(workload, mesh=sizes, preset=preset), least) for sizes in shapes]
    return sorted(found, key=lambda one: one.order)


def estimate(workload: Workload, least: Least | None = None) -> Estimate:
    """Estimates a workload.

    Args:
      workload: the workload.
      least: what `least_work` says of it, where that is known already.

    Raises:
      ShardingError: it does not split evenly over its mesh.
    """
    mesh, chip = abstract_mesh(workload.mesh), workload.topology.chip.per_device()
    check_mesh(
        workload.config,
        mesh,
        workload.preset,
        batch=workload.batch,
        length=workload.chunk,
        native=workload.dtype == "native",
    )
    split = Split.on(mesh, resolve(workload.preset), workload.chunk, UNIT)
    parts = list(_parts(workload, mesh))
    used = sum(stored for _, stored in parts)
    state = bytes_per_device(training(workload, mesh).state) if workload.trains else 0
    held = state if workload.task == "train" else state + used
    cache = 0 if workload.trains else bytes_per_device(abstract_cache(workload, mesh))
    least, devices, passes = least or least_work(workload), workload.topology.devices, PASSES[workload.task]

    experts = sum(stored for parameter, stored in parts if EXPERTS in parameter.axes)
    gathered = sum(stored * (_joined(split, parameter) - 1) for parameter, stored in parts)
    moved = passes * (used - experts + 2 * gathered + experts * _reached(workload))
    hbm = moved + (2 * state if workload.trains else _cache_read(workload, mesh))
    work = Floor.of(chip, least.flops / devices, hbm, passes * (gathered + _exchanged(workload, split, mesh)))
    fits = held + cache <= (1 - HEADROOM) * chip.hbm_bytes
    return Estimate(workload, held, cache, fits, work)


def least_work(workload: Workload) -> Least:
    """The least that a workload needs."""
    config = workload.config
    mesh = abstract_mesh(dict.fromkeys(workload.mesh, 1))
    if workload.trains:
        flops = workload.tokens * workload.training_flops
        found = training(workload, mesh)
        return Least(float(flops), 2.0 * bytes_per_device(found.state) + bytes_per_device(found.base), 0.0)
    # A chunk's tokens count as its last one, which sees most; a prompt's head is for its last token alone.
    per_token = costs.flops_per_token(config, workload.context)
    total = workload.tokens * per_token.total - (workload.tokens - workload.batch) * per_token.linear["head"]
    weights = 0.0
    for parameter, stored in _parts(workload, mesh):
        if parameter.released == "embed.weight" or parameter.storage == "i64":
            continue  # of which each token reads a row
        weights += stored * (_reached(workload) if EXPERTS in parameter.axes else 1)
    by_role = costs.cache_bytes(config, workload.context, workload.cache_dtype).by_role
    cache = by_role | {"csa": by_role.get("csa", 0) * _picked(workload)}
    return Least(float(total), weights, workload.batch * float(sum(cache.values())))


def floor_of(workload: Workload, compiled: Compiled) -> Floor:
    """The floor of a compiled program."""
    return Floor.of(workload.topology.chip.per_device(), compiled.flops, compiled.hbm, compiled.sent)


def _parts(workload: Workload, mesh: AbstractMesh) -> Iterator[tuple[Parameter, int]]:
    """Every parameter with the bytes that a device stores of it."""
    declared = jax.tree.leaves(declarations(workload.config), is_leaf=is_parameter)
    placed = abstract_params(workload.config, mesh, workload.preset, workload.dtype)
    leaves = jax.tree.leaves(placed, is_leaf=lambda node: isinstance(node, BlockScaled))
    yield from ((parameter, bytes_per_device(leaf)) for parameter, leaf in zip(declared, leaves, strict=True))


def _reached(workload: Workload) -> float:
    """Share of the experts that a call's tokens reach at most."""
    return min(1.0, workload.tokens * workload.config.num_experts_per_tok / workload.config.n_routed_experts)


def _joined(split: Split, parameter: Parameter) -> int:
    """How many shards of a parameter are joined for its use. Experts and vocabulary stay where they are."""
    if EXPERTS in parameter.axes or parameter.released in ("embed.weight", "head.weight"):
        return 1
    names = (name for name in parameter.axes if name is not None)
    return math.prod(split.count(split.axes(name)) // split.count(split.shared(name)) for name in names)


def _exchanged(workload: Workload, split: Split, mesh: AbstractMesh) -> float:
    """Bytes of activations and entries that a device sends."""
    config, layers = workload.config, workload.config.num_hidden_layers
    tokens = workload.tokens / split.count(split.tokens)
    row = 2 * config.hidden_size
    same = split.shared("experts")
    away = tuple(axis for axis in split.axes("experts") if axis not in same)
    sent = 0.0
    if away and tokens * split.count(away) > FEW_TOKENS:
        sent += layers * 2 * tokens * config.num_experts_per_tok * row  # there and back
    elif away:
        sent += layers * 3 * tokens * split.count(away) * row  # all rows in bfloat16, their sums in float32
    shared = split.shared("o_groups")
    for axes, width in ((same, 2 * row), (shared, row)):
        sent += layers * 2 * tokens * width if axes else 0
    if split.long:  # the entries come to the queries
        entries = list(abstract_cache(workload, mesh).entries.values())
        return sent + bytes_per_device(entries) * (split.count(split.axes("entries")) - 1)
    # Queries of all heads visit the entries of a device, and their softmaxes come back; what is left is added up.
    where, own = split.axes("entries"), split.share("heads", config.num_attention_heads)
    visiting = [axis for axis in split.shared("heads") if axis in where]
    visits = own * (split.count(visiting) - 1) * (2 * config.head_dim + 4 * (config.head_dim + STATISTICS))
    added = 2 * 4 * own * config.head_dim if len(visiting) < len(where) else 0
    with_entries = sum(RATIO_OF_ROLE[layer.attention] > 0 for layer in config.layers)
    return sent + with_entries * tokens * (visits + added)


def _cache_read(workload: Workload, mesh: AbstractMesh) -> float:
    """Bytes of its cache that a device reads: all but the CSA entries that nobody picks."""
    cache = abstract_cache(workload, mesh)
    csa = bytes_per_device(cache.entries["csa"]) if "csa" in cache.entries else 0
    return bytes_per_device(cache) - csa * (1 - _picked(workload))


def _picked(workload: Workload) -> float:
    """Share of a row's CSA entries that its last token picks."""
    entries = max(1, workload.context // RATIO_OF_ROLE["csa"])
    return min(1.0, workload.config.index_topk / entries)
