"""From logical axis names to places on a mesh: one table of rules, checked where it is used.

Arrays name their dimensions ("experts", "heads"); a `Rules` table says which mesh axis, if any, splits each name. The
mesh axes are `data` (batch), `seq` (context), `expert` and `tensor` (heads, output groups, vocabulary).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "seq", "expert", "tensor")

MeshAxes = str | tuple[str, ...] | None


class ShardingError(ValueError):
    """A placement that rules, mesh and array shape do not allow together."""


def _tuple(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


@dataclasses.dataclass(frozen=True, init=False)
class Rules:
    """Which mesh axes split each logical axis; hashable, so that it can be a static argument.

    Every logical axis in use must be listed, replicated ones with None: a misspelt name is an error, not a silent copy.

    Attributes:
      table: pairs of logical axis and the mesh axes that split it, outermost first.
    """

    table: tuple[tuple[str, tuple[str, ...]], ...]

    def __init__(self, table: Mapping[str, MeshAxes]):
        pairs = ((name, _tuple(axes)) for name, axes in table.items())
        object.__setattr__(self, "table", tuple(sorted(pairs)))

    def __getitem__(self, name: str) -> tuple[str, ...]:
        """Mesh axes that split a logical axis.

        Raises:
          ShardingError: the table does not list the name.
        """
        for known, axes in self.table:
            if known == name:
                return axes
        raise ShardingError(
            f"logical axis {name!r} has no rule, expected one of {sorted(name for name, _ in self.table)}"
        )

    def replace(self, **changes: MeshAxes) -> Rules:
        """The same rules with some axes placed differently."""
        return Rules({**dict(self.table), **changes})


# What tokens and weights are split over when a model answers. Experts are the bulk of the weights and go everywhere.
# Entries of the cache are on all devices that share a batch row. Short chunks are on all devices but those of `data`.
_SERVING = Rules(
    {
        "batch": "data",
        "sequence": ("seq", "expert"),
        "entries": ("seq", "expert", "tensor"),
        "experts": ("data", "seq", "expert", "tensor"),
        "heads": "tensor",
        "index_heads": "tensor",
        "o_groups": "tensor",
        "sinks": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
        "compressed": None,
        "embed": None,
        "embed_out": None,
        "expert_embed": None,
        "expert_hidden": None,
        "group_input": None,
        "head_dim": None,
        "ids": None,
        "index_weights": None,
        "latent": None,
        "layers": None,
        "q_lora": None,
        "streams": None,
    }
)

# Training splits the batch over `expert` too, and keeps every large dense matrix in shards that are joined for use.
_TRAINING = _SERVING.replace(batch=("data", "expert"), sequence="seq", entries=("seq", "tensor"))
_DENSE = "embed", "latent", "group_input", "streams"
_IN_SHARDS = _TRAINING.replace(**dict.fromkeys(_DENSE, ("data", "seq", "expert")))
_EXPERTS_WITHIN = "seq", "expert", "tensor"

Preset = Literal["decode", "prefill", "long-context", "train", "train-split-experts", "train-slices"]

PRESETS: dict[str, Rules] = {
    # One-token steps of many rows, or of a few long ones.
    "decode": _SERVING,
    # Prompts: `tensor` keeps splitting the weights while they are used.
    "prefill": _SERVING,
    # A sequence over all devices: the same placement of weights and cache, but in long chunks the weights come to the
    # tokens along `tensor`.
    "long-context": _SERVING.replace(sequence=("seq", "expert", "tensor")),
    "train": _IN_SHARDS,
    # The same where there are more devices than divide the experts: `data` splits each expert instead, whose parts are
    # joined for use.
    "train-split-experts": _IN_SHARDS.replace(experts=_EXPERTS_WITHIN, expert_hidden="data"),
    # The same over several slices, which `data` leads across: each has all weights, and gradients alone pass between.
    "train-slices": _TRAINING.replace(experts=_EXPERTS_WITHIN, **dict.fromkeys(_DENSE, ("seq", "expert"))),
}


def resolve(rules: Rules | str | None) -> Rules:
    """Rules from a preset's name; None is "decode".

    Raises:
      ShardingError: no preset of that name.
    """
    if isinstance(rules, Rules):
        return rules
    if rules is None:
        return PRESETS["decode"]
    if rules not in PRESETS:
        raise ShardingError(f"no sharding preset {rules!r}, expected one of {sorted(PRESETS)}")
    return PRESETS[rules]


def axes_of(name: str, rules: Rules, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Axes of a mesh that split a logical axis."""
    return tuple(axis for axis in rules[name] if axis in mesh.shape)


def shards_of(name: str, rules: Rules, mesh: Mesh | AbstractMesh | None) -> int:
    """Shards into which a mesh splits a logical axis; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes_of(name, rules, mesh))


def spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """Mesh axes of each dimension of an array.

    Args:
      axes: logical axis of each dimension; None where nothing is ever split.
      rules: the table.

    Raises:
      ShardingError: an unlisted axis, or two dimensions that would be split by the same mesh axis.
    """
    entries: list[str | tuple[str, ...] | None] = []
    owner: dict[str, str] = {}
    for name in axes:
        mesh_axes = rules[name] if name is not None else ()
        for mesh_axis in mesh_axes:
            if mesh_axis in owner:
                raise ShardingError(
                    f"mesh axis {mesh_axis!r} would split both {owner[mesh_axis]!r} and {name!r} of an array with axes "
                    f"{tuple(axes)}: place one of the two elsewhere, or nowhere (None)"
                )
            owner[mesh_axis] = name or ""
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*entries)


def sharding(
    mesh: Mesh | AbstractMesh,
    axes: Sequence[str | None],
    shape: Sequence[int],
    rules: Rules,
    *,
    multiples: Sequence[int] | None = None,
    name: str = "array",
) -> NamedSharding:
    """Placement of an array on a mesh. Mesh axes that the mesh lacks do not split anything.

    Args:
      mesh: the devices.
      axes: logical axis of each dimension.
      shape: size of each dimension.
      rules: the table.
      multiples: for each dimension, what a shard's size must be a multiple of (quantisation blocks); default 1.
      name: what to call the array in an error.

    Raises:
      ShardingError: as `spec`, or a dimension that does not split evenly; the message lists the legal mesh sizes.
    """
    if len(axes) != len(shape):
        raise ShardingError(f"{name} has shape {tuple(shape)}, but {len(axes)} logical axes: {tuple(axes)}")
    entries: list[str | tuple[str, ...] | None] = []
    for dimension, entry in enumerate(spec(axes, rules)):
        present = tuple(axis for axis in _tuple(entry) if axis in mesh.shape)
        pieces = math.prod(mesh.shape[axis] for axis in present)
        multiple = multiples[dimension] if multiples else 1
        if not divides(pieces, shape[dimension], multiple):
            legal = legal_sizes(shape[dimension], multiple)
            unit = f" in multiples of {multiple}" if multiple > 1 else ""
            raise ShardingError(
                f"{name}: axis {axes[dimension]!r} of size {shape[dimension]} cannot be split {pieces} ways over "
                f"{'x'.join(present)}{unit}: legal sizes are {', '.join(map(str, legal))}"
            )
        entries.append(present[0] if len(present) == 1 else present or None)
    return NamedSharding(mesh, PartitionSpec(*entries))


def legal_sizes(size: int, multiple: int = 1) -> list[int]:
    """Numbers of equal shards that a dimension splits into, each shard a multiple of `multiple`; 1 is always legal."""
    return [n for n in range(1, size + 1) if divides(n, size, multiple)]


def divides(pieces: int, size: int, multiple: int = 1) -> bool:
    """Whether a dimension splits into so many equal shards, each a multiple of `multiple`; one always is."""
    return pieces == 1 or (size % pieces == 0 and size // pieces % multiple == 0)
