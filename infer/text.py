"""A row's tokens as text, piece by piece, up to a stop string; of a chat, reasoning, answer and tool calls apart."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from v4_jax import chat
from v4_jax.chat.parsing import possible_marker
from v4_jax.chat.protocol import SEPARATOR
from v4_jax.infer.engine.requests import Event, Finish
from v4_jax.tokenizer import Tokenizer

Piece = tuple[str, str]


class CallPiece(NamedTuple):
    """What is added to the calls of tools.

    Attributes:
      number: of the call among the reply's.
      id: of the call.
      name: of the tool, where the call begins; None where it goes on.
      arguments: what its arguments, in JSON, go on with.
    """

    number: int
    id: str
    name: str | None
    arguments: str


class StopStrings:
    """Cuts a text that comes in pieces at the first stop string, which is not part of it.

    Text that may be the beginning of a stop string waits until the next piece decides, so that no piece ever shows part
    of one.

    Args:
      stops: strings that end the text; of several that occur, the one that begins first counts.

    Attributes:
      stopped: whether a stop string was met. What comes after it is ignored.
      found: which one; None as long as none was.

    Raises:
      ValueError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty; expected at least one character")
        self._stops, self._held = tuple(stops), ""
        self.stopped = False
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """Returns the text that a piece makes certain, often ""."""
        if self.stopped:
            return ""
        text, self._held = self._held + piece, ""
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            at, self.found = min(found)
            return text[:at]
        self._held = possible_marker(text, self._stops)
        return text.removesuffix(self._held)

    def flush(self) -> str:
        """Returns what still waits: nothing follows."""
        held, self._held = self._held, ""
        return held


class Reply:
    """Tokens in, pieces of (kind, text) out; kinds are "reasoning", "content" and "tool_calls".

    Args:
      tokenizer: decodes the tokens.
      stops: strings that end the reply where they occur in its content.
      thinking_mode: the chat prompt's; None for plain continuation, which is all "content".
      origin: what tells this reply from others of a conversation; its calls' ids follow from it.
      one_call: whether it ends with its first call of a tool.

    Attributes:
      text: what the model wrote so far, by kind.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        thinking_mode: str | None,
        origin: bytes = b"",
        one_call: bool = False,
    ) -> None:
        self._stream, self._stops, self._origin = tokenizer.stream(), StopStrings(stops), origin
        self._splitter = chat.StreamSplitter(thinking_mode) if thinking_mode else None
        self._calls, self._one_call = chat.CallStream(), one_call
        self._streamed: list[tuple[str, str]] = []  # the calls that were said of the block so far: name and arguments
        self._new_calls: list[CallPiece] = []
        self.text: dict[str, str] = {}

    @property
    def stopped(self) -> bool:
        """Whether it is over before the model ends it: a stop string was met, or the one call is there."""
        return self._stops.stopped or (self._one_call and self._calls.complete > 0)

    @property
    def stop_string(self) -> str | None:
        """The stop string that was met."""
        return self._stops.found

    @property
    def reasoning(self) -> bool:
        """Whether what comes next belongs to the reasoning."""
        return self._splitter is not None and self._splitter.kind == "reasoning"

    def echo(self, token: int) -> list[Piece]:
        """The pieces that a token of the prompt makes certain, where that is a part of the reply: it stops nothing."""
        return self._keep("content", self._stream.push(token))

    def push(self, token: int) -> list[Piece]:
        """The pieces that a token makes certain."""
        return [] if self.stopped else self._split(self._stream.push(token))

    def finish(self) -> list[Piece]:
        """The pieces that still waited, and what the model said after its tool calls."""
        if self.stopped:
            return []
        pieces = self._split(self._stream.flush())
        if self._splitter:
            pieces += self._sort(self._splitter.finish())
        if (block := self.text.get("tool_calls")) and (said := chat.read_tool_calls(block).text):
            between = SEPARATOR if self.text.get("content") else ""
            pieces += self._sort([("content", between + said)])
        return pieces + self._keep("content", self._stops.flush())

    def message(self) -> dict[str, Any]:
        """What an assistant wrote so far: content, and where there are any reasoning_content and tool_calls.

        Tool calls that are cut short or cannot be read are handed on as they are, as "unparsed_tool_calls".
        """
        found: dict[str, Any] = {"content": self.text.get("content", "")}
        if reasoning := self.text.get("reasoning"):
            found["reasoning_content"] = reasoning
        if block := self.text.get("tool_calls"):
            calls, unparsed, _ = chat.read_tool_calls(block)
            calls = calls[:1] if self._one_call else calls
            if calls:
                found["tool_calls"] = [{"id": self._call_id(number), **call} for number, call in enumerate(calls)]
            if unparsed:
                found["unparsed_tool_calls"] = unparsed
        return found

    def take_calls(self, *, final: bool) -> list[CallPiece]:
        """What is new of the calls, at most one piece for each.

        Args:
          final: whether the reply is finished: then calls that were not followed while they were written come, too. One
            that cannot be read after all stays as it is, and is a part of what the message has unparsed.
        """
        if final:
            after = 0
            for call in self.message().get("tool_calls", ()):
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                places = range(after, len(self._streamed))
                same = (
                    i for i in places if self._streamed[i][0] == name and arguments.startswith(self._streamed[i][1])
                )
                place = next(same, len(self._streamed))
                begun = place < len(self._streamed)
                rest = arguments.removeprefix(self._streamed[place][1]) if begun else arguments
                self._add_call(place, None if begun else name, rest)
                after = place + 1
        found: dict[int, CallPiece] = {}
        for piece in self._new_calls:
            before = found.get(piece.number)
            found[piece.number] = before._replace(arguments=before.arguments + piece.arguments) if before else piece
        self._new_calls = []
        return list(found.values())

    def _add_call(self, number: int, name: str | None, arguments: str) -> None:
        if name is not None:
            self._streamed.append((name, ""))
        elif not arguments:
            return
        self._streamed[number] = self._streamed[number][0], self._streamed[number][1] + arguments
        self._new_calls.append(CallPiece(number, self._call_id(number), name, arguments))

    def _call_id(self, number: int) -> str:
        return "call_" + hashlib.sha256(self._origin + b"/%d" % number).hexdigest()[:24]

    def _split(self, text: str) -> list[Piece]:
        return self._sort(self._splitter.feed(text) if self._splitter else [("content", text)])

    def _sort(self, pieces: list[Piece]) -> list[Piece]:
        """Keeps pieces, of content what stands before a stop string."""
        sorted_: list[Piece] = []
        for kind, text in pieces:
            if self.stopped:
                break
            if kind == "content":
                text = self._stops.feed(text)
            elif kind == "tool_calls":  # content is over
                sorted_ += self._keep("content", self._stops.flush())
            sorted_ += self._keep(kind, text)
        return sorted_

    def _keep(self, kind: str, text: str) -> list[Piece]:
        if not text:
            return []
        self.text[kind] = self.text.get(kind, "") + text
        if kind == "tool_calls":
            for delta in self._calls.feed(text):
                self._add_call(*delta)
            if self.stopped:  # what begins another call
                self.text[kind] = self.text[kind].removesuffix(self._calls.unread)
        return [(kind, text)]


@dataclasses.dataclass(eq=False)
class Sample:
    """One of a request's samples as it grows: the engine's events in, text out.

    Attributes:
      reply: its text.
      stop_ids: tokens that end it and are no text.
      events: its tokens.
      finish: "stop", "length" or "error" once it has ended.
      reasoning_tokens: of its tokens, those of the reasoning, which come first.
      echoed: how many of its first tokens are the prompt's.
    """

    reply: Reply
    stop_ids: frozenset[int]
    events: list[Event] = dataclasses.field(default_factory=list)
    finish: Finish | None = None
    reasoning_tokens: int = 0
    echoed: int = 0

    def push(self, event: Event) -> list[Piece]:
        """Takes a token and returns the pieces that it makes certain."""
        self.events.append(event)
        self.reasoning_tokens += self.reply.reasoning
        # A text also stops where its grammar leaves nothing to add: that token is a part of it.
        said = event.finish != "error" and event.id not in self.stop_ids
        if len(self.events) <= self.echoed:
            pieces = self.reply.echo(event.id)
        else:
            pieces = self.reply.push(event.id) if said else []
        if event.finish or self.reply.stopped:
            pieces += self.reply.finish()
            self.finish = "stop" if self.reply.stopped else event.finish
        return pieces

    @property
    def new_tokens(self) -> int:
        """Tokens that were generated so far."""
        return max(0, len(self.events) - self.echoed)

    @property
    def cut(self) -> bool:
        """Whether a stop string ended it in place of the engine, which is then to be told so."""
        return self.finish is not None and self.events[-1].finish is None
