"""Where pages of prompts are kept: the host's memory, a directory, or both.

Eviction is by least recent use (LRU). An item is a dictionary of arrays under a name that says what it is, wherever it
comes from, so that a directory may serve several processes and models, one after another or at once.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import math
import os
import stat
import threading
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from v4_jax.files import complete

Item = dict[str, np.ndarray]

_SUFFIX = ".pages"
_EARLIER = (".page.npz", ".tail.npz")  # of another format, which is not found again
_DIGEST = hashlib.sha256().digest_size
_HEADER = 1 << 20  # bytes of a header at most
_QUEUED = 64  # items that wait to be written; who wants to add one waits too
_ABANDONED = 600  # seconds after which nobody is still writing a file


class Memory:
    """Items in memory, with LRU eviction.

    Args:
      most: bytes.

    Attributes:
      nbytes: held now.
    """

    def __init__(self, most: int) -> None:
        self.nbytes = 0
        self._most = most
        self._items: collections.OrderedDict[str, Item] = collections.OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def get(self, name: str) -> Item | None:
        """An item, which is then the last one used."""
        if name in self._items:
            self._items.move_to_end(name)
        return self._items.get(name)

    def put(self, name: str, item: Item) -> None:
        """Keeps an item, if there is room for it at all."""
        size = _size(item)
        if size > self._most or name in self._items:
            return
        self._items[name] = item
        self.nbytes += size
        while self.nbytes > self._most:
            _, evicted = self._items.popitem(last=False)
            self.nbytes -= _size(evicted)


class Directory:
    """Items in files, with LRU eviction.

    Files are written by a thread, one after another, and appear under their names when they are complete, for their
    owner alone to read: they say what was prompted. They hold a digest of their name, their arrays' dtypes and shapes
    and their bytes; one that is damaged, another item's or no such file at all is as if it were not there. The time of
    a file's last change is the time of its last use, which survives restarts.

    Args:
      path: the directory; made if it is not there. Its other files are left alone.
      most: bytes of all items.

    Raises:
      OSError: it cannot be made or read.
    """

    def __init__(self, path: Path, most: int) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path, self._most = path, most
        self._writer, self._queue = ThreadPoolExecutor(1, "pages"), threading.Semaphore(_QUEUED)
        self._lock = threading.Lock()  # of what follows
        self._sizes: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._bytes = 0
        found = []
        for file in path.glob(f"*{_SUFFIX}*"):  # other processes may be at work here
            with contextlib.suppress(OSError):
                status, hidden = file.lstat(), file.name.startswith(".")
                if file.suffix == _SUFFIX and not hidden:
                    found.append((status.st_mtime_ns, file.stem, status.st_size))
                elif hidden and time.time() - status.st_mtime > _ABANDONED:  # by a process that was killed amid it
                    file.unlink()
        for suffix in _EARLIER:
            for file in path.glob(f"*{suffix}"):
                with contextlib.suppress(OSError):
                    file.unlink()
        for _, name, size in sorted(found):
            self._add(name, size)

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def get(self, name: str) -> Item | None:
        """Reads an item, which is then the last one used; one that is damaged is taken away."""
        if name not in self:
            return None
        file = self._file(name)
        try:
            item = _read(file, name, self._most)
            os.utime(file)
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            if not isinstance(error, FileNotFoundError):
                warnings.warn(f"{file} is damaged and was removed: {error}", stacklevel=2)
            with self._lock:
                self._remove(name)
            return None
        self._used(name)
        return item

    def touch(self, name: str) -> None:
        """Says that an item was used, which nobody had to read for that."""
        if name in self:
            with contextlib.suppress(OSError):
                os.utime(self._file(name))
            self._used(name)

    def put(self, name: str, item: Item) -> None:
        """Writes an item, sooner or later; where nothing can be written, it is not kept."""
        if name in self or _size(item) > self._most:
            return
        self._queue.acquire()
        self._writer.submit(self._write, name, item).add_done_callback(lambda _: self._queue.release())

    def close(self) -> None:
        """Waits until all is written."""
        self._writer.shutdown()

    def _write(self, name: str, item: Item) -> None:
        file = self._file(name)
        try:
            with complete(file, private=True) as working, working.open("wb") as output:
                output.writelines(_packed(name, item))
            self._add(name, file.stat().st_size)
        except OSError as error:
            warnings.warn(f"pages are not kept in {self._path}: {error.strerror or error}", stacklevel=2)

    def _add(self, name: str, size: int) -> None:
        with self._lock:
            self._bytes += size - self._sizes.pop(name, 0)
            self._sizes[name] = size
            while self._bytes > self._most:
                self._remove(next(iter(self._sizes)))

    def _used(self, name: str) -> None:
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)

    def _remove(self, name: str) -> None:
        self._bytes -= self._sizes.pop(name, 0)
        with contextlib.suppress(OSError):
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._path / (name + _SUFFIX)


class PageStore:
    """Memory before a directory, either of which may be missing.

    Args:
      memory: bytes of memory; 0 is none.
      directory: what outlasts the process.
    """

    def __init__(self, memory: int, directory: Directory | None = None) -> None:
        self._memory, self._directory = Memory(memory), directory

    @property
    def nbytes(self) -> int:
        """Memory that items take."""
        return self._memory.nbytes

    def __contains__(self, name: str) -> bool:
        return name in self._memory or (self._directory is not None and name in self._directory)

    def get(self, name: str) -> Item | None:
        """An item; None if it is not there, or damaged."""
        item = self._memory.get(name)
        if item is None and self._directory is not None:
            item = self._directory.get(name)
            if item is not None:
                self._memory.put(name, item)
        return item

    def put(self, name: str, item: Item) -> None:
        """Keeps an item where there is room."""
        self._memory.put(name, item)
        if self._directory is not None:
            self._directory.put(name, item)

    def touch(self, names: Iterable[str]) -> None:
        """Says that items were used, the last one most recently, wherever they are."""
        for name in names:
            self._memory.get(name)
            if self._directory is not None:
                self._directory.touch(name)

    def close(self) -> None:
        """Waits until all is written that is to outlast the process."""
        if self._directory is not None:
            self._directory.close()


def _packed(name: str, item: Item) -> list[bytes]:
    """A file's pieces: the digest of what follows, the header's length, the header, the arrays' bytes."""
    arrays = {key: [array.dtype.name, list(array.shape)] for key, array in item.items()}
    header = json.dumps({"name": name, "arrays": arrays}).encode()
    pieces = [len(header).to_bytes(4, "little"), header, *(np.ascontiguousarray(x).tobytes() for x in item.values())]
    return [_digest(pieces), *pieces]


def _digest(pieces: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _read(file: Path, name: str, most: int) -> Item:
    """Reads what `_packed` made.

    Raises:
      ValueError: it is damaged, or another item.
      OSError: it is not there or cannot be read.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    with os.fdopen(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most + _HEADER:
            raise ValueError("it is no file of a page")
        content = opened.read()
    body = content[_DIGEST:]
    if _digest([body]) != content[:_DIGEST]:
        raise ValueError("its digest is another")
    end = 4 + int.from_bytes(body[:4], "little")
    header = json.loads(body[4:end])
    if header["name"] != name:
        raise ValueError("it is that of another page")
    item: Item = {}
    for key, (dtype, shape) in header["arrays"].items():
        kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
        count = math.prod(shape)
        item[key] = np.frombuffer(body, kind, count, end).reshape(shape)
        end += count * kind.itemsize
    return item


def _size(item: Item) -> int:
    return sum(array.nbytes for array in item.values())
