"""Directories in the released layout: `config.json`, safetensors shards, and the index that says what is where."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from v4_jax.architecture import ConfigError
from v4_jax.checkpoint.byte_ranges import LocalFile
from v4_jax.checkpoint.interface import Checkpoint
from v4_jax.checkpoint.mapping import account, check_plausible, detect_formats, entries, select
from v4_jax.checkpoint.remote import RemoteDirectory, directory, url_of
from v4_jax.checkpoint.repackaged import describe, find, present_plain, refuse_gguf_files, refuse_unreadable
from v4_jax.checkpoint.safetensors import SafetensorsFile
from v4_jax.checkpoint.tensors import CheckpointError, TensorInfo, names_in
from v4_jax.config import Config
from v4_jax.json_files import escaped, read_object

_THREADS = 8

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Companions of the weights, which travel along as they are; code among them is text, and never run.
_COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
    *("encoding", "inference", "LICENSE*", "NOTICE*", "README*", "*.md", "*.py"),
)
_LARGEST_COMPANION = 256 << 20  # bytes
# What holds the weights, or is written anew with them.
_WEIGHTS = re.compile(r"config\.json|v4_jax\.json|run\.json|.*\.safetensors(\.index\.json)?|\..*")


class Released(Checkpoint):
    """A released directory, opened. Only headers are read until a tensor is asked for."""

    def __init__(self, path: str | Path, *, strict: bool = True):
        """Opens a directory and accounts for all of its tensors.

        Args:
          path: directory with `config.json` and either shards with an index or a single `model.safetensors`; here, or
            elsewhere as `gs://bucket/directory` or `hf://org/name[@revision]`.
          strict: whether tensors must be exactly those of the configuration; without, whatever is there is offered.

        Raises:
          CheckpointError: anything missing, damaged, unknown or inconsistent.
        """
        super().__init__()
        url = url_of(path)
        self.label = url or str(path)
        elsewhere = _fetched(url) if url else None
        self.directory = path = elsewhere.copy if elsewhere else Path(path)
        announced, hf_config = read_config(path)
        with contextlib.ExitStack() as stack:
            self._files = _open_shards(path, elsewhere, stack)
            check_plausible(self.label, announced, sum(len(file.entries) for file in self._files))
            found = find(self.label, announced, self._files)
            chosen = select(announced, hf_config, list(found.held))
            self.ignored = {**found.ignored, **chosen.ignored}
            dropped = {name for names in chosen.ignored.values() for name in names}
            held = {name: tensor for name, tensor in found.held.items() if name not in dropped}
            formats = detect_formats(chosen.config, {name: tensor.info for name, tensor in held.items()})
            self.config, self.hf_config, self.formats, notes = describe(chosen.config, chosen.hf_config, formats)
            self.notes = [*chosen.notes, *notes]
            if found.renamed:
                self.notes.append(f"{found.renamed} tensors have other names than released")
            if found.renamed or self.formats.linear == "bf16":
                held, notes = present_plain(self.config, self.formats, held)
                self.notes += notes
            self._held = held
            infos = {name: tensor.info for name, tensor in held.items()}
            if strict:
                account(self.label, self.config, self.formats, infos)
            self.tensors = in_release_order(infos, self.config, self.formats)
            self.files = companions(path)
            self.fingerprint = _fingerprint(path, self._files)
            stack.pop_all()

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Reads a tensor or a rectangle of it; see `Checkpoint.read`."""
        return self._count(self._held[name].read(rows, columns))

    def unrounded(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray | None:
        """Reads what is wider in the files than released; see `Checkpoint.unrounded`."""
        held = self._held[name]
        return self._count(held.file.read(held.entry, rows, columns)) if held.rounded else None

    def close(self) -> None:
        """Closes the shards."""
        for file in self._files:
            file.close()
        self._files = []


def in_release_order(infos: Mapping[str, TensorInfo], config: Config, formats: Any) -> dict[str, TensorInfo]:
    """Known tensors in the release's order, unknown ones after them."""
    table = entries(config, formats)
    known = {name: infos[name] for name in table if name in infos}
    return {**known, **{name: info for name, info in infos.items() if name not in table}}


def read_config(path: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration of a checkpoint directory, and `config.json` as it is written.

    Raises:
      CheckpointError: no such directory, no `config.json`, or one that this model cannot honour.
    """
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").exists()):
        refuse_gguf_files(path, [path.name, *(file.name for file in path.glob("*"))])
    if not path.is_dir():
        unfinished = path.with_name(f".{path.name}.partial")
        hint = f"; {unfinished} holds an unfinished copy: run the same command again to complete it"
        found = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {found}, expected a checkpoint directory{hint if unfinished.exists() else ''}")
    file = path / "config.json"
    if not file.exists():
        raise CheckpointError(
            f"{path} has no config.json, expected a released or converted checkpoint directory, or a training run"
        )
    hf_config = read_json(file)
    refuse_unreadable(path, hf_config)
    try:
        return Config.from_hf(hf_config), hf_config
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      CheckpointError: not JSON, or not an object.
    """
    return read_object(file, CheckpointError)


def companions(path: Path) -> dict[str, Path]:
    """Files to carry along with the weights, by their path in the directory."""
    files: dict[str, Path] = {}
    for pattern in _COMPANIONS:
        for found in sorted(path.glob(pattern)):
            inside = [found, *sorted(found.rglob("*"))] if found.is_dir() and not found.is_symlink() else [found]
            files.update({str(file.relative_to(path)): file for file in inside if _travels(file)})
    return files


def _travels(file: Path) -> bool:
    hidden = file.name.startswith(".") or "__pycache__" in file.parts
    return file.is_file() and not hidden and file.stat().st_size <= _LARGEST_COMPANION


def left_behind(path: Path) -> list[str]:
    """Names in a released directory that hold no weights and do not travel along."""
    taken = {Path(name).parts[0] for name in companions(path)}
    return sorted(file.name for file in path.iterdir() if file.name not in taken and not _WEIGHTS.fullmatch(file.name))


def local(path: str | Path) -> Path:
    """Where a directory's `config.json` and companions can be read: the path itself, or copies of what is elsewhere.

    Raises:
      CheckpointError: it is elsewhere, and cannot be read.
    """
    url = url_of(path)
    return _fetched(url).copy if url else Path(path)


def _fetched(url: str) -> RemoteDirectory:
    """A directory elsewhere, with copies of all but its shards.

    Raises:
      CheckpointError: it cannot be read, or was made by `convert` or `train`.
    """
    elsewhere = directory(url)
    for name, verb in (("v4_jax.json", "convert"), ("run.json", "train")):
        if name in elsewhere.files:
            raise CheckpointError(
                f"{url} was made by {verb}, and only released directories are read from afar: copy it"
            )
    if "config.json" not in elsewhere.files:
        refuse_gguf_files(url, elsewhere.files)
        raise CheckpointError(f"{url} has no config.json, expected a released checkpoint directory")
    for name in elsewhere.files:
        first = name.split("/")[0]
        if name in ("config.json", INDEX) or any(fnmatch(first, pattern) for pattern in _COMPANIONS):
            elsewhere.fetch(name)
    return elsewhere


def _open_shards(path: Path, elsewhere: RemoteDirectory | None, stack: contextlib.ExitStack) -> list[SafetensorsFile]:
    """Opens the files that hold the tensors and checks them against the index."""

    def exists(name: str) -> bool:
        return name in elsewhere.files if elsewhere else (path / name).exists()

    def open_file(name: str) -> SafetensorsFile:
        opened = SafetensorsFile(elsewhere.open(name) if elsewhere else LocalFile(path / name))
        stack.callback(opened.close)
        return opened

    index = path / INDEX
    if not index.exists():
        if not exists(SINGLE):
            raise CheckpointError(f"{path} has neither {INDEX} nor {SINGLE}: there are no weights to read")
        return [open_file(SINGLE)]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no legal weight_map, expected an object of tensor name -> file name")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name or "\0" in name or len(name.encode()) > 255]:
        raise CheckpointError(f"{index} points outside the directory: {names_in(outside)}")
    if missing := [name for name in names if not exists(name)]:
        raise CheckpointError(f"{path} lacks {names_in(missing)}, which {INDEX} names")
    with ThreadPoolExecutor(_THREADS) as pool:  # afar, a header takes as long as many
        files = list(pool.map(open_file, names))
    holder: dict[str, str] = {}
    for name, file in zip(names, files, strict=True):
        for tensor in file.entries:
            if tensor in holder:
                raise CheckpointError(f"{path} holds {escaped(tensor)} twice: in {holder[tensor]} and in {name}")
            holder[tensor] = name
    if stray := [tensor for tensor in holder if tensor not in weight_map]:
        raise CheckpointError(f"{path / holder[stray[0]]} holds tensors that {INDEX} does not name: {names_in(stray)}")
    for tensor, name in weight_map.items():
        if holder.get(tensor) != name:
            actual = f"it is in {holder[tensor]}" if tensor in holder else "no shard has it"
            raise CheckpointError(f"{INDEX} says that {escaped(tensor)} is in {name}, but {actual}")
    return files


def _fingerprint(path: Path, files: list[SafetensorsFile]) -> str:
    """Changes when a file is replaced or edited. To be surer one would have to read as much as a conversion does."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in files:
        digest.update(f"{file.file.identity} ".encode() + file.header)
    return digest.hexdigest()
