"""The arrays of an Orbax directory, opened with TensorStore directly: a mesh or an export needs slices of them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from v4_jax.checkpoint.digests import Digests
from v4_jax.checkpoint.tensors import CheckpointError


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array on disk.

    Attributes:
      key: its name in the directory.
      store: its TensorStore.
      digests: of the directory.
    """

    key: str
    store: Any
    digests: Digests

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each axis."""
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype as numpy knows it."""
        return np.dtype(self.store.dtype.numpy_dtype)

    def read(self, index: tuple[int | slice, ...], name: str) -> np.ndarray:
        """Reads a part; only the chunks that it touches leave the disk, and their digests are checked.

        Args:
          index: which part, as of a numpy array.
          name: what to call it in the message.

        Raises:
          CheckpointError: a chunk is missing or damaged.
        """
        try:
            if self.digests:
                self.digests.check(self._chunks(index), name)
            return np.asarray(self.store[index].read().result())
        except CheckpointError:
            raise
        except ValueError as error:  # TensorStore's own errors run over many lines
            raise CheckpointError(f"{name} cannot be read: {str(error).splitlines()[0]}") from None

    def _chunks(self, index: tuple[int | slice, ...]) -> Iterator[str]:
        """Keys of the chunks that a part touches: their numbers along each axis, joined by dots, as zarr has them."""
        if not self.shape:
            return iter((f"{self.key}/0",))
        whole = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        ranges = []
        for part, size, chunk in zip(whole, self.shape, self.store.chunk_layout.read_chunk.shape, strict=True):
            begin, end, _ = part.indices(size) if isinstance(part, slice) else (part, part + 1, 1)
            ranges.append(range(begin // chunk, -(-end // chunk)))
        return (f"{self.key}/{'.'.join(map(str, place))}" for place in itertools.product(*ranges))


def open_arrays(directory: Path, *, cache_bytes: int = 0) -> Iterator[tuple[str, StoredArray]]:
    """Yields the key and the array of each array that Orbax wrote (zarr arrays in an OCDBT database).

    Args:
      directory: what one `PyTreeSave` or `StandardSave` made. Keys are the tree's, joined by dots.
      cache_bytes: how much of what was read last to keep, over all arrays: whole chunks, of which reads may take parts.

    Raises:
      CheckpointError: the database or an array's metadata cannot be read.
    """
    import tensorstore

    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    try:
        keys = [key.decode() for key in tensorstore.KvStore.open(database).result().list().result()]
        names = [key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray")]
        opening = [
            tensorstore.open(
                # A chunk that is not there must be an error; by default it would read as zeros.
                {"driver": "zarr", "kvstore": {**database, "path": f"{name}/"}, "fill_missing_data_reads": False},
                read=True,
                open=True,
                context=context,
                recheck_cached_data="open",
            )
            for name in names
        ]
        digests = Digests(directory)
        stores = [future.result() for future in opening]
        yield from ((name, StoredArray(name, store, digests)) for name, store in zip(names, stores, strict=True))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{directory} is damaged: {str(error).splitlines()[0]}") from None


def chunking(array: Any) -> Any:
    """How Orbax is to save an array, an `ocp.SaveArgs`, so that what is read at once lies in chunks of its own.

    That is one matrix of a stack of layers or experts, and otherwise a piece of bounded size. Left to itself, Orbax
    makes one chunk of each shard, all of which has to be read for any part of it.

    Args:
      array: anything with `ndim`.
    """
    import orbax.checkpoint as ocp

    stacked = tuple(range(array.ndim - 2))
    return ocp.SaveArgs(shard_axes=stacked) if stacked else ocp.SaveArgs(chunk_byte_size=16 << 20)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} to {"a": {"b": x}}: the tree that Orbax makes such keys from."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax from logging what reaches us as exceptions anyway, tracebacks of its threads included."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
