"""The safetensors file format: 8 bytes of header length, a JSON header, then the tensors' bytes back to back.

Read here rather than by the library of that name, which cannot hand out slices of BF16, FP8 or E8M0 as numpy arrays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from v4_jax.checkpoint.byte_ranges import ByteRanges
from v4_jax.checkpoint.tensors import DTYPES, CheckpointError, TensorInfo
from v4_jax.json_files import escaped, is_pointer, parse, pointer, shown

_MAX_HEADER = 100_000_000  # the format's own limit
_MOST_AXES, _MOST_BYTES = 8, 1 << 48


class Entry(NamedTuple):
    """Where a tensor's data lie: its type and shape, and bytes from the start of the file."""

    info: TensorInfo
    offset: int


class SafetensorsFile:
    """One open file: its header, checked in full, and reads of exactly the bytes asked for.

    Attributes:
      file: the file.
      entries: name -> type, shape and place, in the order of the data.
      header: the header's bytes, which identify the file's structure.
    """

    def __init__(self, file: ByteRanges):
        """Opens a file and checks that its header accounts for every byte.

        Raises:
          CheckpointError: missing, truncated or corrupt file.
        """
        self.file = file
        try:
            self.header, self.entries = _read_header(file)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def read(self, entry: Entry, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Reads rows (and, of a matrix, columns) of one of `entries`, or of a part of one; see `Checkpoint.read`."""
        (dtype, shape), offset = entry
        itemsize = DTYPES[dtype].itemsize
        start, stop, _ = rows.indices(shape[0] if shape else 1)
        count = max(0, stop - start)
        width = int(np.prod(shape[1:], dtype=np.int64))
        first, last = 0, width
        if columns != slice(None):
            first, last, _ = columns.indices(shape[1])
        out = np.empty((count, max(0, last - first) * itemsize), np.uint8)
        if out.shape[1] == width * itemsize:
            if out.size:
                self.file.read_into(out.reshape(-1).data, offset + start * width * itemsize)
        elif width * itemsize - out.shape[1] <= self.file.gap:
            whole = np.empty((count, width * itemsize), np.uint8)
            if whole.size:
                self.file.read_into(whole.reshape(-1).data, offset + start * width * itemsize)
            out[:] = whole[:, first * itemsize : last * itemsize]
        else:
            for row, line in enumerate(out):
                self.file.read_into(line.data, offset + ((start + row) * width + first) * itemsize)
        tail = (last - first,) if columns != slice(None) else shape[1:]
        return out.reshape(-1).view(DTYPES[dtype]).reshape((count, *tail) if shape else ())


def _read_header(file: ByteRanges) -> tuple[bytes, dict[str, Entry]]:
    path, size = file.label, file.size
    if size < 8:
        raise CheckpointError(f"{path} is truncated: it has {size} bytes, a safetensors file has at least 8")
    first = _read(file, 8, 0)  # nothing is read twice: it may come from afar
    if first == b"version " and is_pointer(_read(file, min(size, 64), 0)):
        raise CheckpointError(pointer(path))
    length = int.from_bytes(first, "little")
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"{path} has a corrupt header: its length reads as {length}, the format allows up to {_MAX_HEADER}"
        )
    if 8 + length > size:
        raise CheckpointError(f"{path} is truncated: it has {size} bytes, its header alone needs {8 + length}")
    header = _read(file, length, 8)
    try:
        content = parse(header, f"{path} has a corrupt header, which", CheckpointError, pairs=_unique)
    except _Duplicate as error:
        raise CheckpointError(f"{path} has a corrupt header: {escaped(str(error))} appears twice") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} has a corrupt header: a JSON {type(content).__name__}, expected an object")
    content.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in content.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].info.nbytes)))
    _check_offsets(path, entries, 8 + length, size)
    return header, entries


def _read(file: ByteRanges, count: int, offset: int) -> bytes:
    buffer = bytearray(count)
    file.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def _entry(path: str, name: str, value: Any, start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        legal = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        legal = False
    if not legal:
        raise CheckpointError(
            f"{path} has a corrupt header: the entry of {escaped(name)} is {shown(value)}, "
            "expected dtype, shape and two data_offsets"
        )
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: {escaped(name)} has dtype {escaped(dtype)}, expected one of {', '.join(DTYPES)}"
        )
    if len(shape) > _MOST_AXES or max((*shape, begin, end), default=0) > _MOST_BYTES:
        raise CheckpointError(
            f"{path} has a corrupt header: {escaped(name)} has the shape {shown(list(shape))}, which is absurd"
        )
    info = TensorInfo(dtype, shape)
    if end - begin != info.nbytes:
        raise CheckpointError(
            f"{path} has a corrupt header: {escaped(name)} is {info}, which takes {info.nbytes} bytes, but its "
            f"data_offsets {[begin, end]} span {end - begin}"
        )
    return Entry(info, start + begin)


def _check_offsets(path: str, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors must follow each other without overlap or gap, up to the end of the file."""
    position, before = start, "the header"
    for name, (info, offset) in entries.items():
        if offset != position:
            kind = "overlaps" if offset < position else f"leaves a gap of {offset - position} bytes after"
            raise CheckpointError(f"{path} has a corrupt header: {escaped(name)} {kind} {escaped(before)}")
        position, before = offset + info.nbytes, name
    if position > size:
        raise CheckpointError(f"{path} is truncated: it has {size} bytes, its header announces {position}")
    if position < size:
        raise CheckpointError(f"{path} has {size - position} bytes after its last tensor, expected none")


class _Duplicate(Exception):
    """A JSON object with the same key twice, which Python would silently merge."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Duplicate(next(name for name in names if names.count(name) > 1))
    return content


def write_file(path: Path, tensors: Mapping[str, TensorInfo], data: Iterable[np.ndarray]) -> None:
    """Writes a file that appears under its name only when complete.

    Args:
      path: the file.
      tensors: what it holds, in the order of the data; see `file_order`.
      data: pieces of the tensors' data, in that order.

    Raises:
      OSError: the disk is full, or not writable.
    """
    working = path.with_name(path.name + ".tmp")
    with open(working, "wb") as file:
        file.write(_header(tensors))
        for piece in data:
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(working, path)


def file_order(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, TensorInfo]]:
    """Orders tensors as the format's library does: wide elements first, so that every tensor is aligned to its own."""
    yield from sorted(tensors.items(), key=lambda item: (-item[1].numpy_dtype.itemsize, item[0]))


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # other loaders insist on this entry
    offset = 0
    for name, info in tensors.items():
        end = offset + info.nbytes
        content[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
