"""Directories made by `convert`: one Orbax checkpoint per part of the release, holding its tensors as they were stored.

    target/config.json, tokenizer and generation files
    target/v4_jax.json        manifest: number formats, rotary parameters, what was left out
    target/embed/             an Orbax PyTree: {"embed": {"weight": ...}}
    target/layers.N/          {"attn": {"wq_a": {"weight": ..., "scale": ...}}, "ffn": {"experts": {"w1": ...}}}
    target/head/, target/mtp.0/

Keys are the released names split at their dots, with the experts stacked on a leading axis (one chunk each on disk).
FP4 stays packed (int8) and scales stay E8M0, so the directory is as large as the release. Orbax restores each part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from v4_jax.checkpoint.block_formats import Formats
from v4_jax.checkpoint.interface import Checkpoint
from v4_jax.checkpoint.mapping import Entry, account, check_plausible, entries, part_names
from v4_jax.checkpoint.orbax_arrays import StoredArray, open_arrays
from v4_jax.checkpoint.released import companions, in_release_order, read_config, read_json
from v4_jax.checkpoint.tensors import NAME_OF_DTYPE, CheckpointError, TensorInfo
from v4_jax.config import Config

MANIFEST = "v4_jax.json"
VERSION = 1


def manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a converted directory records about itself, checked when it is opened."""
    return {
        "format": "v4-jax converted checkpoint",
        "version": VERSION,
        "number_formats": checkpoint.formats._asdict(),
        "rotary": rotary(checkpoint.config),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
        "ignored": {rule: len(names) for rule, names in checkpoint.ignored.items()},
        "source": checkpoint.fingerprint,
    }


def rotary(config: Config) -> dict[str, Any]:
    """Rotary parameters: recorded apart from `config.json`, where tools have been seen to lose them."""
    return {
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "rope_theta": config.rope_theta,
        "compress_rope_theta": config.compress_rope_theta,
        "rope_scaling": dataclasses.asdict(config.rope_scaling),
    }


class Converted(Checkpoint):
    """A converted directory, opened. Array metadata is read at once, array data when asked for, by whole chunks."""

    def __init__(self, path: str | Path, *, strict: bool = True):
        """Opens a directory and accounts for all of its tensors.

        Args:
          path: directory made by `convert`.
          strict: whether tensors must be exactly those of the configuration; without, whatever is there is offered.

        Raises:
          CheckpointError: anything missing, damaged, unknown or inconsistent, or a manifest that contradicts it.
        """
        super().__init__()
        path = Path(path).absolute()
        self.label, self.directory = str(path), path
        self.config, self.hf_config = read_config(path)
        record = read_json(path / MANIFEST)
        self.formats = _check_manifest(path, record, self.config)
        count = record.get("tensors")
        check_plausible(self.label, self.config, count if type(count) is int else 0)
        self._stores: dict[tuple[str, str], StoredArray] = {}
        for part in part_names(self.config):
            if (path / part).is_dir():
                self._stores.update(((part, key), store) for key, store in open_arrays(path / part))
            elif strict:
                raise CheckpointError(f"{path} lacks the part {part}, expected {', '.join(part_names(self.config))}")
        self._places: dict[str, tuple[tuple[str, str], int | None]] = {}
        infos = {name: info for name, info in self._list(entries(self.config, self.formats))}
        if strict:
            account(self.label, self.config, self.formats, infos)
        self.tensors = in_release_order(infos, self.config, self.formats)
        self.files = companions(path)
        self.fingerprint = record.get("source")

    def _list(self, table: Any) -> Iterator[tuple[str, TensorInfo]]:
        """Names the tensors that the arrays hold: known ones as released, others by part and key."""
        known: set[tuple[str, str]] = set()
        name: str
        entry: Entry
        for name, entry in table.items():
            place = (entry.part, entry.key)
            known.add(place)
            store = self._stores.get(place)
            if store is None or (entry.expert is not None and entry.expert >= store.shape[0]):
                continue
            self._places[name] = place, entry.expert
            shape = store.shape if entry.expert is None else store.shape[1:]
            yield name, TensorInfo(_dtype_name(store), tuple(shape))
        for place, store in self._stores.items():
            if place not in known:
                name = ".".join(place)
                self._places[name] = place, None
                yield name, TensorInfo(_dtype_name(store), tuple(store.shape))

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Reads a tensor or a rectangle of it; see `Checkpoint.read`."""
        place, expert = self._places[name]
        index: tuple[Any, ...] = () if expert is None else (expert,)
        if self.tensors[name].shape:
            index += (rows,)
        if columns != slice(None):
            index += (columns,)
        return self._count(self._stores[place].read(index, f"{self.label}: {name}"))

    def close(self) -> None:
        """Drops the arrays' handles."""
        self._stores = {}


def _dtype_name(store: StoredArray) -> str:
    return NAME_OF_DTYPE.get(store.dtype, str(store.dtype))


def _check_manifest(path: Path, record: dict[str, Any], config: Config) -> Formats:
    if record.get("version") != VERSION:
        raise CheckpointError(f"{path / MANIFEST} has version {record.get('version')!r}, expected {VERSION}")
    if record.get("rotary") != rotary(config):
        raise CheckpointError(
            f"{path}: config.json has the rotary parameters {rotary(config)}, but {MANIFEST} recorded "
            f"{record.get('rotary')}; the weights were made for the latter"
        )
    try:
        formats = Formats(**record["number_formats"])
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{path / MANIFEST} has number_formats {record.get('number_formats')!r}, expected {Formats._fields}"
        ) from None
    if formats.expert != config.expert_dtype:
        raise CheckpointError(
            f"{path}: config.expert_dtype is {config.expert_dtype!r}, but {MANIFEST} recorded {formats.expert!r}"
        )
    return formats
