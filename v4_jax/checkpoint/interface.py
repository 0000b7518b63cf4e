"""What every kind of checkpoint offers: named tensors of the release, read piece by piece.

A released directory, a converted one, a training run and parameters in memory all present the same view, the released
one. Loading, conversion, export and comparison are written once against it.
"""

from __future__ import annotations

import abc
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from v4_jax.config import Config

if TYPE_CHECKING:
    from v4_jax.checkpoint.block_formats import Formats

# Called as progress(label, done bytes, total bytes).
Progress = Callable[[str, int, int], None]

# Tensors are copied and compared in pieces of about this size, so that memory does not depend on the tensor.
PIECE_BYTES = 32 << 20

# Names of the safetensors format; what numpy lacks comes from ml_dtypes.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or trusted; the message says what was found and what was expected."""


class TensorInfo(NamedTuple):
    """Type and shape of a tensor as stored. A packed FP4 weight [out, in] is I8 [out, in / 2]."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype as numpy knows it."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Checkpoint(abc.ABC):
    """Tensors under their released names, with the configuration they belong to.

    Attributes:
      label: what to call it in messages.
      config: the architecture, without parts that the checkpoint does not hold.
      hf_config: the content of `config.json` that describes exactly these tensors.
      formats: how block-scaled weights are stored.
      tensors: every tensor that takes part, in the release's order.
      ignored: rule -> names of the tensors it leaves out.
      notes: sentences on what differs from what `config.json` announced.
      files: companions to carry along (tokenizer, generation defaults): relative path -> file.
      fingerprint: identifies the content, for resuming; None if it cannot be told.
      bytes_read: bytes of tensor data read so far.
    """

    label: str
    config: Config
    hf_config: dict[str, Any]
    formats: Formats
    tensors: Mapping[str, TensorInfo]
    ignored: Mapping[str, Sequence[str]]
    notes: Sequence[str]
    files: Mapping[str, Path]
    fingerprint: str | None

    def __init__(self) -> None:
        self.ignored, self.notes, self.files, self.fingerprint = {}, [], {}, None
        self.bytes_read = 0
        self._lock = threading.Lock()

    @abc.abstractmethod
    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Reads a tensor, or a rectangle of it, in its stored dtype; only those bytes leave the disk.

        Args:
          name: released name.
          rows: range of the first dimension, in stored elements.
          columns: range of the second; must be left out for vectors.
        """

    def unrounded(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray | None:
        """Reads the values of a tensor, or a rectangle of it, where they are held in floats that `read` would round.

        Args:
          name: released name of a plain tensor or of a weight.
          rows: range of the first dimension, in elements.
          columns: range of the second; must be left out for vectors.

        Returns:
          The values in the dtype they are held in; None where `read` gives all that there is.
        """
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """Releases files. Reading afterwards is an error."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def pieces(self, name: str, multiple: int = 1) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields a tensor in ranges of rows of bounded size, each (but the last) a multiple of `multiple` rows."""
        for rows in row_ranges(self.tensors[name], multiple):
            yield rows, self.read(name, rows)

    def _count(self, array: np.ndarray) -> np.ndarray:
        with self._lock:
            self.bytes_read += array.nbytes
        return array


def row_ranges(info: TensorInfo, multiple: int = 1) -> Iterator[slice]:
    """Splits the rows of a tensor into ranges of about `PIECE_BYTES`."""
    rows = info.shape[0] if info.shape else 1
    row_bytes = max(1, info.nbytes // max(rows, 1))
    step = max(multiple, PIECE_BYTES // row_bytes // multiple * multiple)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def names_in(names: Sequence[str], limit: int = 3) -> str:
    """The first few of a list of names, and how many there are, for a message."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"
