"""JSON that clients send, for bodies of requests and lines of jobs: read so that nothing in it can fail later."""

from __future__ import annotations

import codecs
import json
import math
from typing import Any, NoReturn

MOST_DEPTH = 128  # levels: what is read is written again, perhaps by a library that takes a stack's frame for each


class JsonError(ValueError):
    """A text that is not JSON, or holds what cannot be kept; the message says what."""


def read_json(text: bytes) -> Any:
    """Reads a JSON text in UTF-8, with or without a byte-order mark.

    Raises:
      JsonError: it is not one, or it holds a number that is none in JSON or too large, half a surrogate pair, or values
        nested too deeply.
    """
    text = text.removeprefix(codecs.BOM_UTF8)
    try:
        content = json.loads(text.decode(), parse_constant=_no_constant, parse_float=_finite, parse_int=_short)
        if b"\\u" in text:  # the one way for half a pair to get into text that is UTF-8
            json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise JsonError(f"not JSON: {error.msg} at {line}column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 text (byte {error.start}); expected UTF-8") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise JsonError(f"not text: it holds half a surrogate pair (\\u{ord(half):04x})") from None
    except RecursionError:
        raise JsonError("nested too deeply to be read") from None
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise JsonError(f"nested too deeply; expected at most {MOST_DEPTH} levels")
        level = [
            x for one in level if isinstance(one, dict | list) for x in (one.values() if isinstance(one, dict) else one)
        ]
    return content


def _no_constant(name: str) -> NoReturn:
    raise JsonError(f"not JSON: {name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonError(f"not usable: the number {text:.40} is too large")
    return value


def _short(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise JsonError(f"not usable: a number has {len(text):,} digits") from None
