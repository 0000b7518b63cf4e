"""Released directories that lie elsewhere: `gs://bucket/directory` and `hf://org/name[@revision]`.

Both are read as file systems of fsspec, by gcsfs and huggingface_hub (`pip install 'v4-jax[remote]'`). What is small,
the configuration, the index and the companions, is copied once per process into a temporary directory; of the shards,
ranges of bytes are read as they are asked for, so that each process fetches what its own devices hold. A revision of
the hub is resolved to its commit first, so that all reads see the same one.

Who one is comes from the environment, as those libraries read it: `HF_TOKEN`, `GOOGLE_APPLICATION_CREDENTIALS` or the
machine's own account. Messages are made of paths and kinds of errors alone, never of requests.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from v4_jax.checkpoint.tensors import CheckpointError

_URL = re.compile(r"(gs|hf):/+(.+)")
_GAP = 256 << 10  # a request takes as long as this much data
_Result = TypeVar("_Result")


def url_of(path: str | Path) -> str | None:
    """The URL that a path is, one of whose slashes `pathlib` may have taken away; None for one of this machine."""
    match = _URL.fullmatch(str(path))
    return f"{match[1]}://{match[2].rstrip('/')}" if match else None


class RemoteDirectory:
    """A directory elsewhere, listed; see `directory`.

    Attributes:
      url: where it is.
      copy: a local directory with copies of what `fetch` was asked for.
      files: what it holds: path in it -> what the file system knows of it.
    """

    def __init__(self, url: str):
        """Lists a directory.

        Raises:
          CheckpointError: a library is missing, or the directory cannot be listed or is empty.
        """
        self.url = url
        scheme, path = url.split("://")
        self._system = _call(url, lambda: _system(scheme))
        if scheme == "hf":
            path = _call(url, lambda: _pinned(self._system, url, path))
        self._root = path
        found: Mapping[str, Any] = _call(url, lambda: self._system.find(path, detail=True))
        self.files = {name[len(path) + 1 :]: info for name, info in found.items() if info["type"] == "file"}
        if not self.files:
            raise CheckpointError(f"{url} does not exist or is empty, expected a checkpoint directory")
        self._parent = tempfile.TemporaryDirectory(prefix="v4_jax-")
        self.copy = Path(self._parent.name) / path.rpartition("/")[2]
        self.copy.mkdir()

    def fetch(self, name: str) -> None:
        """Copies a small file."""
        target = self.copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_call(f"{self.url}/{name}", lambda: self._system.cat_file(f"{self._root}/{name}")))

    def open(self, name: str) -> RemoteFile:
        """A file of which ranges can be read."""
        return RemoteFile(self._system, f"{self._root}/{name}", f"{self.url}/{name}", self.files[name])


class RemoteFile:
    """A file elsewhere; see `byte_ranges.ByteRanges`."""

    gap = _GAP

    def __init__(self, system: Any, path: str, label: str, info: Mapping[str, Any]):
        """A file that a listing told of; nothing is read yet."""
        self.label, self.size = label, int(info["size"])
        self._system, self._path = system, path
        version = {key: info[key] for key in ("generation", "etag", "blob_id") if info.get(key) is not None}
        self.identity = f"{label} {self.size} {json.dumps(version, sort_keys=True, default=str)}"

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills a buffer; see `ByteRanges`."""
        if not buffer:
            return
        end = offset + len(buffer)
        data = _call(self.label, lambda: self._system.cat_file(self._path, start=offset, end=end, cache_type="none"))
        if len(data) != len(buffer):
            raise CheckpointError(f"{self.label} gave {len(data)} bytes of the {len(buffer)} from byte {offset} on")
        buffer[:] = data

    def close(self) -> None:
        """There is nothing to let go of."""


@functools.lru_cache(maxsize=8)
def directory(url: str) -> RemoteDirectory:
    """A directory elsewhere, listed once per process.

    Raises:
      CheckpointError: a library is missing, or the directory cannot be listed or is empty.
    """
    return RemoteDirectory(url)


def _system(scheme: str) -> Any:
    if scheme == "gs":
        # Not what fsspec makes of "gs", which asks for the bucket's kind before every read.
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem()
    from huggingface_hub import HfFileSystem

    return HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ.get("HF_TOKEN"))


def _pinned(system: Any, url: str, path: str) -> str:
    """A path on the hub at the commit that its revision is now."""
    match = re.fullmatch(r"([^/@]+/[^/@]+)(?:@([^/]+))?(/.*)?", path)
    if match is None:
        raise CheckpointError(f"{url} is no model of the hub, expected hf://org/name or hf://org/name@revision")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ.get("HF_TOKEN"))
    commit = api.model_info(match[1], revision=match[2]).sha
    return f"{match[1]}@{commit}{match[3] or ''}"


def _call(label: str, action: Callable[[], _Result]) -> _Result:
    """Runs a call of the libraries, whose errors may quote requests with tokens in them: only their kind is told."""
    try:
        return action()
    except CheckpointError:
        raise
    except ImportError as error:
        raise CheckpointError(
            f"reading {label} needs {error.name or 'gcsfs or huggingface_hub'}: pip install 'v4-jax[remote]'"
        ) from None
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", None)
        kind = f"{type(error).__name__}{f' {status}' if isinstance(status, int) else ''}"
        raise CheckpointError(
            f"{label} cannot be read ({kind}): it is missing, or it needs credentials in the environment (HF_TOKEN, "
            "GOOGLE_APPLICATION_CREDENTIALS)"
        ) from None
