"""JSON that somebody else wrote: read so that nothing in it can fail later."""

from __future__ import annotations

import codecs
import json
import math
from typing import Any, Literal, NoReturn

MOST_DEPTH = 128  # containers: what is read is written again, perhaps by a library that takes a stack's frame for each

Reason = Literal["syntax", "text", "half", "constant", "large", "digits", "deep"]


class JsonError(ValueError):
    """A text that is not JSON, or holds what cannot be kept; the message says what, to follow "it is".

    Attributes:
      reason: what is wrong: "syntax"; "text" that is no UTF-8; "half" a surrogate pair; a "constant"; a number too
        "large" or of too many "digits" for others to read; containers too "deep" in each other.
      found: the half, constant or number; empty for other reasons.
      error: what Python says of syntax, text or digits; None for other reasons.
    """

    def __init__(self, message: str, reason: Reason, found: str = "", error: ValueError | None = None):
        super().__init__(message)
        self.reason, self.found, self.error = reason, found, error


def read_json(text: bytes, *, deepest: int = MOST_DEPTH, pairs: Any = None) -> Any:
    """Reads a JSON text in UTF-8, with or without a byte-order mark.

    Args:
      text: the text.
      deepest: how many containers may be in each other.
      pairs: `object_pairs_hook` of `json.loads`.

    Raises:
      JsonError: it is not one, or it holds a number that is none in JSON or too large, half a surrogate pair, or values
        nested too deeply.
    """
    text = text.removeprefix(codecs.BOM_UTF8)
    numbers: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite}
    try:
        content = json.loads(text.decode(), object_pairs_hook=pairs, **numbers)
        if b"\\u" in text:  # the one way for half a pair to get into text that is UTF-8
            json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise JsonError(f"not JSON: {error.msg} at {line}column {error.colno}", "syntax", error=error) from None
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 text (byte {error.start}); expected UTF-8", "text", error=error) from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise JsonError(f"not text: it holds half a surrogate pair ({half})", "half", half) from None
    except JsonError:
        raise
    except ValueError:  # a whole number of too many digits: read again to say how many, and slowly
        return json.loads(text.decode(), parse_int=_short, **numbers)
    except RecursionError:
        raise JsonError("nested too deeply to be read", "deep") from None
    if _deeper(content, deepest):
        raise JsonError(f"nested too deeply; expected at most {deepest} levels", "deep")
    return content


def _deeper(content: Any, most: int) -> bool:
    """Whether more than so many containers are in each other."""
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(most):
        inner = (value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer))
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise JsonError(f"not JSON: {name} is not a JSON number", "constant", name)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonError(f"not usable: the number {text:.40} is too large", "large", text)
    return value


def _short(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise JsonError(f"not usable: a number has {len(text):,} digits", "digits", text, error) from None
