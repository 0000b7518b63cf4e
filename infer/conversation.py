"""A client's messages as the chat encoding takes them: nothing that was sent is lost, or it is refused by name.

The encoding follows the release to the byte, also where clients mean something else: a developer's text vanishes with
the reasoning, parts that are not "text" leave a placeholder, a key that is not known is not looked at. Here, and only
here, messages of requests and of job files are put into the form in which the encoding says all of them. APIs whose
conversations are items or blocks put them as messages first (`Turns`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from v4_jax.chat.protocol import SEPARATOR, legal

_TEXT_OF_PART = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # by type
_PART_HINTS = ("cache_control", "annotations", "logprobs", "prompt_cache_breakpoint")  # which change no text

_COMMON = ("role", "content", "name")
_KEYS: dict[str, tuple[str, ...]] = {
    "system": (*_COMMON, "tools", "response_format"),
    "user": (*_COMMON, "task"),
    "assistant": (
        *_COMMON,
        *("reasoning_content", "reasoning", "tool_calls", "function_call", "refusal", "unparsed_tool_calls"),
        *("prefix", "wo_eos", "task", "annotations"),
    ),
    "tool": (*_COMMON, "tool_call_id"),
    "latest_reminder": (*_COMMON,),
}
_SAME_ROLE = {"developer": "system", "function": "tool"}  # OpenAI's newer name, and its older one


def read_messages(messages: Sequence[Mapping[str, Any]], *, continues: bool | None = None) -> list[dict[str, Any]]:
    """Messages for `v4_jax.chat.encode`.

    A last message of the assistant is left open, to be continued.

    Args:
      messages: as a client sent them, each with a role.
      continues: whether the last message is to be continued; None if it is the assistant's.

    Raises:
      ValueError: a message holds what the chat format has no place for; the sentence says which.
    """
    read: list[dict[str, Any]] = []
    called: str | None = None  # the call that a function's legacy result, which has no id, answers
    for number, message in enumerate(messages):
        where = f"message {number}"
        role = message.get("role")
        if not isinstance(role, str) or role not in (*_KEYS, *_SAME_ROLE):
            roles = legal((*_KEYS, *_SAME_ROLE))
            raise ValueError(f"{where} has role {role!r:.80}; legal roles are {roles}")
        role = _SAME_ROLE.get(role, role)
        _check_keys(message, _KEYS[role], where)
        one = _READ.get(role, _read_spoken)(message, where)
        if role == "assistant":
            if message.get("function_call"):
                called = f"function_call_{number}"
                one["tool_calls"] = [{"id": called, **_read_call({"function": message["function_call"]}, where)}]
            if message.get("prefix") and number + 1 < len(messages):
                raise ValueError(f"{where} has prefix, but is not the last message; only that one can be continued")
        if message.get("role") == "function":
            if called is None:
                raise ValueError(f"{where} is a function's result, but no function_call stands before it")
            one["tool_call_id"] = called
        read.append(one | {"role": role})
    last = read[-1]
    if last["role"] == "assistant" and not last.get("task"):
        if continues is False:
            raise ValueError(
                "the last message is the assistant's and continue_final_message is false; expected a message to answer"
            )
        if last.get("tool_calls"):
            raise ValueError("the last message calls tools; expected their results, as messages of role 'tool'")
        last["wo_eos"] = True
    elif continues:
        raise ValueError(
            f"continue_final_message, but the last message has role {last['role']!r}; expected 'assistant'"
        )
    return read


class Turns:
    """Collects messages from items of a conversation, of which an assistant's turn may have many.

    Attributes:
      messages: so far, for `read_messages`.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def say(self, role: str, content: Any) -> None:
        """A text, or parts of one. The assistant goes on with its turn; others begin one each."""
        if role != "assistant":
            self.messages.append({"role": role, "content": content})
            return
        turn = self._assistant()
        before, added = turn["content"], content
        if before is not None:
            before, added = (
                [{"type": "text", "text": one}] if isinstance(one, str) else one or [] for one in (before, content)
            )
            added = [*before, *added]
        turn["content"] = added

    def think(self, text: str) -> None:
        """Reasoning, which begins a turn of the assistant's."""
        last = self._assistant()
        if last["content"] is not None or "tool_calls" in last:
            last = self._assistant(new=True)
        last["reasoning_content"] = last.get("reasoning_content", "") + text

    def call(self, id: Any, name: Any, arguments: Any) -> None:
        """A call of a tool."""
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._assistant().setdefault("tool_calls", []).append(call)

    def result(self, id: Any, content: Any) -> None:
        """What a tool returned."""
        self.messages.append({"role": "tool", "tool_call_id": id, "content": content})

    def _assistant(self, *, new: bool = False) -> dict[str, Any]:
        if new or not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": None})
        return self.messages[-1]


def as_said(message: Mapping[str, Any]) -> str:
    """What an assistant's message says, calls that could not be read included, as they are read when it comes back."""
    content, unparsed = message.get("content") or "", message.get("unparsed_tool_calls")
    return content + SEPARATOR + unparsed if unparsed else content


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Checks that every tool is a function with a name.

    Raises:
      ValueError: one is not.
    """
    for number, tool in enumerate(tools or ()):
        where, function = f"tool {number}", tool.get("function")
        _check_keys(tool, ("type", "function", "cache_control"), where)
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise ValueError(
                f"{where} is of type {tool.get('type')!r}; expected "
                '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            )
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f"{where} has the name {function.get('name')!r}; expected a text that is not empty")


def says_something(value: Any) -> bool:
    """Whether a field that nobody reads would be missed: zero would, nothing, false and what is empty would not."""
    return value is not None and value is not False and value not in ("", [], {})


def _check_keys(found: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuses what is not known, unless it is empty: then nothing is lost."""
    unknown = [key for key, value in found.items() if key not in known and says_something(value)]
    if unknown:
        raise ValueError(f"{where} has {unknown[0]!r:.80}, which is not supported; legal are {', '.join(known)}")


def _read_spoken(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message that somebody says, with any name of the speaker in front: the format has no other place for it."""
    one = {key: value for key, value in message.items() if key != "name"}
    content, name = _read_content(message.get("content"), where), message.get("name")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{where} has a name of type {type(name).__name__}; expected a text")
    one["content"] = f"{name}: {_joined(content)}" if name else content
    return one


def _read_assistant(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    moved = ("reasoning", "function_call", "refusal", "unparsed_tool_calls", "annotations", "prefix")
    one = {key: value for key, value in _read_spoken(message, where).items() if key not in moved}
    if reasoning := message.get("reasoning"):
        if one.get("reasoning_content") not in (None, "", reasoning):
            raise ValueError(f"{where} has both reasoning and reasoning_content, and they differ; expected one of them")
        one["reasoning_content"] = reasoning
    for key in ("refusal", "unparsed_tool_calls"):  # a part of what was said, the latter a block of its own
        if said := message.get(key):
            if not isinstance(said, str):
                raise ValueError(f"{where} has {key} of type {type(said).__name__}; expected a text")
            content = _joined(one["content"])
            one["content"] = f"{content}{SEPARATOR if content or key != 'refusal' else ''}{said}"
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise ValueError(f"{where} has tool_calls of type {type(calls).__name__}; expected a list")
        one["tool_calls"] = [_read_call(call, where) for call in calls]
    return one


def _read_tool_result(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tool's result, whose name its call has said."""
    one = {key: value for key, value in message.items() if key != "name"}
    return one | {"content": _read_content(message.get("content"), where)}


_READ: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "assistant": _read_assistant,
    "tool": _read_tool_result,
}


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type") not in (None, "function"):
        raise ValueError(
            f"{where} has a tool call {call!r:.80}; expected "
            '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
        )
    _check_keys(call, ("id", "type", "function", "index"), f"a tool call of {where}")
    _check_keys(function, ("name", "arguments"), f"a tool call of {where}")
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        arguments = "{}"
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _read_content(content: Any, where: str) -> Any:
    """Content whose parts are of type "text"; what is no list is the encoding's to judge."""
    if not isinstance(content, list):
        return content
    return [{"type": "text", "text": _read_part(part, where)} for part in content]


def _read_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    key = _TEXT_OF_PART.get(kind) if isinstance(kind, str) else None
    if key is None:
        found = f"a part of type {kind!r:.80}" if kind is not None else f"a part {part!r:.80}"
        raise ValueError(f"{where} has {found}; this model reads text alone: legal types are {legal(_TEXT_OF_PART)}")
    _check_keys(part, ("type", key, *_PART_HINTS), f"a part of {where}")
    text = part.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{where} has a part of type {kind!r} whose {key} is {json.dumps(text):.80}; expected a text")
    return text


def _joined(content: Any) -> str:
    """Content as one text, its parts joined as the encoding joins them."""
    if isinstance(content, list):
        return SEPARATOR.join(part["text"] for part in content)
    return content or ""
