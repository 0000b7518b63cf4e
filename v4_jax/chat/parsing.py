"""The model's text back to a message: strictly when it is finished, leniently while it streams.

`parse` accepts exactly what `encode` writes for an assistant turn and raises on anything else, so a tool call is
either what the model meant or an error. `StreamSplitter` never raises: a reply that was cut short, or is not well
formed, is still shown to whoever is reading it.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from v4_jax.chat import protocol

# The text between the fields of the templates is the grammar. One tool-call block is
#   CALLS_OPEN newline (INVOKE_OPEN name NAME_CLOSE parameters INVOKE_CLOSE newline)* CALLS_CLOSE
# where parameters are one per line, and a call without any leaves an empty line.
CALLS_OPEN, CALLS_CLOSE = (text.strip("\n") for text in protocol.literals(protocol.TOOL_CALLS))
INVOKE_OPEN, NAME_CLOSE, INVOKE_CLOSE = (text.strip("\n") for text in protocol.literals(protocol.INVOKE))
PARAMETER_OPEN, KIND_OPEN, KIND_CLOSE, PARAMETER_CLOSE = protocol.literals(protocol.PARAMETER)
_CALLS_START = protocol.SEPARATOR + CALLS_OPEN  # as it stands after the content

# What no argument may hold. The other special tokens may occur: a model can write a file that speaks of them.
TAG_TOKENS = (protocol.DSML, protocol.EOS)


class ParseError(ValueError):
    """The model's text is not a complete, well-formed assistant turn."""


def parse(text: str, thinking_mode: str) -> dict[str, Any]:
    """Reads one finished assistant turn (the release's encoding), the inverse of `encode` for that turn.

    Args:
        text: What the model wrote after the prompt, EOS included. Where generation stops at EOS without keeping
            it, add `chat.EOS`, and only then: a text without it was cut short, unless it ends with a complete
            block of tool calls.
        thinking_mode: The mode of the prompt. "thinking" requires reasoning, closed; an answer to a quick
            instruction has none and is read as "chat".

    Returns:
        A message with `role`, `content`, `reasoning_content` (both "" where absent) and `tool_calls` in OpenAI form,
        `arguments` being a JSON string.

    Raises:
        ParseError: The text is partial or malformed.
        ValueError: `thinking_mode` is unknown.
    """
    protocol.check_thinking_mode(thinking_mode)
    reader = _Reader(text)
    reasoning = ""
    if thinking_mode == "thinking":
        reasoning = reader.until(protocol.THINK_CLOSE, "the reasoning")
        check_plain(reasoning, "the reasoning")

    content, stop = reader.until_first((protocol.EOS, _CALLS_START), "the content")
    check_plain(content, "the content")
    tool_calls = []
    if stop == _CALLS_START:
        tool_calls = list(_read_calls(reader))
        if not reader.at_end():  # a block that is complete needs no EOS, as the release has it
            reader.expect(protocol.EOS, "after the tool calls")
    if not reader.at_end():
        reader.fail("the end of the text after EOS")
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}


def parse_tool_calls(block: str) -> list[dict[str, Any]]:
    """Reads the tool-call block of a reply, the "tool_calls" text of a `StreamSplitter`.

    Args:
        block: From the opening tag to the closing one.

    Returns:
        The calls in OpenAI form, `arguments` being a JSON string.

    Raises:
        ParseError: The block is partial or malformed.
    """
    reader = _Reader(block)
    reader.expect(CALLS_OPEN, "at the start of the tool calls")
    calls = list(_read_calls(reader))
    if not reader.at_end():
        reader.fail("the end of the text after the tool calls")
    return calls


class _Reader:
    """A position in a text, and the errors that name it."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def at_end(self) -> bool:
        return self._at == len(self._text)

    def accept(self, literal: str) -> bool:
        found = self._text.startswith(literal, self._at)
        if found:
            self._at += len(literal)
        return found

    def expect(self, literal: str, where: str) -> None:
        if not self.accept(literal):
            self.fail(f"{literal!r} {where}")

    def until(self, literal: str, what: str) -> str:
        """Returns the text before the next `literal`, and moves behind it."""
        return self.until_first((literal,), what)[0]

    def until_first(self, literals: Iterable[str], what: str) -> tuple[str, str]:
        """Returns the text before the first of several `literals`, and which one it was; moves behind it."""
        found = [(end, literal) for literal in literals if (end := self._text.find(literal, self._at)) >= 0]
        if not found:
            raise ParseError(f"expected {' or '.join(map(repr, literals))} after {what}, but the text ends without it")
        start, (end, literal) = self._at, min(found)
        self._at = end + len(literal)
        return self._text[start:end], literal

    def fail(self, expected: str) -> NoReturn:
        found = self._text[self._at : self._at + 40]
        raise ParseError(
            f"expected {expected}, " + (f"found {found!r} at character {self._at}" if found else "but the text ends")
        )


def _read_calls(reader: _Reader) -> Iterator[dict[str, Any]]:
    """Reads what follows the opening tag of a tool-call block, its closing tag included."""
    reader.expect("\n", "after the opening tag")
    while reader.accept(INVOKE_OPEN):
        name = reader.until(NAME_CLOSE, "the tool's name")
        check_plain(name, "a tool's name", TAG_TOKENS)
        reader.expect("\n", "after the tool's name")
        arguments: dict[str, str] = {}
        while reader.accept(PARAMETER_OPEN):
            parameter = reader.until(KIND_OPEN, "the parameter's name")
            kind = reader.until(KIND_CLOSE, "the parameter's kind")
            value = reader.until(PARAMETER_CLOSE, "the parameter's value")
            # A tag in here means that one was not closed: two parameters would be read as one.
            check_plain(parameter + value, "a parameter", TAG_TOKENS)
            reader.expect("\n", "after the parameter")
            if parameter in arguments:
                raise ParseError(f"tool {name!r} is called with parameter {parameter!r} twice; once is legal")
            arguments[parameter] = _read_value(parameter, kind, value)
        if not arguments:
            reader.accept("\n")
        reader.expect(INVOKE_CLOSE, f"or a parameter in the call of {name!r}")
        reader.expect("\n", "after the call")
        yield tool_call(name, arguments)
    reader.expect(CALLS_CLOSE, "or a call in the tool calls")


def tool_call(name: str, arguments: Mapping[str, str]) -> dict[str, Any]:
    """A call in OpenAI form, from its arguments' JSON by name."""
    # Values that are JSON stay as the model wrote them: parsing and writing them again may change numbers.
    written = ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in arguments.items())
    return {"type": "function", "function": {"name": name, "arguments": "{" + written + "}"}}


def check_json(text: str) -> None:
    """Raises ValueError or RecursionError if a text is not JSON."""
    json.loads(text, parse_constant=_refuse_constant)


def _read_value(parameter: str, kind: str, value: str) -> str:
    """Returns the JSON of a parameter's value."""
    if kind == "true":
        return json.dumps(value, ensure_ascii=False)
    if kind != "false":
        raise ParseError(f"parameter {parameter!r} is marked {kind!r}; legal marks are 'true' and 'false'")
    try:
        check_json(value)
    except (ValueError, RecursionError) as error:
        raise ParseError(f"parameter {parameter!r} has the value {value[:80]!r}, which is not JSON: {error}") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")  # json.loads takes NaN and Infinity, other languages do not


def check_plain(text: str, what: str, tokens: Iterable[str] = protocol.SPECIAL_TOKENS) -> None:
    """Raises ParseError if a text holds one of some special tokens."""
    for token in tokens:
        if token in text:
            raise ParseError(f"found the special token {token!r} inside {what}, which must be plain text")


# Where tool calls begin, as models write it: no text holds this token, so the opening tag or the blank line before it
# may be missing or misspelled.
_CALL_MARKERS = tuple(before + tag + protocol.DSML for before in (protocol.SEPARATOR, "\n", "") for tag in ("<", "</"))

# For each kind of text in a reply, the markers that end it, and the kind that comes next (None: nothing does).
_MARKERS: dict[str, dict[str, str | None]] = {
    "reasoning": {protocol.THINK_CLOSE: "content", protocol.EOS: None},
    "content": {**dict.fromkeys(_CALL_MARKERS, "tool_calls"), protocol.EOS: None},
    "tool_calls": {protocol.EOS: None},
}


class StreamSplitter:
    """Sorts a reply into reasoning, content and tool calls as it arrives, in pieces of any size.

    No piece it returns holds part of a marker (the end of reasoning, the opening of the tool calls, EOS): text that
    may be the start of one is held back until the next characters decide, so at most a marker's length waits. Joined
    by kind, the pieces are `parse`'s reasoning and content, and the block that `parse_tool_calls` reads; neither EOS
    nor the blank line before the block belongs to any kind. It works with and without EOS at the end.

        splitter = StreamSplitter("thinking")
        for text in stream:
            for kind, piece in splitter.feed(text): ...
        for kind, piece in splitter.finish(): ...

    Args:
        thinking_mode: The mode of the prompt; "thinking" begins with reasoning, "chat" with content.

    Attributes:
        kind: Of the text that comes next, as far as is known.
        ended: Whether EOS was seen. What is fed after it is not part of the reply and is ignored.

    Raises:
        ValueError: `thinking_mode` is unknown.
    """

    def __init__(self, thinking_mode: str) -> None:
        protocol.check_thinking_mode(thinking_mode)
        self.kind = "reasoning" if thinking_mode == "thinking" else "content"
        self._held = ""
        self.ended = False

    def feed(self, text: str) -> list[tuple[str, str]]:
        """Takes the next text and returns the (kind, text) pieces that are now certain, none of them empty."""
        if self.ended:
            return []
        pieces: list[tuple[str, str]] = []
        text = self._held + text
        while not self.ended:
            markers = _MARKERS[self.kind]
            at, marker = min(((text.find(m), m) for m in markers if m in text), default=(-1, ""))
            if not marker:
                break
            pieces.append((self.kind, text[:at]))
            text = text[at + len(marker) :]
            following = markers[marker]
            if following is None:
                self.ended, text = True, ""
            else:
                self.kind = following
                if following == "tool_calls":
                    text = marker.lstrip("\n") + text  # the block keeps its tag
        self._held = "" if self.ended else possible_marker(text, _MARKERS[self.kind])
        pieces.append((self.kind, text.removesuffix(self._held)))
        return [(kind, piece) for kind, piece in pieces if piece]

    def finish(self) -> list[tuple[str, str]]:
        """Returns what was still held back, of the current kind: nothing follows that could make it a marker."""
        piece, self._held = self._held, ""
        return [(self.kind, piece)] if piece else []


def possible_marker(text: str, markers: Collection[str]) -> str:
    """Returns the longest end of `text` that is the beginning of a marker."""
    longest = min(len(text), max(map(len, markers), default=1) - 1)
    for length in range(longest, 0, -1):
        end = text[-length:]
        if any(marker.startswith(end) for marker in markers):
            return end
    return ""
