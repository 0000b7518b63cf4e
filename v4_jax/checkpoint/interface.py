"""What every kind of checkpoint offers: named tensors of the release, read piece by piece.

A released directory, a converted one, a training run and parameters in memory all present the same view, the released
one. Loading, conversion, export and comparison are written once against it.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from v4_jax.checkpoint.block_formats import Formats
from v4_jax.checkpoint.tensors import TensorInfo
from v4_jax.config import Config

# Called as progress(label, done bytes, total bytes).
Progress = Callable[[str, int, int], None]

# Tensors are copied and compared in pieces of about this size, so that memory does not depend on the tensor.
PIECE_BYTES = 32 << 20


def rectangle(array: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """The part of a tensor that `Checkpoint.read` is asked for."""
    return array[rows] if columns == slice(None) else array[rows, columns]


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
      directory: where the companions lie; None if there are none. Of a checkpoint elsewhere, copies of them.
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
    directory: Path | None
    files: Mapping[str, Path]
    fingerprint: str | None

    def __init__(self) -> None:
        self.ignored, self.notes, self.directory, self.files, self.fingerprint = {}, [], None, {}, None
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
