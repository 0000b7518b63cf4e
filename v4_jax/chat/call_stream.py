"""Tool calls while they are being written: each one's name as soon as it stands, its arguments as JSON piece by piece.

What `encode` writes is followed, and nothing else: where a block departs from that, nothing more is said of it, and
`read_tool_calls` has the word when the block is complete.
"""

import json
from collections.abc import Generator, Iterator
from typing import NamedTuple

from v4_jax.chat.parsing import (
    CALLS_CLOSE,
    CALLS_OPEN,
    INVOKE_CLOSE,
    INVOKE_OPEN,
    KIND_CLOSE,
    KIND_OPEN,
    NAME_CLOSE,
    PARAMETER_CLOSE,
    PARAMETER_OPEN,
    TAG_TOKENS,
    ParseError,
    check_json,
    check_plain,
    possible_marker,
)

# What ends a parameter's text, or must not be in it: the beginning of one waits for its end.
_MARKERS = (PARAMETER_CLOSE, *TAG_TOKENS)


class CallDelta(NamedTuple):
    """What is added to a block's calls.

    Attributes:
        number: Of the call in the block.
        name: Of the tool, where the call begins; None where it goes on.
        arguments: What its arguments, in JSON, go on with.
    """

    number: int
    name: str | None
    arguments: str


class CallStream:
    """Reads one block of tool calls, in pieces of any size.

    A parameter that is text comes as it is written, any other one when it is complete and known to be JSON. Joined,
    the arguments of a call that has ended are those of `parse_tool_calls`.

    Attributes:
        complete: Calls that have ended.
        unread: Text that was fed and not yet understood.
    """

    def __init__(self) -> None:
        self.complete = 0
        self.unread = ""
        self._said: list[CallDelta] = []
        self._over = False
        self._reader = self._read()

    def feed(self, text: str) -> list[CallDelta]:
        """Takes the next text of the block, and returns what it makes certain."""
        self.unread += text
        if not self._over:
            try:
                next(self._reader)
            except (StopIteration, ParseError):
                self._over = True
        said, self._said = self._said, []
        return said

    # A reader yields where it needs more text.

    def _read(self) -> Iterator[None]:
        yield from self._expect(CALLS_OPEN + "\n")
        while (yield from self._accept(INVOKE_OPEN, CALLS_CLOSE)):
            yield from self._read_call()
            self.complete += 1
            yield from self._expect("\n")

    def _read_call(self) -> Iterator[None]:
        name = yield from self._until(NAME_CLOSE)
        check_plain(name, "a tool's name", TAG_TOKENS)
        self._say("", name)
        yield from self._expect("\n")
        names: set[str] = set()
        while (yield from self._accept(PARAMETER_OPEN, INVOKE_CLOSE if names else f"\n{INVOKE_CLOSE}", INVOKE_CLOSE)):
            parameter = yield from self._until(KIND_OPEN)
            check_plain(parameter, "a parameter", TAG_TOKENS)
            if parameter in names:
                raise ParseError(f"parameter {parameter!r} is given twice")
            before = f"{', ' if names else '{'}{json.dumps(parameter, ensure_ascii=False)}: "
            names.add(parameter)
            kind = yield from self._until(KIND_CLOSE)
            if kind == "true":
                self._say(f'{before}"')
                yield from self._read_text()
                self._say('"')
            elif kind == "false":
                value = yield from self._until(PARAMETER_CLOSE)
                check_plain(value, "a parameter", TAG_TOKENS)
                try:
                    check_json(value)
                except (ValueError, RecursionError):
                    raise ParseError(f"parameter {parameter!r} is not JSON") from None
                self._say(before + value)
            else:
                raise ParseError(f"parameter {parameter!r} is marked {kind!r}")
            yield from self._expect("\n")
        self._say("}" if names else "{}")

    def _read_text(self) -> Iterator[None]:
        """A parameter that is text, to its end."""
        while True:
            text, closed, rest = self.unread.partition(PARAMETER_CLOSE)
            self.unread = rest if closed else possible_marker(text, _MARKERS)
            text = text if closed else text.removesuffix(self.unread)
            check_plain(text, "a parameter", TAG_TOKENS)
            if text:
                self._say(json.dumps(text, ensure_ascii=False)[1:-1])
            if closed:
                return
            yield

    def _say(self, arguments: str, name: str | None = None) -> None:
        self._said.append(CallDelta(self.complete, name, arguments))

    def _expect(self, literal: str) -> Iterator[None]:
        yield from self._accept(literal)

    def _accept(self, *literals: str) -> Generator[None, None, bool]:
        """Moves behind one of some texts; whether it is the first one.

        Raises:
            ParseError: None of them stands there.
        """
        while True:
            for literal in literals:
                if self.unread.startswith(literal):
                    self.unread = self.unread[len(literal) :]
                    return literal == literals[0]
            if not any(literal.startswith(self.unread) for literal in literals):
                raise ParseError(f"expected {' or '.join(map(repr, literals))}, found {self.unread[:40]!r}")
            yield

    def _until(self, literal: str) -> Generator[None, None, str]:
        """The text before the next `literal`; moves behind it."""
        while literal not in self.unread:
            yield
        found, _, self.unread = self.unread.partition(literal)
        return found
