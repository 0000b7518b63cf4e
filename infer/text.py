"""A row's tokens as text, piece by piece, up to a stop string; of a chat, reasoning, answer and tool calls apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from v4_jax import chat
from v4_jax.infer.engine.requests import Event, Finish
from v4_jax.tokenizer import Tokenizer

Piece = tuple[str, str]


class StoppingText:
    """Decodes one row's tokens and cuts the text at the first stop string, which is not part of it.

    Text that may be the beginning of a stop string waits until the next tokens decide, so that no piece ever shows
    part of one.

    Args:
      tokenizer: decodes the tokens.
      stops: strings that end the text; of several that occur, the one that begins first counts.

    Attributes:
      stopped: whether a stop string was met. What is pushed after it is ignored.

    Raises:
      ValueError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty; expected at least one character")
        self._stream, self._stops = tokenizer.stream(), tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Returns the text that `token` makes certain, often ""."""
        return "" if self.stopped else self._take(self._stream.push(token))

    def flush(self) -> str:
        """Returns what still waits: nothing follows."""
        if self.stopped:
            return ""
        piece = self._take(self._stream.flush())
        held, self._held = self._held, ""
        return piece + held

    def _take(self, piece: str) -> str:
        text, self._held = self._held + piece, ""
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                self._held = text[-length:]
                return text[:-length]
        return text


class Reply:
    """Tokens in, pieces of (kind, text) out; kinds are "reasoning", "content" and "tool_calls".

    Args:
      tokenizer: decodes the tokens.
      stops: strings that end the reply.
      thinking_mode: the chat prompt's; None for plain continuation, which is all "content".

    Attributes:
      text: what the model wrote so far, by kind.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], thinking_mode: str | None) -> None:
        self._decoder = StoppingText(tokenizer, stops)
        self._splitter = chat.StreamSplitter(thinking_mode) if thinking_mode else None
        self.text: dict[str, str] = {}

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._decoder.stopped

    def push(self, token: int) -> list[Piece]:
        """The pieces that a token makes certain."""
        return self._split(self._decoder.push(token))

    def finish(self) -> list[Piece]:
        """The pieces that still waited."""
        pieces = self._split(self._decoder.flush())
        if self._splitter:
            last = self._splitter.finish()
            self._keep(last)
            pieces += last
        return pieces

    def message(self) -> dict[str, Any]:
        """What an assistant wrote so far: content, and where there are any reasoning_content and tool_calls.

        A block of tool calls that is cut short or malformed is handed on as it is, as "unparsed_tool_calls".
        """
        found: dict[str, Any] = {"content": self.text.get("content", "")}
        if reasoning := self.text.get("reasoning"):
            found["reasoning_content"] = reasoning
        if block := self.text.get("tool_calls"):
            try:
                calls = chat.parse_tool_calls(block)
            except chat.ParseError:
                found["unparsed_tool_calls"] = block
            else:
                found["tool_calls"] = [{"id": f"call_{i}", **call} for i, call in enumerate(calls)]
        return found

    def _split(self, text: str) -> list[Piece]:
        pieces = self._splitter.feed(text) if self._splitter else [("content", text)]
        self._keep(pieces)
        return pieces

    def _keep(self, pieces: list[Piece]) -> None:
        for kind, text in pieces:
            self.text[kind] = self.text.get(kind, "") + text


@dataclasses.dataclass(eq=False)
class Sample:
    """One of a request's samples as it grows: the engine's events in, text out.

    Attributes:
      reply: its text.
      stop_ids: tokens that end it and are no text.
      events: its tokens.
      finish: "stop" or "length" once it has ended.
    """

    reply: Reply
    stop_ids: frozenset[int]
    events: list[Event] = dataclasses.field(default_factory=list)
    finish: Finish | None = None

    def push(self, event: Event) -> list[Piece]:
        """Takes a token and returns the pieces that it makes certain."""
        self.events.append(event)
        # A text also stops where its grammar leaves nothing to add: that token is a part of it.
        pieces = [] if event.id in self.stop_ids else self.reply.push(event.id)
        if event.finish or self.reply.stopped:
            pieces += self.reply.finish()
            self.finish = "stop" if self.reply.stopped else event.finish
        return pieces

    @property
    def cut(self) -> bool:
        """Whether a stop string ended it in place of the engine, which is then to be told so."""
        return self.finish is not None and self.events[-1].finish is None
