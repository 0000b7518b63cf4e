"""Counts of tokens or bytes as people write them: "1M", "64K", "131072"."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


def parse_size(text: str) -> int:
    """A positive count from "131072", "64K" (times 1024), "1M" (times 1024 * 1024) or "2G", in either case.

    Raises:
      ValueError: anything else.
    """
    match = re.fullmatch(r"\s*([0-9]+)\s*([KMG]?)\s*", text, flags=re.IGNORECASE)
    size = int(match[1]) * _UNITS[match[2].upper()] if match else 0
    if size < 1:
        raise ValueError(
            f"size {text!r} is not understood: expected a positive whole number, alone or followed by K (1024), "
            "M (1048576) or G (1073741824), such as 131072, 64K or 1M"
        )
    return size


def format_size(size: int) -> str:
    """The shortest form that `parse_size` reads back as `size`."""
    for unit in ("G", "M", "K"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)
