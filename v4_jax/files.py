"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def complete(target: Path) -> Iterator[Path]:
    """Yields a file to write, which becomes `target` when the block ends well, and is gone when it does not.

    Raises:
      OSError: the directory cannot be written.
    """
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(descriptor)
    working = Path(name)
    try:
        yield working
        with working.open("rb") as file:
            os.fsync(file.fileno())
        working.chmod(0o666 & ~_umask())  # temporary files are private, results are like any other file
        working.replace(target)
    except BaseException:
        working.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
