"""Numbers as people write and read them: counts of tokens ("1M", "64K"), bytes, FLOPs, shares."""

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


def operations_text(value: float) -> str:
    """FLOPs with a unit."""
    return scaled(value, (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)))


def bytes_text(value: float) -> str:
    """Bytes with a unit."""
    return scaled(value, ((" TB", 1e12), (" GB", 1e9), (" MB", 1e6), (" kB", 1e3)), " B")


def scaled(value: float, units: tuple[tuple[str, float], ...], plain: str = "") -> str:
    """Two decimals of the largest unit that leaves at least one."""
    for name, size in units:
        if value >= size:
            return f"{value / size:,.2f}{name}"
    return f"{value:,.0f}{plain}"


def seconds_text(value: float) -> str:
    """A time with a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value / 1e-6:,.1f} us"


def share_text(value: float) -> str:
    """A share in percent; what would be written as nothing is said to be little."""
    return "under 0.1%" if 0 < value < 0.0005 else f"{value:.1%}"
