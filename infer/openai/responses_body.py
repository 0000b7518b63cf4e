"""Bodies of OpenAI's Responses API, as the chat bodies that ask the same.

It is served without memory: what a conversation has been is in the body's `input`, and nothing is kept for a later
request. What would need it (`previous_response_id`, `conversation`, `background`) is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from v4_jax.infer.conversation import Turns
from v4_jax.infer.engine.sampling import MOST_ALTERNATIVES
from v4_jax.infer.openai.bodies import (
    MOST_MESSAGES,
    BodyError,
    ChatBody,
    Effort,
    ObjectFormat,
    Seed,
    Strict,
    TextFormat,
    TopK,
    check_known,
    read_body,
    validated,
)

LOGPROBS = "message.output_text.logprobs"
_HINTS = ("id", "status")  # which change no text


class Reasoning(Strict):
    """How much to reason. It comes in full, so that summaries are not needed."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class FlatSchemaFormat(Strict):
    """What a JSON schema allows."""

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Strict):
    """Which form the answer has."""

    format: Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class FlatFunctionChoice(Strict):
    """The function that is to be called."""

    type: Literal["function"]
    name: str


class ResponsesStreamOptions(Strict):
    """What a stream brings beside the answer."""

    include_obfuscation: bool | None = None


class ResponsesBody(Strict):
    """A conversation to answer, item by item."""

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: TopK | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Seed | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | FlatFunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    # Taken, and without any effect on an answer.
    store: bool | None = None
    max_tool_calls: int | None = None  # of tools that a server runs, which there are none of
    metadata: dict[str, str] | None = None
    user: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None


def read_responses(content: Any) -> tuple[ResponsesBody, ChatBody]:
    """Checks a parsed JSON body, and puts it as a chat.

    Raises:
      BodyError: it is not legal, or asks for what is not supported.
    """
    asked = validated(ResponsesBody, content)
    options = asked.text or TextOptions()
    format: Any = options.format
    if isinstance(format, FlatSchemaFormat):
        format = {"type": format.type, "json_schema": format.model_dump(by_alias=True, exclude={"type"})}
    elif format is not None:
        format = format.model_dump()
    choice: Any = asked.tool_choice
    if isinstance(choice, FlatFunctionChoice):
        choice = {"type": "function", "function": {"name": choice.name}}
    same = ("model", "temperature", "top_p", "top_k", "min_p", "seed", "parallel_tool_calls", "stream", "user")
    wants_logprobs = LOGPROBS in (asked.include or ()) or bool(asked.top_logprobs)
    body = {
        **{name: getattr(asked, name) for name in same},
        "messages": _messages(asked),
        "max_completion_tokens": asked.max_output_tokens,
        "reasoning_effort": asked.reasoning and asked.reasoning.effort,
        "tools": None if asked.tools is None else [_tool(tool, number) for number, tool in enumerate(asked.tools)],
        "tool_choice": choice,
        "response_format": format,
        "logprobs": wants_logprobs,
        "top_logprobs": asked.top_logprobs,
    }
    chat = read_body(body, chat=True)
    assert isinstance(chat, ChatBody)
    return asked, chat


def _messages(asked: ResponsesBody) -> list[dict[str, Any]]:
    turns = Turns()
    if asked.instructions:
        turns.say("system", asked.instructions)
    if isinstance(asked.input, str):
        turns.say("user", asked.input)
        return turns.messages
    for number, item in enumerate(asked.input):
        where, kind = f"input.{number}", item.get("type", "message")
        reader = _ITEMS.get(kind) if isinstance(kind, str) else None
        if reader is None:
            known = ", ".join(map(repr, _ITEMS))
            raise BodyError(
                f"{where} is of type {kind!r:.80}, which is not supported; legal are {known}", f"{where}.type"
            )
        reader(turns, item, where)
    return turns.messages


def _read_message(turns: Turns, item: dict[str, Any], where: str) -> None:
    check_known(item, ("role", "content"), where, (*_HINTS, "phase"))
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise BodyError(f"{where}.role is {role!r:.80}; expected user, assistant, system or developer", f"{where}.role")
    turns.say(role, item.get("content"))


def _read_reasoning(turns: Turns, item: dict[str, Any], where: str) -> None:
    check_known(item, ("content", "summary"), where, _HINTS)
    parts = item.get("content") or item.get("summary") or []
    if not isinstance(parts, list) or not all(isinstance(x, dict) and isinstance(x.get("text"), str) for x in parts):
        raise BodyError(f"{where}.content is {parts!r:.80}; expected parts with text", f"{where}.content")
    turns.think("".join(part["text"] for part in parts))


def _read_call(turns: Turns, item: dict[str, Any], where: str) -> None:
    check_known(item, ("call_id", "name", "arguments"), where, _HINTS)
    turns.call(item.get("call_id"), item.get("name"), item.get("arguments"))


def _read_output(turns: Turns, item: dict[str, Any], where: str) -> None:
    check_known(item, ("call_id", "output"), where, (*_HINTS, "name"))
    turns.result(item.get("call_id"), item.get("output"))


_ITEMS = {
    "message": _read_message,
    "reasoning": _read_reasoning,
    "function_call": _read_call,
    "function_call_output": _read_output,
}


def _tool(tool: dict[str, Any], number: int) -> dict[str, Any]:
    """A tool as chats have it; what is none is the chat's to refuse."""
    if tool.get("type") != "function":
        raise BodyError(
            f"tools.{number} is of type {tool.get('type')!r:.80}, which is not supported; expected 'function'", "tools"
        )
    known = ("name", "description", "parameters")
    check_known(tool, known, f"tools.{number}", (*_HINTS, "strict", "defer_loading"))
    return {"type": "function", "function": {name: tool[name] for name in known if tool.get(name) is not None}}
