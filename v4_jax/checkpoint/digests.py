"""Digests of what an Orbax directory holds, written with it and checked when it is read.

Orbax and TensorStore check their own bookkeeping and not the data: a flipped bit would load as another value. So a
directory has `digests.json` with the CRC-32 of every chunk as it is stored, by its key in the database, from which the
tensor's name follows, and of every small file. It guards against accidents, not against forgery.

The environment variable V4_JAX_DIGESTS=off neither writes nor checks them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from v4_jax.checkpoint.tensors import CheckpointError
from v4_jax.files import complete
from v4_jax.json_files import read_object

DIGESTS = "digests.json"
SWITCH = "V4_JAX_DIGESTS"

_THREADS = min(8, os.cpu_count() or 1)
_FILE = "file:"  # before the names of files, which are no keys of the database
_DATABASE = "manifest.ocdbt"  # its nodes hold checksums of their own, and its data is in the chunks


def enabled() -> bool:
    """Whether digests are written and checked."""
    return os.environ.get(SWITCH, "on").lower() not in ("off", "0", "false", "no")


class Digests:
    """The digests of one directory.

    Args:
      directory: what one Orbax save made.

    Raises:
      CheckpointError: their file, or the database, cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._expected: dict[str, Any] | None = None
        if enabled() and (directory / DIGESTS).exists():
            content = read_object(directory / DIGESTS, CheckpointError)
            self._expected = content.get("crc32") if isinstance(content.get("crc32"), dict) else {}
        self._database = _open(directory)
        self._checked: set[str] = set()

    def __bool__(self) -> bool:
        """Whether there are any to check."""
        return self._expected is not None

    def check(self, keys: Iterable[str], name: str) -> None:
        """Checks chunks, each once.

        Args:
          keys: of the database, as in "w1.weight/0.0".
          name: of the tensor, for the message.

        Raises:
          CheckpointError: one is not as it was written.
        """
        if self._expected is None:
            return
        for key in keys:
            if key not in self._checked:
                found = self._digest(key)
                if found is not None and found != self._expected.get(key):  # who reads it says that it is not there
                    raise CheckpointError(
                        f"{name} is damaged: its bytes on disk ({key}) are not those that were written"
                    )
                self._checked.add(key)

    def damaged(
        self, progress: Callable[[str, int, int], None] | None = None, part: tuple[int, int] = (0, 1)
    ) -> list[str]:
        """Reads everything, by several threads, and returns the names of what is damaged, missing or foreign.

        Args:
          progress: called as progress(name, done bytes, total bytes), totals of this part.
          part: (i, n) reads the i-th of n parts alone.
        """
        expected = self._expected or {}
        keys = sorted({*expected, *_keys(self.directory, self._database)})[part[0] :: part[1]]

        def fine(key: str) -> bool:
            return self._digest(key) == expected.get(key)

        wrong = []
        with ThreadPoolExecutor(_THREADS) as pool:
            for done, (key, right) in enumerate(zip(keys, pool.map(fine, keys), strict=True), 1):
                if not right:
                    wrong.append(key)
                if progress:
                    progress(key, done, len(keys))
        return list(dict.fromkeys(_tensor(key) for key in wrong))

    def write(self) -> None:
        """Writes the digests of what the directory holds now.

        Raises:
          OSError: the disk is full.
        """
        if not enabled():
            return
        keys = sorted(_keys(self.directory, self._database))
        with ThreadPoolExecutor(_THREADS) as pool:
            found = dict(zip(keys, pool.map(self._digest, keys), strict=True))
        with complete(self.directory / DIGESTS) as working:
            working.write_text(json.dumps({"crc32": found}) + "\n")

    def _digest(self, key: str) -> str | None:
        """The digest of a chunk or file; None if it is not there or cannot be read."""
        if key.startswith(_FILE):
            try:
                content = (self.directory / key.removeprefix(_FILE)).read_bytes()
            except OSError:
                return None
        else:
            try:
                found = self._database.read(key).result()
            except ValueError:
                return None
            if found.state != "value":
                return None
            content = found.value
        return f"{zlib.crc32(content):08x}"


def _open(directory: Path) -> Any:
    if not (directory / _DATABASE).exists():
        return None  # files alone
    import tensorstore

    try:
        database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}
        return tensorstore.KvStore.open(database).result()
    except ValueError as error:
        raise CheckpointError(f"{directory} is damaged: {str(error).splitlines()[0]}") from None


def _keys(directory: Path, database: Any) -> Iterable[str]:
    """What there is to digest."""
    try:
        if database is not None:
            yield from (key.decode() for key in database.list().result())
    except ValueError as error:
        raise CheckpointError(f"{directory} is damaged: {str(error).splitlines()[0]}") from None
    for file in directory.rglob("*"):
        inner = file.relative_to(directory)
        data = inner.parts[0].startswith("ocdbt.process_") or inner.parts[0] == "d" or inner.name == _DATABASE
        if not data and file.is_file() and inner.name != DIGESTS:
            yield f"{_FILE}{inner}"


def _tensor(key: str) -> str:
    return key.removeprefix(_FILE) if key.startswith(_FILE) else key.rpartition("/")[0] or key
