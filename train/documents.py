"""Documents of a training corpus: files of four formats, each read by document number.

Nothing is held in memory but where documents begin, so that grain can shuffle all of them globally. Files of a format
without random access (gzip) are unpacked once into a temporary directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import gzip
import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from v4_jax.files import sampled_digest

Format = Literal["auto", "text", "jsonl", "parquet", "arrayrecord"]

# Files with any other ending are text.
_ENDINGS = {
    "jsonl": (".jsonl", ".jsonl.gz"),
    "parquet": (".parquet",),
    "arrayrecord": (".array_record", ".arrayrecord"),
}

TOKENS = "tokens"  # the field whose documents are lists of token ids, not text
MESSAGES = "messages"  # the field of conversations

_SAMPLES, _BLOCK = 4, 1 << 12  # of a file: blocks that tell an edited one, and bytes of each
_SCAN_BYTES = 1 << 24  # read at once when looking for the ends of lines
# Decoded Parquet row groups kept: one for each reading thread, and some in case they are read in order.
_ROW_GROUPS = 32


class DataError(ValueError):
    """Training data that cannot be used; the sentence says which and why."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One part of the training mixture.

    Attributes:
      path: a file, a directory (all files below it, but hidden ones) or a glob pattern.
      weight: share of the documents drawn from it, relative to the other sources' weights.
      format: "text" (a file is a document), "jsonl" (a line is one, plain or gzipped), "parquet" (a row is one),
        "arrayrecord" (a record is one, a JSON object) or "auto": each file's, by its extension. A directory gives
        the files whose extension stands for the format, and everything else is text.
      field: name of the JSON field or Parquet column with the text. "tokens" holds token ids, used as they are, and
        "messages" a conversation, to which other fields of its JSON object belong.

    Raises:
      DataError: the weight is not a positive number, or there is no such format.
    """

    path: str
    weight: float = 1.0
    format: Format = "auto"
    field: str = "text"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"weight of {self.path!r} is {self.weight}; expected a positive number")
        if self.format not in get_args(Format):
            legal = ", ".join(get_args(Format))
            raise DataError(f"format of {self.path!r} is {self.format!r}; legal formats are {legal}")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation as it is stored: a JSON object with `messages`."""

    fields: dict[str, Any]


class Document(NamedTuple):
    """A document as it is stored.

    Attributes:
      content: its text, or [n] integer token ids, or a conversation; an empty text for a blank line.
      where: file and place, for messages.
      problem: why it cannot be used, where that is not raised.
      source: number of its source among those it is mixed with.
    """

    content: str | np.ndarray | Conversation
    where: str
    problem: str | None = None
    source: int = 0


class Documents(NamedTuple):
    """The documents of a source.

    Attributes:
      dataset: in the order of their files' paths, then of their places.
      layout: changes where a document's number comes to mean another place.
      content: changes where a file's name or size does, or what is in samples of it.
    """

    dataset: grain.MapDataset[Document]
    layout: int
    content: int


def read_documents(source: Source, *, skip: bool = False) -> Documents:
    """Opens all files of a source.

    Args:
      source: which.
      skip: whether a document that cannot be read comes with its problem; otherwise that is raised.

    Raises:
      DataError: there is no such file or no document in any, a file cannot be read, or its format has no such field.
    """
    files: dict[str, list[Path]] = {}
    for path in _files(source):
        files.setdefault(_format(path) if source.format == "auto" else source.format, []).append(path)
    parts: list[Any] = []
    layout, content = [], []
    if "text" in files:
        if source.field in (TOKENS, MESSAGES):
            what = "token ids" if source.field == TOKENS else "conversations"
            raise DataError(f"{str(files['text'][0])!r} is text and holds no {what}; legal with them are {_legal()}")
        texts = files.pop("text")
        layout.append([path.name for path in texts])
        content += texts
        parts.append(_TextFiles(texts))
    readers: dict[str, Callable[[Path, str], Any]] = {
        "jsonl": _JsonLines,
        "parquet": _Parquet,
        "arrayrecord": _ArrayRecord,
    }
    for name in sorted(files):
        opened = [readers[name](path, source.field) for path in files[name]]
        layout.append([len(part) for part in opened])
        content += files[name]
        parts += opened
    found = [[path.name, path.stat().st_size, sampled_digest(path, _SAMPLES, _BLOCK).hex()] for path in content]
    read = [grain.MapDataset.source(_Lenient(part) if skip else part) for part in parts]
    documents = grain.MapDataset.concatenate(read)
    if not len(documents):
        raise DataError(f"there are no documents in {source.path!r}: its files are empty")
    return Documents(documents, _crc(layout), _crc(found))


def _crc(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())


class _Lenient:
    """Documents of a file, of which those that cannot be read say why."""

    def __init__(self, documents: Any) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        try:
            return self._documents[index]
        except DataError as error:
            return Document("", "", str(error))


def _legal() -> str:
    return ", ".join(ending for endings in _ENDINGS.values() for ending in endings)


def _format(path: Path) -> str:
    name = path.name.lower()
    return next((format for format, endings in _ENDINGS.items() if name.endswith(endings)), "text")


def _files(source: Source) -> list[Path]:
    path = Path(source.path)
    if path.is_dir():
        found = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
        files = [file for file in found if source.format in ("auto", _format(file)) and file.is_file()]
    elif path.is_file():  # also one whose name happens to be a pattern
        files = [path]
    else:
        files = [file for name in glob.glob(source.path, recursive=True) if (file := Path(name)).is_file()]
    if not files:
        kind = "file" if source.format == "auto" else f"{source.format} file"
        raise DataError(f"no {kind} at {source.path!r}; expected a file, a directory with files or a glob pattern")
    return sorted(files)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turns what reading raises into one sentence."""
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{where} is not UTF-8: byte {byte:#04x} at position {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg} at column {error.colno}); expected an object") from None
    # RecursionError: JSON of absurd depth. RuntimeError and ValueError: how ArrayRecord and Arrow complain.
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError, pa.ArrowException) as error:
        raise DataError(f"{where} cannot be read: {error}") from None


class _TextFiles:
    """Files that are a document each."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Document:
        where = repr(str(self._paths[index]))
        with _reading(where):
            return Document(self._paths[index].read_bytes().decode("utf-8-sig"), where)


class _JsonLines:
    """A file of JSON lines; opening it reads it once, to find where lines begin."""

    def __init__(self, path: Path, field: str) -> None:
        self._name, self._path, self._field = repr(str(path)), path, field
        with _reading(self._name):
            if path.name.lower().endswith(".gz"):
                # Deleted together with this object.
                self._unpacked = tempfile.TemporaryDirectory(prefix="v4-jax-")
                self._path = Path(self._unpacked.name) / "unpacked"
                with gzip.open(path) as packed, self._path.open("wb") as file:
                    shutil.copyfileobj(packed, file, _SCAN_BYTES)
            self._ends = _line_ends(self._path)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Document:
        where = f"line {index + 1} of {self._name}"
        begin = int(self._ends[index - 1]) if index else 0
        # Opened for each line: a corpus may have more files than a process may hold open.
        with _reading(where), self._path.open("rb") as file:
            file.seek(begin)
            line = file.read(int(self._ends[index]) - begin)
            return _parse(line, self._field, where)


def _line_ends(path: Path) -> np.ndarray:
    """[lines] int64 positions one after each line's last byte."""
    ends, size = [np.zeros(0, np.int64)], 0
    with path.open("rb") as file:
        while chunk := file.read(_SCAN_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size + 1)
            size += len(chunk)
    found = np.concatenate(ends)
    if size and (not len(found) or found[-1] != size):  # the last line may lack its newline
        found = np.append(found, size)
    return found


class _Parquet:
    """A Parquet file. A document costs the decoding of its row group, unless that was one of the last ones read."""

    def __init__(self, path: Path, field: str) -> None:
        self._name, self._path, self._field = repr(str(path)), path, field
        with _reading(self._name), pq.ParquetFile(path) as file:
            self._metadata, schema = file.metadata, file.schema_arrow
        if field not in schema.names:
            names = ", ".join(map(repr, schema.names))
            raise DataError(f"{self._name} has no column {field!r}; its columns are {names}")
        if field == MESSAGES:
            raise DataError(f"{self._name} is Parquet; expected conversations as JSON, in lines or in ArrayRecord")
        found = schema.field(field).type
        if field == TOKENS:
            legal = _is_list(found) and pa.types.is_integer(found.value_type)
        else:
            legal = pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)
        if not legal:
            expected = "lists of integers" if field == TOKENS else "strings"
            raise DataError(f"column {field!r} of {self._name} holds {found}; expected {expected}")
        groups = range(self._metadata.num_row_groups)
        self._ends = np.cumsum([self._metadata.row_group(group).num_rows for group in groups], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Document:
        where = f"row {index + 1} of {self._name}"
        group = int(np.searchsorted(self._ends, index, side="right"))
        begin = int(self._ends[group - 1]) if group else 0
        with _reading(where):
            value = _row_group(self, group)[index - begin]
            if not value.is_valid or (self._field == TOKENS and value.values.null_count):
                raise DataError(f"{where} has a null in column {self._field!r}; expected a value in every row")
            content = value.values.to_numpy(zero_copy_only=False) if self._field == TOKENS else value.as_py()
            return Document(content, where)

    def read_group(self, group: int) -> pa.ChunkedArray:
        """Returns one row group of the column."""
        # Threads do not share a file object, so that they need not wait for each other.
        with pq.ParquetFile(self._path, metadata=self._metadata) as file:
            return file.read_row_group(group, columns=[self._field], use_threads=False).column(0)


def _is_list(found: pa.DataType) -> bool:
    return pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)


@functools.lru_cache(_ROW_GROUPS)
def _row_group(file: _Parquet, group: int) -> pa.ChunkedArray:
    return file.read_group(group)


class _ArrayRecord:
    """A file of JSON objects, with the format's own index."""

    def __init__(self, path: Path, field: str) -> None:
        self._name, self._field = repr(str(path)), field
        with _reading(self._name):
            self._records = grain.sources.ArrayRecordDataSource(str(path))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        where = f"record {index + 1} of {self._name}"
        with _reading(where):
            return _parse(self._records[index], self._field, where)


def _parse(line: bytes, field: str, where: str) -> Document:
    """Reads a JSON object; blank lines are empty documents."""
    text = line.decode("utf-8-sig")  # a byte order mark before the first line is none of its text
    if not text.strip():
        return Document("", where)
    content = json.loads(text)
    if not isinstance(content, dict):
        raise DataError(f"{where} holds {text.strip()[:20]!r}; expected a JSON object with the field {field!r}")
    if field not in content:
        names = ", ".join(map(repr, content)) or "none"
        raise DataError(f"{where} has no field {field!r}; its fields are {names}")
    value = content[field]
    if field == TOKENS:
        if not isinstance(value, list) or any(type(token) is not int for token in value):
            raise DataError(f"{where} has a field {field!r} that is not a list of integers")
        # An array, because grain looks into every element of a list.
        return Document(np.asarray(value), where)
    if field == MESSAGES:
        return Document(Conversation(content), where)
    if not isinstance(value, str):
        raise DataError(f"{where} has {type(value).__name__} in field {field!r}; expected a string")
    return Document(value, where)
