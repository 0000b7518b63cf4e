"""Checkpoints that others have made of the released ones, presented as if they were released.

What differs is the names (`names.py`, and the suffixes by which quantisers call codes and scales), that the experts of
a layer may lie in one tensor, that bytes carry another label, and that NVFP4 weights have a scale of scales. All of it
is a matter of where in which file a released tensor's bytes lie, so nothing is copied and slices stay slices.

NVFP4: E2M1 codes in blocks of 1x16 with E4M3 scales, times one float32 of the tensor: `weight_scale_2` multiplies them
(modelopt), `weight_global_scale` divides them (compressed-tensors). Scales are presented as that product in float32.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from v4_jax.architecture import ExpertDtype
from v4_jax.checkpoint.block_formats import FLOATS, Formats, scale_name
from v4_jax.checkpoint.mapping import leaves
from v4_jax.checkpoint.names import InStack, canonical, in_stack
from v4_jax.checkpoint.safetensors import Entry, SafetensorsFile
from v4_jax.checkpoint.tensors import CheckpointError, TensorInfo, names_in
from v4_jax.config import QUANTIZATION, Config
from v4_jax.json_files import escaped
from v4_jax.parameters import Storage

ACTIVATION_RULE = "scales of activations"

_PARTS: dict[str, Literal["weight", "scale", "multiplier", "divisor", "activation"]] = {
    ".weight": "weight",
    ".weight_packed": "weight",
    ".scale": "scale",
    ".weight_scale": "scale",
    ".weight_scale_inv": "scale",
    ".weight_scale_2": "multiplier",
    ".weight_global_scale": "divisor",
    ".input_scale": "activation",
    ".input_global_scale": "activation",
    ".k_scale": "activation",
    ".v_scale": "activation",
}
_STACK = re.compile(r"(.*\.experts\.(?:gate_up|down)_proj)(\.weight)?(_scale_inv|_scale)?")


class Held(NamedTuple):
    """A released tensor's data in the files.

    Attributes:
      file: the file.
      entry: where its bytes lie there, and what they are.
      dtype: the dtype that it is presented in; another than the entry's only among floats.
      factor: file and place of a float32 that multiplies the values, and whether it divides them instead.
    """

    file: SafetensorsFile
    entry: Entry
    dtype: str
    factor: tuple[SafetensorsFile, Entry, bool] | None = None

    @property
    def info(self) -> TensorInfo:
        """Type and shape as presented."""
        return self.entry.info._replace(dtype=self.dtype)

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """A rectangle as presented; see `Checkpoint.read`."""
        values = self.file.read(self.entry, rows, columns)
        if self.factor is not None:
            file, entry, divides = self.factor
            factor = file.read(entry).astype(np.float32).reshape(())
            return values.astype(np.float32) / factor if divides else values.astype(np.float32) * factor
        return values.astype(self.info.numpy_dtype, copy=False)

    @property
    def rounded(self) -> bool:
        """Whether values are lost by what is presented."""
        return self.factor is None and self.entry.info.numpy_dtype.itemsize > self.info.numpy_dtype.itemsize


class Found(NamedTuple):
    """All of a directory's tensors.

    Attributes:
      held: released name -> where its data are; what has no released name keeps its own.
      ignored: rule -> names that it leaves out.
      renamed: how many of the files' tensors have other names than released.
    """

    held: dict[str, Held]
    ignored: dict[str, tuple[str, ...]]
    renamed: int


def find(label: str, config: Config, files: Sequence[SafetensorsFile]) -> Found:
    """Finds the released tensors in files that may call them otherwise.

    Raises:
      CheckpointError: a tensor that is there under two names, or a stack of experts of another shape.
    """
    stored = {name: (file, entry) for file in files for name, entry in file.entries.items()}
    storages = {name: parameter.storage for parameter in leaves(config).values() for _, name in parameter.tensors()}
    scales = {scale_name(name) for name, storage in storages.items() if storage in ("fp8", "expert")}
    if all(name in storages or name in scales or name.startswith("mtp.") for name in stored):
        return Found({name: Held(file, entry, entry.info.dtype) for name, (file, entry) in stored.items()}, {}, 0)
    released = {canonical(name): name for name in storages}
    stacks: dict[str, list[tuple[str, InStack]]] = {}
    for member in storages:
        if place := in_stack(member):
            stacks.setdefault(place.name.removeprefix("model."), []).append((member, place))
    held: dict[str, Held] = {}
    known_as: dict[str, str] = {}
    factors: dict[str, tuple[SafetensorsFile, Entry, bool]] = {}
    ignored: list[str] = []
    renamed = 0

    def put(name: str, original: str, file: SafetensorsFile, entry: Entry, dtype: str) -> None:
        if name in held:
            raise CheckpointError(f"{label} holds {name} twice: as {known_as[name]} and as {original}")
        held[name], known_as[name] = Held(file, entry._replace(info=entry.info._replace(dtype=dtype)), dtype), original

    for original, (file, entry) in stored.items():
        bare, dtype = original.removeprefix("model."), entry.info.dtype
        match = _STACK.fullmatch(bare)
        if match and match[1] in stacks:
            renamed += 1
            for member, part in _members(label, original, entry, stacks[match[1]]):
                put(scale_name(member) if match[3] else member, original, file, part, _label(dtype, bool(match[3])))
            continue
        stem, _, suffix = bare.rpartition(".")
        plain = canonical(bare)
        kind = "weight" if plain in released else _PARTS.get(f".{suffix}")
        weight = plain if plain in released else canonical(f"{stem}.weight")
        if kind is None or weight not in released:
            put(bare if bare.startswith("mtp.") else original, original, file, entry, dtype)
            continue
        name = released[weight]
        if kind == "activation":
            ignored.append(original)
        elif kind in ("multiplier", "divisor"):
            factors[name] = file, entry, kind == "divisor"
        elif kind == "scale":
            put(scale_name(name), original, file, entry, _label(dtype, True))
        else:
            put(name, original, file, entry, _label(dtype, False) if storages[name] in ("fp8", "expert") else dtype)
        renamed += original not in (name, scale_name(name))
    for name, factor in factors.items():
        scale = held.get(scale_name(name))
        if scale and scale.dtype == "F8_E4M3":
            held[scale_name(name)] = scale._replace(dtype="F32", factor=factor)
    return Found(held, {ACTIVATION_RULE: tuple(ignored)} if ignored else {}, renamed)


def _label(dtype: str, scale: bool) -> str:
    """Packed codes and bare exponents are also called unsigned bytes."""
    return ("F8_E8M0" if scale else "I8") if dtype == "U8" else dtype


def _members(
    label: str, original: str, entry: Entry, members: Sequence[tuple[str, InStack]]
) -> Iterator[tuple[str, Entry]]:
    """The matrices of a stack [experts, parts * out, in], which lie one after another."""
    (dtype, shape), offset = entry
    experts, parts = max(place.expert for _, place in members) + 1, members[0][1].parts
    if len(shape) != 3 or shape[0] != experts or shape[1] % parts:
        raise CheckpointError(f"{label}: {original} is {entry.info}, expected [{experts}, {parts} x out, in]")
    info = TensorInfo(dtype, (shape[1] // parts, shape[2]))
    for name, place in members:
        yield name, Entry(info, offset + (place.expert * parts + place.part) * info.nbytes)


class Description(NamedTuple):
    """A checkpoint as its tensors say that it is; see `describe`."""

    config: Config
    hf_config: dict[str, Any]
    formats: Formats
    notes: list[str]


def describe(config: Config, hf_config: dict[str, Any], formats: Formats) -> Description:
    """Number formats as found, over what `config.json` says or leaves unsaid.

    A `config.json` that says FP4 where the experts are FP8, or the reverse, is believed: one of the two is damaged,
    which the accounting then names. Tools do leave "fp4" in place where they have written BF16 or NVFP4.

    Args:
      config: the configuration.
      hf_config: its `config.json`.
      formats: those of the tensors.
    """
    notes = []
    stated = hf_config.get("expert_dtype")
    if formats.expert != config.expert_dtype:
        if stated is not None and formats.expert in ("fp4", "fp8"):
            formats = formats._replace(expert=config.expert_dtype)
        else:
            found: ExpertDtype = formats.expert
            said = "nothing about the experts' format" if stated is None else f"expert_dtype {stated!r}"
            notes.append(f"config.json says {said}: by their tensors they are {found!r}")
            config = dataclasses.replace(config, expert_dtype=found)
            hf_config = with_format(hf_config, found)
    if formats.linear == "bf16" and formats.expert != "bf16":
        notes.append("linear layers other than the experts' are not quantised")
    return Description(config, hf_config, formats, notes)


def with_format(hf_config: Mapping[str, Any], expert: ExpertDtype) -> dict[str, Any]:
    """A `config.json` for weights in another format."""
    content = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    content["expert_dtype"] = expert
    return content if expert == "bf16" else content | {"quantization_config": dict(QUANTIZATION)}


_PLAIN: dict[Storage, str] = {"bf16": "BF16", "f32": "F32"}


def present_plain(config: Config, formats: Formats, held: Mapping[str, Held]) -> tuple[dict[str, Held], list[str]]:
    """Plain tensors in their released dtypes, which tools do not keep: BF16 widens to F32 exactly, F32 is rounded.

    Returns:
      The tensors, and a note if there are any that are rounded.
    """
    presented = dict(held)
    rounded = []
    for parameter in leaves(config).values():
        quantised = parameter.storage in ("fp8", "expert")
        if parameter.storage == "i64" or (quantised and formats.block(parameter.storage) is not None):
            continue
        for _, name in parameter.tensors():
            if (tensor := held.get(name)) and tensor.dtype in FLOATS:
                presented[name] = tensor._replace(dtype=_PLAIN.get(parameter.storage, "BF16"))
                rounded += [name] * presented[name].rounded
    if not rounded:
        return presented, []
    return presented, [
        f"{len(rounded)} tensors are wider than their released BF16 ({names_in(rounded)}): loading in float32 keeps "
        "them as they are, all else rounds them"
    ]


# ---- what is not read ------------------------------------------------------------------------------------------------

_INSTEAD = "use the released checkpoint, or a repackaged one in FP8, NVFP4, MXFP4 or BF16"
_METHODS = ("fp8", "modelopt", "compressed-tensors", "mxfp4")
_COMPRESSED = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "float-quantized", "mixed-precision", "dense")


def refuse_unreadable(path: Path, hf_config: Mapping[str, Any]) -> None:
    """Refuses by name what is known and not read, before its tensors would be called damaged.

    Raises:
      CheckpointError: V4.1, or a quantisation by other methods.
    """
    kind = str(hf_config.get("model_type", ""))
    if kind.startswith(("deepseek_v41", "deepseek_v4_1")):
        raise CheckpointError(
            f"{path} is DeepSeek-V4.1 (model_type {kind!r}), another architecture, which is not read: use a checkpoint "
            "of DeepSeek-V4 (Flash, Pro, their Base, DSpark, 0731 and 0813 releases)"
        )
    quantization = hf_config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return
    method = str(quantization.get("quant_method", "fp8")).lower()
    form = str(quantization.get("format") or "dense")
    if method == "compressed-tensors" and form not in _COMPRESSED:
        raise CheckpointError(
            f"{path} is quantised in the {form!r} format of compressed-tensors, which is not read: {_INSTEAD}"
        )
    if method not in _METHODS:
        raise CheckpointError(
            f"{path} is quantised by {escaped(method.upper())} (quant_method), which is not read: {_INSTEAD}"
        )


def refuse_gguf_files(label: object, names: Iterable[str]) -> None:
    """Refuses GGUF files by name.

    Raises:
      CheckpointError: there are some among what lies where no `config.json` does.
    """
    if any(name.endswith(".gguf") for name in names):
        raise CheckpointError(f"{label} is in the GGUF format, which is not read: {_INSTEAD}")
