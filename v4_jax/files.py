"""Files that appear under their name only when they are complete, and what tells one from another."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def complete(target: Path, *, private: bool = False) -> Iterator[Path]:
    """Yields a file to write, which becomes `target` when the block ends well, and is gone when it does not.

    Args:
      target: the file.
      private: whether nobody but its owner may read it.

    Raises:
      OSError: the directory cannot be written.
    """
    working = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    os.close(os.open(working, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666))
    try:
        yield working
        with working.open("rb") as file:
            os.fsync(file.fileno())
        working.replace(target)
    except BaseException:
        working.unlink(missing_ok=True)
        raise


def try_lock(descriptor: int) -> bool:
    """Takes an open file or directory for this process alone, until it is closed or the process ends.

    Returns:
      False if another process has it. Some network file systems have no locks: there, nobody checks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def sampled_digest(path: Path, samples: int, block: int) -> bytes:
    """A digest of a small file's content, or of samples of a large one's.

    Args:
      path: the file.
      samples: how many, spread evenly.
      block: bytes of each.

    Raises:
      OSError: it cannot be read.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= samples * block:
            digest.update(file.read())
        else:
            for number in range(samples):
                file.seek((size - block) * number // (samples - 1))
                digest.update(file.read(block))
    return digest.digest()
