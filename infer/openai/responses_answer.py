"""Answers in the form of OpenAI's Responses API: items of reasoning, text and calls, whole or event by event."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from v4_jax.infer.openai.answers import token_logprobs
from v4_jax.infer.openai.api import Api, ApiError, Question, openai_error, server_sent
from v4_jax.infer.openai.blocks import Block, GrowingBlocks, Step, whole_blocks
from v4_jax.infer.openai.completions import Completion, Update
from v4_jax.infer.openai.responses_body import ResponsesBody, read_responses

_PREFIX = {"reasoning": "rs", "text": "msg", "call": "fc"}
_ECHOED = (
    *("instructions", "max_output_tokens", "max_tool_calls", "metadata", "temperature", "top_p", "top_logprobs"),
    *("user", "service_tier", "prompt_cache_key", "safety_identifier"),
)


class ResponsesAnswer:
    """Writes the answer to one body.

    Args:
      asked: the body.
      completion: its tokens.
    """

    def __init__(self, asked: ResponsesBody, completion: Completion) -> None:
        self._asked, self._completion = asked, completion
        self._id = uuid.uuid4().hex
        self._growing, self._logprobs = GrowingBlocks(), list[dict[str, Any]]()
        self._events = 0

    def answer(self) -> dict[str, Any]:
        """The response object."""
        return self._response(whole_blocks(self._completion.choices[0]))

    def begin(self) -> Iterator[bytes]:
        """That it is being written."""
        for kind in ("created", "in_progress"):
            yield self._event(kind, response=self._response([], "in_progress"))

    def update(self, update: Update) -> Iterator[bytes]:
        """What a token adds to items, and which begin and end with it."""
        # A token's log-probability goes with the text that it makes certain, or with the next one that is.
        answers = len(update.choice.events) > update.choice.reasoning_tokens
        if self._completion.body.wants_logprobs and answers:
            self._logprobs.append(token_logprobs(self._completion, update.event))
        for step in self._growing.update(update):
            yield from self._step(step)

    def end(self) -> Iterator[bytes]:
        """The whole, once more."""
        whole = self._response(self._growing.blocks)
        yield self._event(whole["status"], response=whole)

    def _step(self, step: Step) -> Iterator[bytes]:
        block, at = step.block, {"output_index": step.place, "item_id": self._item_id(step.place, step.block)}
        inside = at if block.kind == "call" else at | {"content_index": 0}
        name = {"reasoning": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}[block.kind]
        if step.what == "begin":
            empty = Block(block.kind, "", block.id, block.name)
            item = self._item(step.place, empty, "in_progress")
            item |= {} if block.kind == "call" else {"content": []}
            yield self._event("output_item.added", output_index=step.place, item=item)
            if block.kind != "call":
                yield self._event("content_part.added", **inside, part=self._part(empty))
        elif step.what == "add":
            yield self._event(f"{name}.delta", **inside, delta=step.added, **self._of_text(block, take=True))
        else:
            said = {"arguments": block.text, "name": block.name} if block.kind == "call" else {"text": block.text}
            yield self._event(f"{name}.done", **inside, **said, **self._of_text(block))
            if block.kind != "call":
                yield self._event("content_part.done", **inside, part=self._part(block))
            item = self._item(step.place, block, self._status(step.place, self._growing.blocks))
            yield self._event("output_item.done", output_index=step.place, item=item)

    def _of_text(self, block: Block, *, take: bool = False) -> dict[str, Any]:
        if block.kind != "text":
            return {}
        found = self._logprobs if take else []
        if take:
            self._logprobs = []
        return {"logprobs": found}

    def _event(self, kind: str, **content: Any) -> bytes:
        number, self._events = self._events, self._events + 1
        name = f"response.{kind}"
        return server_sent({"type": name, "sequence_number": number} | content, name)

    def _response(self, blocks: list[Block], status: str | None = None) -> dict[str, Any]:
        completion, asked = self._completion, self._asked
        status = status or ("incomplete" if self._cut else "completed")
        items = [self._item(place, block, self._status(place, blocks)) for place, block in enumerate(blocks)]
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": completion.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": completion.model.name,
            "output": items,
            "usage": None if status == "in_progress" else _usage(completion),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "background": False,
            "store": False,  # whatever was asked: nothing is kept
            "reasoning": {"effort": asked.reasoning and asked.reasoning.effort, "summary": None},
            "text": asked.text.model_dump(by_alias=True) if asked.text else {"format": {"type": "text"}},
            "tool_choice": asked.model_dump()["tool_choice"] or "auto",
            "tools": asked.tools or [],
            "truncation": "disabled",
            **{name: getattr(asked, name) for name in _ECHOED},
        }

    @property
    def _cut(self) -> bool:
        """Whether there was no room for more."""
        return self._completion.choices[0].finish == "length"

    def _status(self, place: int, blocks: list[Block]) -> str:
        """Of an item that is over."""
        return "incomplete" if self._cut and place + 1 == len(blocks) else "completed"

    def _item_id(self, place: int, block: Block) -> str:
        return f"{_PREFIX[block.kind]}_{self._id}_{place}"

    def _item(self, place: int, block: Block, status: str) -> dict[str, Any]:
        common = {"id": self._item_id(place, block), "status": status}
        if block.kind == "call":
            called = {"call_id": block.id, "name": block.name, "arguments": block.text}
            return common | {"type": "function_call"} | called
        if block.kind == "reasoning":
            return common | {"type": "reasoning", "summary": [], "content": [self._part(block)]}
        return common | {"type": "message", "role": "assistant", "content": [self._part(block, whole=True)]}

    def _part(self, block: Block, *, whole: bool = False) -> dict[str, Any]:
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": block.text}
        completion = self._completion
        wanted = whole and completion.body.wants_logprobs
        choice = completion.choices[0]
        events = choice.events[choice.reasoning_tokens :] if wanted else []
        logprobs = [token_logprobs(completion, event) for event in events]
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": logprobs}


def _usage(completion: Completion) -> dict[str, Any]:
    read, new = completion.prompt_tokens, completion.new_tokens
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": completion.cached, "cache_write_tokens": 0},
        "output_tokens": new,
        "output_tokens_details": {"reasoning_tokens": completion.reasoning_tokens},
        "total_tokens": read + new,
    }


def _read(content: Any) -> Question:
    asked, body = read_responses(content)
    return Question(body, lambda completion: ResponsesAnswer(asked, completion))


def _error_event(error: ApiError) -> bytes:
    said = {"message": str(error), "code": error.code or error.kind, "param": error.param}
    return server_sent({"type": "error", "sequence_number": 0} | said, "error")


RESPONSES = Api("/v1/responses", _read, openai_error, _error_event)
