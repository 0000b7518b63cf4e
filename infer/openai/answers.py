"""Answers in the form of OpenAI's chat completions and completions, whole or streamed.

An answer has its reasoning apart, as `reasoning_content`.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from v4_jax.infer.engine.requests import Event
from v4_jax.infer.openai.api import Api, ApiError, Question, openai_error, server_sent
from v4_jax.infer.openai.bodies import ChatBody, read_body
from v4_jax.infer.openai.completions import Completion, Update
from v4_jax.infer.text import CallPiece, Sample

_STREAMED = {"content": "content", "reasoning": "reasoning_content"}  # kinds of text that come as they are written


class Answer:
    """Writes the answer to one body.

    Args:
      completion: its tokens.
      name: its id.
    """

    def __init__(self, completion: Completion, name: str) -> None:
        self._completion, self._body, self._name = completion, completion.body, name
        self._chat = isinstance(completion.body, ChatBody)
        counts = completion.body.stream_options is not None and completion.body.stream_options.include_usage
        self._no_usage_yet = {"usage": None} if counts else {}

    def answer(self) -> dict[str, Any]:
        """The completion object, "chat.completion" or "text_completion"."""
        kind = "chat.completion" if self._chat else "text_completion"
        choices = [self._choice(number, choice) for number, choice in enumerate(self._completion.choices)]
        return self._envelope(kind) | {"choices": choices, "usage": usage(self._completion)}

    def begin(self) -> Iterator[bytes]:
        """In a chat, who speaks."""
        if self._chat:
            said = {"role": "assistant", "content": ""}
            for number in range(len(self._completion.choices)):
                yield self._chunk({"index": number, "delta": said, "finish_reason": None, "logprobs": None})

    def update(self, update: Update) -> Iterator[bytes]:
        """A chunk, if there is something to say."""
        choice = update.choice
        said: dict[str, Any] = {}
        for kind, text in update.pieces:
            if text and (name := _STREAMED.get(kind)):
                said[name] = said.get(name, "") + text
        if update.calls:
            said["tool_calls"] = [_call(piece) for piece in update.calls]
        finish = self._completion.finish_reason(choice)
        if finish and (unparsed := choice.reply.message().get("unparsed_tool_calls")):
            said["unparsed_tool_calls"] = unparsed
        logprobs = self._logprobs(update.number, [update.event], first=len(choice.events) == 1)
        if said or finish or logprobs:
            common = {"index": update.number, "finish_reason": finish, "logprobs": logprobs}
            yield self._chunk(common | ({"delta": said} if self._chat else {"text": said.get("content", "")}))

    def end(self) -> Iterator[bytes]:
        """Perhaps the usage, and a mark."""
        if self._no_usage_yet:
            kind = self._envelope(self._kind_of_chunk)
            yield server_sent(kind | {"choices": [], "usage": usage(self._completion)})
        yield b"data: [DONE]\n\n"

    @property
    def _kind_of_chunk(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return server_sent(self._envelope(self._kind_of_chunk) | {"choices": [choice]} | self._no_usage_yet)

    def _envelope(self, kind: str) -> dict[str, Any]:
        """What objects about this completion have in common."""
        completion = self._completion
        return {"id": self._name, "object": kind, "created": completion.created, "model": completion.model.name}

    def _choice(self, number: int, choice: Sample) -> dict[str, Any]:
        written = choice.reply.message()
        finish = self._completion.finish_reason(choice)
        common = {"index": number, "finish_reason": finish, "logprobs": self._logprobs(number, choice.events)}
        if self._chat:
            return common | {"message": {"role": "assistant", **written}}
        return common | {"text": written["content"]}

    def _logprobs(self, number: int, events: Sequence[Event], *, first: bool = True) -> dict[str, Any] | None:
        """Log-probabilities of tokens of a choice, in the form of the body's kind; None if they are not asked for.

        Args:
          number: of the choice.
          events: the tokens.
          first: whether they are its first ones.
        """
        if not self._body.wants_logprobs:
            return None
        if self._chat:
            return {"content": [token_logprobs(self._completion, event) for event in events]}
        name = self._completion.token_name
        found: dict[str, Any] = {
            "tokens": [name(event.id) for event in events],
            "token_logprobs": [event.logprob for event in events],
        }
        if self._body.alternatives:
            found["top_logprobs"] = [{name(id): value for id, value in event.alternatives} for event in events]
        if first and (echoed := self._completion.first_echoed(number)) is not None:
            found = {key: [name(echoed) if key == "tokens" else None, *values] for key, values in found.items()}
        return found


def _call(piece: CallPiece) -> dict[str, Any]:
    """What a stream says of a call."""
    if piece.name is None:
        return {"index": piece.number, "function": {"arguments": piece.arguments}}
    called = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.number, "id": piece.id, "type": "function", "function": called}


def token_logprobs(completion: Completion, event: Event) -> dict[str, Any]:
    """A token's log-probability, and those of the most probable ones in its place, as chats have them."""

    def one(id: int, logprob: float) -> dict[str, Any]:
        spelled = completion.model.tokenizer.token_bytes(id)
        return {
            "token": completion.token_name(id),
            "logprob": logprob,
            "bytes": None if spelled is None else list(spelled),
        }

    return one(event.id, event.logprob) | {"top_logprobs": [one(*other) for other in event.alternatives]}


def usage(completion: Completion) -> dict[str, Any]:
    """Tokens read and generated; what of the prompt was cached, as DeepSeek and OpenAI say it; how drafts fared."""
    prompt, new, cached, drafts = (
        completion.prompt_tokens,
        completion.new_tokens,
        completion.cached,
        completion.drafts(),
    )
    offered, accepted = (sum(counts) for counts in zip(*drafts, strict=True)) if drafts else (0, 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "reasoning_tokens": completion.reasoning_tokens,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": offered - accepted,
            "drafts_by_position": [one._asdict() for one in drafts],
        },
    }


def _read(content: Any, *, chat: bool) -> Question:
    prefix = "chatcmpl" if chat else "cmpl"
    return Question(
        read_body(content, chat=chat), lambda completion: Answer(completion, f"{prefix}-{uuid.uuid4().hex}")
    )


def _error_event(error: ApiError) -> bytes:
    return server_sent(openai_error(error))


CHAT = Api("/v1/chat/completions", functools.partial(_read, chat=True), openai_error, _error_event)
TEXT = Api("/v1/completions", functools.partial(_read, chat=False), openai_error, _error_event)
