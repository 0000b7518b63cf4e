"""Bodies of Anthropic's Messages API, as the chat bodies that ask the same."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from v4_jax.infer.conversation import Turns
from v4_jax.infer.openai.bodies import (
    MOST_MESSAGES,
    MOST_STOPS,
    BodyError,
    ChatBody,
    Seed,
    Strict,
    TopK,
    check_known,
    read_body,
    validated,
)

_HINTS = ("cache_control",)  # which change no text


class Thinking(Strict):
    """Whether the model reasons before it answers, and for how many tokens at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=0)
    display: Literal["summarized"] | None = None  # which is the whole of it here


class AnswerFormat(Strict):
    """What a JSON schema allows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """How much effort an answer gets, and which form it has."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: AnswerFormat | None = None


class ToolChoice(Strict):
    """Whether a tool is called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicMessage(Strict):
    """What somebody said."""

    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class CountBody(Strict):
    """A conversation whose tokens are counted."""

    model: str
    messages: list[AnthropicMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    system: str | list[dict[str, Any]] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    cache_control: dict[str, Any] | None = None  # without any effect


class MessagesBody(CountBody):
    """A conversation to answer."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: TopK | None = None
    seed: Seed | None = None
    stream: bool | None = None
    # Taken, and without any effect on an answer.
    metadata: dict[str, str | None] | None = None
    service_tier: str | None = None


def read_messages_body(content: Any) -> ChatBody:
    """Checks a parsed JSON body, and puts it as a chat.

    Raises:
      BodyError: it is not legal, or asks for what is not supported.
    """
    asked = validated(MessagesBody, content)
    same = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stream")
    return _as_chat(asked, {name: getattr(asked, name) for name in same} | {"stop": asked.stop_sequences})


def read_count_body(content: Any) -> ChatBody:
    """The same of a body that asks how many tokens a conversation has."""
    return _as_chat(validated(CountBody, content), {})


def _as_chat(asked: CountBody, more: dict[str, Any]) -> ChatBody:
    """A conversation as a chat, with other fields of it."""
    output, thinking = asked.output_config or OutputConfig(), asked.thinking
    choice = asked.tool_choice or ToolChoice(type="auto")
    if (choice.type == "tool") != bool(choice.name):
        raise BodyError("tool_choice has a name if and only if its type is 'tool'", "tool_choice.name")
    tools = [_tool(tool, f"tools.{number}") for number, tool in enumerate(asked.tools or ())]
    thinks: dict[str, Any] | None = None
    if thinking is not None:
        thinks = {"type": "disabled" if thinking.type == "disabled" else "enabled"}
        thinks["budget_tokens"] = thinking.budget_tokens
    schema = output.format and {"name": "answer", "schema": output.format.schema_}
    names: dict[str, Any] = {"auto": "auto", "none": "none", "any": "required"}
    body = {
        **more,
        "model": asked.model,
        "messages": _messages(asked),
        "thinking": thinks,
        "reasoning_effort": output.effort,
        "response_format": schema and {"type": "json_schema", "json_schema": schema},
        "tools": tools or None,
        "tool_choice": names.get(choice.type, {"type": "function", "function": {"name": choice.name}}),
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
    }
    chat = read_body(body, chat=True)
    assert isinstance(chat, ChatBody)
    return chat


def _messages(asked: CountBody) -> list[dict[str, Any]]:
    turns = Turns()
    if asked.system:
        turns.say("system", asked.system)
    for number, message in enumerate(asked.messages):
        if isinstance(message.content, str):
            turns.say(message.role, message.content)
            continue
        for place, block in enumerate(message.content):
            _read_block(turns, message.role, block, f"messages.{number}.content.{place}")
    return turns.messages


def _read_block(turns: Turns, role: str, block: dict[str, Any], where: str) -> None:
    kind = block.get("type")
    if kind == "text":
        check_known(block, ("text", "citations"), where, _HINTS)
        turns.say(role, [{"type": "text", "text": block.get("text")}])
    elif kind == "thinking" and role == "assistant":
        check_known(block, ("thinking", "signature"), where, _HINTS)
        turns.think(_text(block, "thinking", where))
    elif kind == "tool_use" and role == "assistant":
        check_known(block, ("id", "name", "input", "caller"), where, _HINTS)
        turns.call(block.get("id"), block.get("name"), block.get("input"))
    elif kind == "tool_result" and role == "user":
        check_known(block, ("tool_use_id", "content", "is_error"), where, _HINTS)
        content = block.get("content")
        if block.get("is_error"):  # for which the chat format has no other place
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
            content = [{"type": "text", "text": "error:"}, *parts]
        turns.result(block.get("tool_use_id"), content)
    else:
        legal = "text, thinking, tool_use" if role == "assistant" else "text, tool_result"
        raise BodyError(
            f"{where} is of type {kind!r:.80}, which is not supported in what {role} says; legal are {legal}",
            f"{where}.type",
        )


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool as chats have it."""
    if tool.get("type") not in (None, "custom"):
        raise BodyError(
            f"{where} is of type {tool['type']!r:.80}, which is not supported; expected 'custom'", f"{where}.type"
        )
    hints = (*_HINTS, "strict", "defer_loading", "eager_input_streaming")
    check_known(tool, ("name", "description", "input_schema"), where, hints)
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
    }
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _text(block: dict[str, Any], key: str, where: str) -> str:
    text = block.get(key)
    if not isinstance(text, str):
        raise BodyError(f"{where}.{key} is {json.dumps(text):.80}; expected a text", f"{where}.{key}")
    return text
