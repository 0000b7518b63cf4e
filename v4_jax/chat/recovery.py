"""Tool calls as models write them when they are slightly off: what can mean one thing only is taken for it.

`parse` and `parse_tool_calls` accept what `encode` writes and nothing else. A model sometimes leaves out a newline, the
outer tag or a quotation mark, or writes two blocks. Here each call is judged by itself: one that cannot be read is
handed on as it was written, and does not take the others with it.
"""

import json
import re
from typing import Any, NamedTuple

from v4_jax.chat import protocol
from v4_jax.chat.parsing import ParseError, check_json, parse_tool_calls, tool_call

_DSML = re.escape(protocol.DSML)
_QUOTED = r"""\s*=\s*(?:"([^"\n]*)"|'([^'\n]*)')"""
# Of V4, of V3.2, and as V4 misspells it.
_OUTER = re.compile(rf"</?{_DSML}\s*(?:tool_calls|toolcalls|function_calls)\s*>")
# A call ends at its own end: one that was never closed does not reach into the next one.
_INVOKE = re.compile(
    rf"<{_DSML}\s*invoke\s+name{_QUOTED}\s*>((?:(?!<{_DSML}\s*invoke\b).)*?)</{_DSML}\s*invoke\s*>", re.DOTALL
)
_PARAMETER = re.compile(
    rf"<{_DSML}\s*parameter\s+name{_QUOTED}(?:\s+string{_QUOTED})?\s*>(.*?)</{_DSML}\s*parameter\s*>", re.DOTALL
)
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_NOT_WORDS = re.compile(r'[\[{"]|[-+]?(NaN|Infinity|inf|nan)$|[-+.]?\d')  # begins like JSON, or like a number


class ToolCalls(NamedTuple):
    """What a block of tool calls holds.

    Attributes:
      calls: in OpenAI form, `arguments` being a JSON string.
      unparsed: the calls that could not be read, as they were written; "" if there are none.
      text: what stands around the calls and is none, such as a last sentence; "" if there is none.
    """

    calls: list[dict[str, Any]]
    unparsed: str = ""
    text: str = ""


def read_tool_calls(block: str) -> ToolCalls:
    """Reads the tool-call block of a reply, the "tool_calls" text of a `StreamSplitter`, leniently. It never raises."""
    try:
        return ToolCalls(parse_tool_calls(block))
    except ParseError:
        pass
    calls: list[dict[str, Any]] = []
    unparsed: list[str] = []
    text: list[str] = []
    at = 0
    for found in _INVOKE.finditer(block):
        _sort(block[at : found.start()], unparsed, text)
        try:
            calls.append(_read_call(found[1] if found[2] is None else found[2], found[3]))
        except ParseError:
            unparsed.append(found[0])
        at = found.end()
    _sort(block[at:], unparsed, text)
    if not calls:
        return ToolCalls([], block)
    return ToolCalls(calls, "\n".join(unparsed), protocol.SEPARATOR.join(text))


def _sort(between: str, unparsed: list[str], text: list[str]) -> None:
    """Puts what stands between two calls where it belongs: outer tags nowhere, other markup to what was not read."""
    rest = _OUTER.sub("", between).strip()
    if rest:
        is_markup = protocol.DSML in rest or any((tag + protocol.DSML).startswith(rest) for tag in ("<", "</"))
        (unparsed if is_markup else text).append(rest)


def _read_call(name: str, body: str) -> dict[str, Any]:
    """A call, from what stands inside of it.

    Raises:
      ParseError: it is not clear what is meant.
    """
    if not name or _PARAMETER.sub("", body).strip():
        raise ParseError("a call without a name, or with something in it that is no parameter")
    arguments: dict[str, str] = {}
    for found in _PARAMETER.finditer(body):
        parameter = found[1] if found[2] is None else found[2]
        if parameter in arguments or protocol.DSML in found[5]:
            raise ParseError(f"parameter {parameter!r} is given twice, or not closed")
        arguments[parameter] = _read_value(found[4] if found[3] is None else found[3], found[5])
    return tool_call(name, arguments)


def _read_value(is_string: str | None, value: str) -> str:
    """The JSON of a parameter's value: of a mark that is missing or wrong, only a text that nothing else can be."""
    if is_string == "true":
        return json.dumps(value, ensure_ascii=False)
    if is_string not in (None, "false"):
        raise ParseError(f"the mark {is_string!r}")
    try:
        check_json(value)
    except (ValueError, RecursionError):
        word = value.strip()
        if is_string == "false" and word in _PYTHON:
            return _PYTHON[word]
        if word and not _NOT_WORDS.match(word):
            return json.dumps(value, ensure_ascii=False)
        raise ParseError(f"the value {value!r:.80}") from None
    if is_string is None:
        raise ParseError(f"the value {value!r:.80} without a mark may be a text or not")
    return value
