"""From the model's declarations to the tensors of the release: one table, and strict accounting against it.

The table is derived from `v4_jax.declarations`; nothing here knows what a layer contains. It also says where a tensor
goes in each kind of checkpoint: into which part (the release's shard, the converted directory's tree), under which
key, and at which place of which leaf of the parameter tree.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax

from v4_jax.checkpoint.block_formats import (
    FLOATS,
    FP4,
    FP8,
    NVFP4,
    OF_NAME,
    SCALE_TYPES,
    BlockFormat,
    Formats,
    ScaleType,
    scale_name,
    stored_as,
)
from v4_jax.checkpoint.tensors import CheckpointError, TensorInfo, names_in
from v4_jax.config import Config
from v4_jax.number_formats import scale_shape
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import Parameter, Storage, is_parameter

_PLAIN: dict[Storage, str] = {"bf16": "BF16", "f32": "F32", "i64": "I64"}

Path = tuple[str, ...]
Role = Literal["plain", "codes", "scales"]


class Entry(NamedTuple):
    """One released tensor.

    Attributes:
      info: its dtype and shape on disk.
      path: leaf of the parameter tree that it belongs to.
      place: its place on the leaf's stacked axes (layers, experts).
      role: whether it is the leaf's value, or the codes or scales of a block-scaled one.
      part: which part of a checkpoint directory holds it: "embed", "layers.N", "head" or "mtp.N".
      key: its name within the part, with all experts under one key.
      expert: its place under that key; None if the key is its own.
    """

    info: TensorInfo
    path: Path
    place: tuple[int, ...]
    role: Role
    part: str
    key: str
    expert: int | None


@functools.lru_cache(maxsize=16)
def leaves(config: Config) -> Mapping[Path, Parameter]:
    """The declarations by their path in the parameter tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(declarations(config), is_leaf=is_parameter)
    return {tuple(key.key for key in path): parameter for path, parameter in flat}


@functools.lru_cache(maxsize=16)
def entries(config: Config, formats: Formats) -> Mapping[str, Entry]:
    """Every tensor of a released checkpoint of this configuration, in the release's order.

    Raises:
      CheckpointError: a weight whose width the format cannot hold.
    """
    table: list[tuple[str, Entry]] = []
    for path, parameter in leaves(config).items():
        form = formats.block(parameter.storage)
        for index, name in parameter.tensors():
            shape = parameter.shape[len(index) :]
            key, expert = _folded(parameter, index)
            part = _part(key)
            key = key.removeprefix(part + ".")
            if form is None:
                info = TensorInfo(_PLAIN.get(parameter.storage, "BF16"), shape)
                table.append((name, Entry(info, path, index, "plain", part, key, expert)))
                continue
            if shape[-1] % form.packing:
                raise CheckpointError(
                    f"{name} has {shape[-1]} inputs: {form.name} packs pairs, expected an even number"
                )
            info = TensorInfo(form.stored, form.stored_shape(shape))
            table.append((name, Entry(info, path, index, "codes", part, key, expert)))
            info = TensorInfo(formats.scales(parameter.storage), scale_shape(shape, form.block))
            table.append((scale_name(name), Entry(info, path, index, "scales", part, scale_name(key), expert)))
    order = {part: place for place, part in enumerate(part_names(config))}
    return dict(sorted(table, key=lambda item: order[item[1].part]))


def part_names(config: Config) -> list[str]:
    """Parts of a checkpoint in the release's order; each is one shard there."""
    layers = [f"layers.{n}" for n in range(config.num_hidden_layers)]
    return ["embed", *layers, "head", *(f"mtp.{n}" for n in range(config.draft_blocks))]


def _part(name: str) -> str:
    block = re.match(r"(layers|mtp)\.\d+(?=\.)", name)
    return block[0] if block else "embed" if name.startswith("embed.") else "head"


def _folded(parameter: Parameter, index: tuple[int, ...]) -> tuple[str, int | None]:
    """Released name without the expert's number, and that number."""
    layers = parameter.period.layers(index[0]) if parameter.period else ()
    expert = index[-1] if "{expert}" in parameter.released else None
    return parameter.released.replace("{expert}.", "").format(layers=layers), expert


# ---- what is left out, by rule --------------------------------------------------------------------------------------

DUPLICATE_RULE = "duplicate MTP embedding and head"
DRAFT_RULE = "DSpark draft"
OFF_RULE = "MTP block that is switched off"


class Selection(NamedTuple):
    """What of a checkpoint takes part.

    Attributes:
      config: the architecture of what takes part.
      hf_config: the `config.json` that describes it.
      ignored: rule -> names that it leaves out.
      notes: one sentence for each difference from what `config.json` announced.
    """

    config: Config
    hf_config: dict[str, Any]
    ignored: dict[str, tuple[str, ...]]
    notes: list[str]


def select(config: Config, hf_config: dict[str, Any], names: Sequence[str]) -> Selection:
    """Applies the rules on what is left out; they concern the blocks after the last layer.

    Draft blocks share the trunk's embedding and head, so copies of them are ignored. Whether they are an MTP block or
    DSpark's stages, and how many, the tensors tell (`mtp.0.main_proj` in place of `mtp.0.e_proj`); what the stages
    compute, only `config.json` does. And a checkpoint may come without the blocks that its configuration still
    announces.
    """
    extra = [name for name in names if re.match(r"mtp\.\d+\.", name)]
    ignored: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    dspark = "mtp.0.main_proj.weight" in extra and "mtp.0.e_proj.weight" not in extra
    if dspark and not config.dspark_stages:
        ignored[DRAFT_RULE] = tuple(extra)
        notes.append(
            f"{len(extra)} tensors of a DSpark draft are ignored: config.json lacks the dspark_* keys that describe it"
        )
        return _without_drafts(Selection(config, hf_config, ignored, notes))
    copies = tuple(name for name in extra if re.match(r"mtp\.0\.(emb\w*|head)\.", name))
    if copies:
        ignored[DUPLICATE_RULE] = copies
        notes.append(f"{len(copies)} tensors are ignored: {DUPLICATE_RULE} ({names_in(copies)})")
    if dspark:
        stages = {int(name.split(".")[1]) for name in extra}
        config = dataclasses.replace(config, compress_ratios=(*config.trunk().compress_ratios, *(0,) * len(stages)))
        return Selection(config, hf_config, ignored, notes)
    if len(copies) < len(extra) and config.dspark_stages:
        raise CheckpointError(
            "config.json announces DSpark stages, but the checkpoint has a multi-token-prediction block (no "
            "mtp.0.main_proj.weight): expected a configuration without dspark_* keys"
        )
    if extra and not config.draft_blocks:
        ignored = {OFF_RULE: tuple(extra)}
        notes = [f"{len(extra)} tensors of an MTP block are ignored: config.json has num_nextn_predict_layers 0"]
        return Selection(config, hf_config, ignored, notes)
    if len(copies) < len(extra) or not config.draft_blocks:
        return Selection(config, hf_config, ignored, notes)
    announced = "DSpark stages" if config.dspark_stages else "a multi-token-prediction block"
    notes.append(f"config.json announces {announced} that the checkpoint lacks: loaded without")
    return _without_drafts(Selection(config, hf_config, ignored, notes))


def _without_drafts(selection: Selection) -> Selection:
    """The same of the trunk alone."""
    config = selection.config.trunk()
    hf_config = {key: value for key, value in selection.hf_config.items() if not key.startswith("dspark_")}
    hf_config["num_nextn_predict_layers"] = 0
    if "compress_ratios" in hf_config:
        hf_config["compress_ratios"] = list(config.compress_ratios)
    return selection._replace(config=config, hf_config=hf_config)


def check_plausible(label: str, config: Config, tensors: int) -> None:
    """Refuses a configuration of far more tensors than there are, before tables are made of them.

    Raises:
      CheckpointError: it is one.
    """
    announced = config.num_hidden_layers * (3 * config.n_routed_experts + 10)
    if announced > 4 * tensors + 100_000:
        raise CheckpointError(
            f"{label}: config.json announces {config.num_hidden_layers:,} layers of {config.n_routed_experts:,} "
            f"experts, at least {announced:,} tensors, but there are {tensors:,}"
        )


# ---- strict accounting ----------------------------------------------------------------------------------------------


def detect_formats(config: Config, found: Mapping[str, TensorInfo]) -> Formats:
    """Formats of a checkpoint, from the first tensors of each kind; what they leave open, the configuration says.

    A kind is plain only if none of its tensors has scales: one alone is damaged.
    """
    scales: dict[Storage, ScaleType] = {}
    blocks: dict[Storage, BlockFormat] = {}
    plain: set[Storage] = set()
    scaled: set[Storage] = set()
    for parameter in leaves(config).values():
        storage = parameter.storage
        if storage in ("fp8", "expert"):
            names = [name for _, name in parameter.tensors()]
            info, scale = found.get(names[0]), found.get(scale_name(names[0]))
            for legal in SCALE_TYPES:
                if scale and scale.dtype == legal:
                    scales.setdefault(storage, legal)
            if info and info.dtype in FLOATS:
                plain.add(storage)
            elif info and (form := stored_as(info, scale)):
                blocks.setdefault(storage, form)
            if any(scale_name(name) in found for name in names):
                scaled.add(storage)
    plain -= scaled
    expert = "bf16" if "expert" in plain else blocks["expert"].name if "expert" in blocks else config.expert_dtype
    linear: Literal["fp8", "bf16"] = "bf16" if "fp8" in plain else "fp8"
    return Formats(expert, scales.get("fp8", "F8_E8M0"), scales.get("expert", "F8_E8M0"), linear)


def account(label: str, config: Config, formats: Formats, found: Mapping[str, TensorInfo]) -> None:
    """Checks that a checkpoint holds exactly the tensors of its configuration, each with its dtype and shape.

    Args:
      label: what to call the checkpoint.
      config: its architecture.
      formats: its formats.
      found: its tensors, without those that a rule ignores.

    Raises:
      CheckpointError: missing or unknown tensors, or one of another dtype or shape; the message names the first few.
    """
    table = entries(config, formats)
    for name, entry in table.items():
        if name in found and found[name] != entry.info:
            raise CheckpointError(f"{label}: " + _mismatch(name, entry, found, config))
    if unknown := sorted(name for name in found if name not in table):
        raise CheckpointError(
            f"{label} holds {_tensors(len(unknown))} that the configuration has no place for: {names_in(unknown)}"
        )
    if missing := [name for name in table if name not in found]:
        first = missing[0]
        raise CheckpointError(
            f"{label} lacks {_tensors(len(missing))}: {names_in(missing)}; expected {first} as {table[first].info}"
        )


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def _mismatch(name: str, entry: Entry, found: Mapping[str, TensorInfo], config: Config) -> str:
    """One sentence on a tensor that is not stored as expected."""
    have, want = found[name], entry.info
    if entry.role == "codes":
        scales = found.get(scale_name(name))
        seen = f"{have} with scales {scales or 'missing'}"
        experts = leaves(config)[entry.path].storage == "expert"
        wanted = OF_NAME.get(config.expert_dtype, FP8) if experts else FP8
        other = stored_as(have, scales)
        if experts and other and other is not wanted:
            return (
                f"config.expert_dtype is {config.expert_dtype!r}, but {name} is {seen}, which is "
                f"{_describe(other)}; expected {want}, {_describe(wanted)}"
            )
        return f"{name} is {seen}, expected {want}: {_describe(wanted)}"
    if entry.role == "scales" and have.dtype != want.dtype:
        return (
            f"{name} has dtype {have.dtype}, expected {want.dtype}: legal scales are F8_E8M0 (a bare exponent, byte b "
            "means 2^(b - 127)) or F32, the same throughout; bytes of another type are not reinterpreted"
        )
    return f"{name} is {have}, expected {want}"


def _describe(form: BlockFormat) -> str:
    if form is FP4:
        return "'fp4' (two E2M1 codes per I8, [out, in / 2], with scales [out, in / 32])"
    if form is NVFP4:
        return "'nvfp4' (two E2M1 codes per byte, [out, in / 2], with scales [out, in / 16])"
    assert form is FP8
    return "'fp8' (F8_E4M3 [out, in], with scales [out / 128, in / 128])"
