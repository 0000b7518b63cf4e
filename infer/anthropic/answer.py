"""Answers in the form of Anthropic's Messages API: blocks of thinking, text and calls, whole or event by event."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from typing import Any

from v4_jax.infer.anthropic.body import read_count_body, read_messages_body
from v4_jax.infer.openai.api import Api, ApiError, Question, server_sent
from v4_jax.infer.openai.blocks import Block, GrowingBlocks, whole_blocks
from v4_jax.infer.openai.completions import Completion, Update
from v4_jax.json_text import JsonError, read_json

_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesAnswer:
    """Writes the answer to one body.

    Args:
      completion: its tokens.
    """

    def __init__(self, completion: Completion) -> None:
        self._completion, self._growing = completion, GrowingBlocks()
        self._id = f"msg_{uuid.uuid4().hex}"

    def answer(self) -> dict[str, Any]:
        """The message."""
        blocks = [_written(block) for block in whole_blocks(self._completion.choices[0])]
        return self._message(blocks) | self._ended()

    def begin(self) -> Iterator[bytes]:
        """Who speaks."""
        yield _event("message_start", message=self._message([]) | {"stop_reason": None, "stop_sequence": None})

    def update(self, update: Update) -> Iterator[bytes]:
        """What a token adds to blocks, and which begin and end with it."""
        for step in self._growing.update(update):
            if step.what == "begin":
                empty = _written(Block(step.block.kind, "", step.block.id, step.block.name))
                yield _event("content_block_start", index=step.place, content_block=empty)
            elif step.what == "add":
                yield _event("content_block_delta", index=step.place, delta=_delta(step.block, step.added))
            else:
                yield _event("content_block_stop", index=step.place)

    def end(self) -> Iterator[bytes]:
        """Why it ended."""
        yield _event("message_delta", delta=self._ended(), usage=self._usage())
        yield _event("message_stop")

    def _message(self, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        common = {"id": self._id, "type": "message", "role": "assistant", "model": self._completion.model.name}
        return common | {"content": blocks, "usage": self._usage()}

    def _ended(self) -> dict[str, Any]:
        [choice] = self._completion.choices
        if found := choice.reply.stop_string:
            return {"stop_reason": "stop_sequence", "stop_sequence": found}
        reason = self._completion.finish_reason(choice) or "stop"
        return {"stop_reason": _STOPS[reason], "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        completion = self._completion
        return {
            "input_tokens": completion.prompt_tokens - completion.cached,  # those that were read
            "cache_read_input_tokens": completion.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": completion.new_tokens,
            "output_tokens_details": {"thinking_tokens": completion.reasoning_tokens},
        }


def _written(block: Block) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}  # nothing is signed
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": _arguments(block.text)}


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments as values; as they were written, where they have none."""
    try:
        return read_json((text or "{}").encode())
    except JsonError:
        return {"arguments": text}


def _delta(block: Block, added: str) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text_delta", "text": added}
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": added}
    return {"type": "input_json_delta", "partial_json": added}


def _event(kind: str, **content: Any) -> bytes:
    return server_sent({"type": kind} | content, kind)


def _error(error: ApiError) -> dict[str, Any]:
    return {"type": "error", "error": {"type": _ERRORS.get(error.status, "api_error"), "message": str(error)}}


MESSAGES = Api(
    "/v1/messages",
    lambda content: Question(read_messages_body(content), MessagesAnswer),
    _error,
    lambda error: server_sent(_error(error), "error"),
)

COUNT_TOKENS = dataclasses.replace(
    MESSAGES,
    path="/v1/messages/count_tokens",
    read=lambda content: Question(read_count_body(content), MessagesAnswer),
    at_once=lambda completion: {"input_tokens": completion.prompt_tokens},
)
