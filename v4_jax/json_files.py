"""JSON objects in files that somebody else wrote: refused in one sentence, whatever they are."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from v4_jax.json_text import JsonError, read_json

_MOST = 256 << 20  # bytes: an index of a million tensors has a hundred million
_LFS = b"version https://git-lfs.github.com/spec"
_SHOWN = 80
_DEEPEST = 64  # containers in each other, more than anybody writes


def read_object(path: Path, error: Callable[[str], Exception]) -> dict[str, Any]:
    """The object in a JSON file; a byte order mark is legal.

    Args:
      path: the file.
      error: makes what is raised of a sentence.

    Raises:
      OSError: it is not there, or cannot be read.
    """
    found = parse(read_file(path, error), str(path), error)
    if not isinstance(found, dict):
        raise error(f"{path} holds a JSON {type(found).__name__}, expected an object")
    return found


def read_file(path: Path, error: Callable[[str], Exception], most: int = _MOST) -> bytes:
    """The bytes of a regular file of plausible size; a pipe, which would be waited for, is none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise error(f"{path} is {kind}, expected a file")
        if status.st_size > most:
            raise error(f"{path} has {status.st_size:,} bytes, expected at most {most:,}")
        content = file.read()
    if is_pointer(content):
        raise error(pointer(path))
    return content


def is_pointer(content: bytes) -> bool:
    """Whether a file begins like what Git LFS leaves in place of one that was not fetched."""
    return content.startswith(_LFS)


def pointer(path: Path | str) -> str:
    """The sentence for such a file."""
    return f"{path} is a Git LFS pointer, not the file itself: fetch it with git lfs pull"


def parse(content: bytes, what: str, error: Callable[[str], Exception], pairs: Any = None) -> Any:
    """JSON of bounded depth without NaN, infinities, lone surrogates, or numbers that Python would not print.

    Args:
      content: UTF-8, with a byte order mark or without.
      what: it is, for the message.
      error: makes what is raised of a sentence.
      pairs: `object_pairs_hook` of `json.loads`.
    """
    try:
        return read_json(content, deepest=_DEEPEST, pairs=pairs)
    except JsonError as problem:
        if problem.reason == "deep":
            raise error(f"{what} is nested too deeply to be read") from None
        raise error(f"{what} is not valid JSON: {_reason(problem)}") from None


def _reason(problem: JsonError) -> str:
    if problem.reason == "constant":
        return f"{problem.found} is no number in JSON"
    if problem.reason == "half":
        return f"it holds half a surrogate pair ({problem.found})"
    if problem.reason == "large":
        return f"the number {shown(problem.found)} is out of range"
    return "it has a number of too many digits" if problem.reason == "digits" else str(problem.error)


def shown(value: Any, most: int = _SHOWN) -> str:
    """A value from a file as it may reach a terminal: as Python writes it, and cut where it is long."""
    return escaped(repr(value), most)


def escaped(name: str, most: int = _SHOWN) -> str:
    """A name from a file as it may reach a terminal: control characters escaped, and cut where it is long."""
    text = name if len(name) <= most else f"{name[:most]}... ({len(name):,} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
