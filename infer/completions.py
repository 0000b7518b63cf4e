"""Completions in OpenAI's form: what a body asks for, as a request to the engine, and its tokens as the answer.

An answer has its reasoning apart, as `reasoning_content`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from infer.bodies import Body, BodyError, ChatBody, CompletionBody
from infer.engine import Event, Request
from infer.generate import check_ids
from infer.sampling import Sampling
from infer.text import MODES, Mode, Piece, Reply
from v4_jax import chat
from v4_jax.config import Config
from v4_jax.tokenizer import Tokenizer

_STREAMED = {"content": "content", "reasoning": "reasoning_content"}  # kinds of text that come as they are written


class Defaults(NamedTuple):
    """What a body leaves open.

    Attributes:
      sampling: how to sample; its seed where the body has none.
      stop_ids: tokens that end an answer.
      max_tokens: most tokens to generate.
      mode: how a chat is answered.
    """

    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_tokens: int
    mode: Mode = "non-think"


@dataclasses.dataclass(eq=False)
class Choice:
    """One of a request's answers as it grows.

    Attributes:
      reply: its text.
      events: its tokens.
      finish: "stop" or "length" once it has ended.
    """

    reply: Reply
    events: list[Event] = dataclasses.field(default_factory=list)
    finish: str | None = None


class Completion:
    """One body on its way to its answer.

    Args:
      body: what is asked.
      config: the architecture.
      tokenizer: of the model.
      defaults: what the body leaves open.
      max_length: tokens (prompt and answer) that there is room for; a body that does not say how long its answer may
        get gets what is left.

    Attributes:
      request: for the engine.
      choices: the answers, `request.n` of them.

    Raises:
      ValueError: the body cannot be served: the chat format cannot express its messages, or a token id is illegal.
    """

    def __init__(
        self, body: ChatBody | CompletionBody, config: Config, tokenizer: Tokenizer, defaults: Defaults, max_length: int
    ) -> None:
        self.body, self._tokenizer = body, tokenizer
        prompt, thinking_mode, begun = _prompt(body, tokenizer, defaults.mode)
        check_ids(prompt, config)
        limit = body.limit or max(1, min(defaults.max_tokens, max_length - len(prompt)))
        self.request = Request(prompt, limit, _sampling(body, defaults.sampling), defaults.stop_ids, body.n or 1)
        self.choices = [Choice(Reply(tokenizer, body.stops, thinking_mode, begun)) for _ in range(self.request.n)]
        self._created = int(time.time())

    @property
    def done(self) -> bool:
        """Whether all choices have ended."""
        return all(choice.finish for choice in self.choices)

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, all choices together."""
        return sum(len(choice.events) for choice in self.choices)

    def push(self, event: Event) -> list[Piece]:
        """Takes a token and returns the text that it makes certain.

        A choice that ends though its event does not (`finish`) met a stop string: the engine is to be told so.
        """
        choice = self.choices[event.sample]
        choice.events.append(event)
        pieces = choice.reply.push(event.id) if event.finish != "stop" else []
        if event.finish or choice.reply.stopped:
            pieces += choice.reply.finish()
            choice.finish = "stop" if choice.reply.stopped else event.finish
        return pieces

    # ---- the answer --------------------------------------------------------------------------------------------------

    def answer(self, name: str, model: str) -> dict[str, Any]:
        """The completion object, "chat.completion" or "text_completion".

        Args:
          name: its id.
          model: the model's name, where the body has none.
        """
        kind = "chat.completion" if isinstance(self.body, ChatBody) else "text_completion"
        choices = [self._answer(index, choice) for index, choice in enumerate(self.choices)]
        return self.envelope(name, model, kind) | {"choices": choices, "usage": self.usage()}

    def chunk(self, event: Event, pieces: list[Piece]) -> dict[str, Any] | None:
        """What a stream says about a token that was pushed and the text it made certain: a choice of a chunk.

        None while there is nothing to say. Tool calls come whole, when all of them are certain.
        """
        choice = self.choices[event.sample]
        finish = self.finish_reason(choice) if choice.finish else None
        logprobs = self.logprobs([event]) if self.body.wants_logprobs else None
        said: dict[str, Any] = {}
        for kind, text in pieces:
            if name := _STREAMED.get(kind):
                said[name] = said.get(name, "") + text
        if choice.finish:
            message = choice.reply.message()
            if calls := message.get("tool_calls"):
                said["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
            if block := message.get("unparsed_tool_calls"):
                said["unparsed_tool_calls"] = block
        said = {name: value for name, value in said.items() if value}
        if not (said or finish or logprobs):
            return None
        common = {"index": event.sample, "finish_reason": finish, "logprobs": logprobs}
        if isinstance(self.body, ChatBody):
            return common | {"delta": said}
        return common | {"text": said.get("content", "")}

    def envelope(self, name: str, model: str, kind: str) -> dict[str, Any]:
        """What objects about this completion have in common."""
        return {"id": name, "object": kind, "created": self._created, "model": self.body.model or model}

    def usage(self) -> dict[str, Any]:
        """Tokens read and generated."""
        usage = {"prompt_tokens": len(self.request.prompt), "completion_tokens": self.new_tokens}
        return usage | {"total_tokens": sum(usage.values())}

    def _answer(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs = self.logprobs(choice.events) if self.body.wants_logprobs else None
        common = {"index": index, "finish_reason": self.finish_reason(choice), "logprobs": logprobs}
        if not isinstance(self.body, ChatBody):
            return common | {"text": choice.reply.text.get("content", "")}
        return common | {"message": {"role": "assistant", **choice.reply.message()}}

    def finish_reason(self, choice: Choice) -> str | None:
        """Why a choice ended, in OpenAI's words."""
        called = (
            choice.finish == "stop" and isinstance(self.body, ChatBody) and choice.reply.message().get("tool_calls")
        )
        return "tool_calls" if called else choice.finish

    def logprobs(self, events: Sequence[Event]) -> dict[str, Any]:
        """Log-probabilities of tokens, in the form of the body's kind."""
        tokens = [self._tokenizer.decode([event.id]) for event in events]
        if not isinstance(self.body, ChatBody):
            return {"tokens": tokens, "token_logprobs": [event.logprob for event in events]}
        pairs = zip(tokens, events, strict=True)
        content = [
            {"token": token, "logprob": event.logprob, "bytes": _bytes(token), "top_logprobs": []}
            for token, event in pairs
        ]
        return {"content": content}


def _bytes(token: str) -> list[int] | None:
    """A token's UTF-8; None where it is a part of a character only."""
    return None if "\ufffd" in token else list(token.encode())


def _prompt(body: ChatBody | CompletionBody, tokenizer: Tokenizer, mode: Mode) -> tuple[list[int], str | None, str]:
    """Token ids; the thinking mode of the chat format that they are in (None: plain text); how the answer begins."""
    if isinstance(body, ChatBody):
        thinking_mode, effort = MODES[body.mode(mode)]
        tools = None if body.tool_choice == "none" else body.tools
        text = chat.encode(body.messages, thinking_mode=thinking_mode, reasoning_effort=effort, tools=tools)
        forced, tool = body.call()
        if forced and thinking_mode != "chat":
            raise BodyError(
                "tool_choice asks for a tool, which is possible without reasoning only; expected reasoning_effort "
                "'none', or tool_choice 'auto'",
                "tool_choice",
            )
        # A model that has begun to write a call goes on with it.
        begun = chat.begin_tool_call(tool) if forced else ""
        return tokenizer.encode(text + begun), thinking_mode, begun
    if isinstance(body.prompt, list):
        return body.prompt, None, ""
    if not body.prompt:
        raise BodyError("prompt is empty; expected some text", "prompt")
    ids = tokenizer.encode(body.prompt)
    return (ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]), None, ""


def _sampling(body: Body, fallback: Sampling) -> Sampling:
    """The body's parameters, the fallback's where it has none."""
    names = (field.name for field in dataclasses.fields(Sampling))
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    return dataclasses.replace(fallback, **given)
