"""Files of which ranges of bytes are read, wherever they lie."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol

from v4_jax.checkpoint.tensors import CheckpointError


class ByteRanges(Protocol):
    """An open file.

    Attributes:
      label: what to call it in messages.
      size: its bytes.
      identity: changes when the file is replaced or edited.
      gap: bytes between two wanted ranges that are sooner read than skipped.
    """

    label: str
    size: int
    identity: str
    gap: int

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills a buffer from a place in the file; from several threads, too.

        Raises:
          CheckpointError: the file ends before, or cannot be read.
        """

    def close(self) -> None:
        """Lets go of the file."""


class LocalFile:
    """A file of this machine; see `ByteRanges`."""

    gap = 0

    def __init__(self, path: Path):
        """Opens a file.

        Raises:
          CheckpointError: there is none.
        """
        self.label = str(path)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError(f"{path} is not a file, expected a shard in the safetensors format")
        self.size = status.st_size
        self.identity = f"{path.name} {status.st_size} {status.st_mtime_ns}"

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills a buffer; see `ByteRanges`."""
        while buffer:
            count = os.preadv(self._descriptor, [buffer], offset)
            if not count:
                raise CheckpointError(f"{self.label} ended early, at byte {offset}: it was shortened while being read")
            buffer, offset = buffer[count:], offset + count

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)
