"""Types of the command line's arguments: how each is read and how `--help` shows it.

An option that may be left out has a reader of its own here. From a plain `T | None`, tyro would let the word "None"
mean something on the command line, and say so in its help and errors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from v4_jax.commands.shared.sizes import format_size, parse_size
from v4_jax.infer.prefix_cache.cache import Windows

Reader = tyro.constructors.PrimitiveConstructorSpec


def _reader(kind: Callable[[str], Any], metavar: str, write: Callable[[Any], str] = str) -> Reader[Any]:
    """Reads one word; None is written as nothing."""
    return Reader(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["" if value is None else write(value)],
    )


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise ValueError(f"{number} is too small: expected at least 1")
    return number


def _list(kind: Callable[[str], Any], metavar: str) -> Reader[Any]:
    """Reads one word with several values, separated by commas."""
    return _reader(lambda word: tuple(kind(part) for part in word.split(",")), f"{metavar},...")


def _fraction(word: str) -> float:
    number = float(word)
    if not 0 <= number <= 1:
        raise ValueError(f"{number:g} is out of range: expected 0 to 1")
    return number


def file_reader(metavar: str) -> Reader[Any]:
    """Reads a path that may be left out."""
    return _reader(Path, metavar)


plain = tyro.conf.arg(help_behavior_hint="")  # where the help text itself says what the default is
_text, _file = _reader(str, "TEXT"), file_reader("FILE")
_size = _reader(parse_size, "SIZE", format_size)


def _windows(word: str) -> Windows:
    return word if word in ("full", "none") else parse_size(word)  # type: ignore[return-value]


Text = Annotated[str, tyro.conf.arg(metavar="TEXT")]
OptionalText = Annotated[str | None, _text, plain]
OptionalFile = Annotated[Path | None, _file, plain]
OptionalFloat = Annotated[float | None, _reader(float, "X"), plain]
OptionalInt = Annotated[int | None, _reader(int, "N"), plain]
OptionalSize = Annotated[int | None, _size, plain]
OptionalCount = Annotated[int | None, _reader(_positive, "N"), plain]
OptionalCounts = Annotated[tuple[int, ...] | None, _list(_positive, "N"), plain]
OptionalSizes = Annotated[tuple[int, ...] | None, _list(parse_size, "SIZE"), plain]
OptionalFractions = Annotated[tuple[float, ...] | None, _list(_fraction, "X"), plain]
File = Annotated[Path, _file, plain]
Int = Annotated[int, _reader(int, "N")]
Count = Annotated[int, _reader(_positive, "N")]
Size = Annotated[int, _size]
SizeOrZero = Annotated[int, _reader(lambda word: 0 if word == "0" else parse_size(word), "SIZE", format_size)]
WindowsKept = Annotated[
    Windows,
    _reader(_windows, "full|none|SIZE", lambda value: value if isinstance(value, str) else format_size(value)),
]
Texts = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, plain]

# Options whose names would hide a module.
ChatFile = Annotated[Path | None, _file, tyro.conf.arg(name="chat", help_behavior_hint="")]
JsonFlag = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="json", help_behavior_hint="")]

Directory = Annotated[Path, tyro.conf.Positional, plain]
OtherDirectory = Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PATH]", help_behavior_hint="")]
Model = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL", help_behavior_hint="")]

Draft = Annotated[str, _reader(str, "none|mtp:N|dspark|auto")]
Dtype = Literal["native", "bfloat16", "float32"]
Profile = Literal["auto", "preview", "official"]
CacheFormat = Literal["auto", "float32", "bfloat16", "released"]
