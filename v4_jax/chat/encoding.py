"""Conversations to prompt text, byte for byte as the release's encoding writes them.

Three steps, each its own section below: messages are read and checked into `Turn`s (tool results become part of a
user turn), reasoning that the model should not see again is dropped, and each turn is written with whatever opens
the next one. The format has no escaping: a special token inside a message is a special token to the tokenizer, so
text from untrusted users should be searched for `protocol.SPECIAL_TOKENS` before it comes here.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from v4_jax.chat import protocol
from v4_jax.chat.efforts import EffortProfile, effort_prefix
from v4_jax.chat.protocol import legal

Message = Mapping[str, Any]

ROLES = ("system", "user", "developer", "assistant", "tool", "latest_reminder")
_CARRY_TOOLS = ("system", "developer")
_CARRY_TASK = ("user", "developer", "assistant")
_PROMPTS = ("user", "developer")  # the turns that the assistant answers


class EncodeError(ValueError):
    """A message or an option that the chat format cannot express; the sentence says what would be legal."""


class Piece(NamedTuple):
    """A part of a conversation's text.

    Attributes:
        role: Whose turn it is: "assistant" for what a model writes, and for nothing else. None for what the format puts
            around turns.
        text: Its text, perhaps "".
    """

    role: str | None
    text: str


def encode(
    messages: Sequence[Message],
    *,
    thinking_mode: str = "chat",
    reasoning_effort: str | None = None,
    drop_thinking: bool = True,
    effort_profile: EffortProfile = "preview",
    context: Sequence[Message] | None = None,
    add_bos: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Any = None,
) -> str:
    """Writes a conversation as the text the model was trained on (the release's encoding).

    Args:
        messages: OpenAI-style dicts. `role` is one of `ROLES`; `content` is a string, a list of parts or None. An
            assistant message may have `reasoning_content`, `tool_calls` and `wo_eos` (leave the turn open, to be
            continued); a tool message has `tool_call_id`; system and developer messages may have `tools` and
            `response_format`; `task` on a user, developer or assistant message asks for a quick instruction.
        thinking_mode: "chat" answers at once, "thinking" reasons first.
        reasoning_effort: None, "low", "high" or "max": in thinking mode, perhaps an instruction in front of everything.
        drop_thinking: In thinking mode, forget the reasoning given before the last question (and earlier developer
            messages). Ignored if any message declares tools: then all reasoning is kept.
        effort_profile: What the efforts mean: "preview" has an instruction for "max" alone, "official" (Flash-0731,
            Pro-0813) for "high" and "max"; see `v4_jax.chat.read_profile`.
        context: Messages that were encoded before, whose text (and BOS) the result continues.
        add_bos: Whether a text without context starts with BOS.
        tools: Tool schemas in OpenAI form, put onto the first system message (an empty one is added if needed). With
            context that message is part of the context, taken as encoded with the same tools.
        response_format: A JSON schema for the answer, put onto the first system message likewise.

    Returns:
        The prompt. It ends where the assistant is to go on, if the last message calls for an answer.

    Raises:
        ValueError: A message (`EncodeError`) or an option is not legal; the sentence says which, and what would be.
    """
    pieces = encode_pieces(
        messages,
        thinking_mode=thinking_mode,
        reasoning_effort=reasoning_effort,
        drop_thinking=drop_thinking,
        effort_profile=effort_profile,
        context=context,
        add_bos=add_bos,
        tools=tools,
        response_format=response_format,
    )
    return "".join(piece.text for piece in pieces)


def encode_pieces(
    messages: Sequence[Message],
    *,
    thinking_mode: str = "chat",
    reasoning_effort: str | None = None,
    drop_thinking: bool = True,
    effort_profile: EffortProfile = "preview",
    context: Sequence[Message] | None = None,
    add_bos: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Any = None,
) -> list[Piece]:
    """What `encode` joins, which says what of it the assistant writes: arguments and errors are the same.

    Each assistant message is one piece, from what follows the opening of its turn to its EOS.
    """
    protocol.check_thinking_mode(thinking_mode)
    try:
        prefix = effort_prefix(reasoning_effort, effort_profile)
    except ValueError as error:
        raise EncodeError(str(error)) from None
    if not messages:
        raise EncodeError("there are no messages to encode; at least one is needed")

    old, new = list(context or ()), list(messages)
    has_context = bool(old)
    _attach_to_system(old, new, "tools", tools)
    _attach_to_system(old, new, "response_format", response_format)
    # Context is joined on its own: what has been encoded cannot be reopened by a message that follows.
    turns = _join_turns(old, "context message", is_new=False) + _join_turns(new, "message", is_new=True)
    turns = _sort_tool_results(turns)

    thinking = thinking_mode == "thinking"
    dropping = drop_thinking and not any(turn.tools for turn in turns)
    if thinking and dropping:
        turns = _drop_old_developers(turns)

    pieces = []
    if not has_context:
        pieces.append(Piece(None, (protocol.BOS if add_bos else "") + (prefix if thinking else "")))
    last_prompt = _last_prompt(turns)
    for i, turn in enumerate(turns):
        if turn.is_new:
            # Where reasoning is dropped, it remains only from the last question on.
            thinks_after = thinking and (not dropping or i >= last_prompt)
            thinks_here = thinking and (not dropping or i > last_prompt) and not (i and turns[i - 1].task)
            pieces.append(Piece(turn.role, _write_turn(turn, thinks_here)))
            if i + 1 == len(turns) or turns[i + 1].role in ("assistant", "latest_reminder"):
                pieces.append(Piece(None, _write_transition(turn, thinks_after, thinking)))
    return pieces


def begin_tool_call(name: str | None = None) -> str:
    """How an answer begins that calls a tool: after any reasoning, it leaves nothing else to write.

    Args:
        name: The tool to call; None leaves the choice to the model.
    """
    opening = protocol.SEPARATOR + protocol.literals(protocol.TOOL_CALLS)[0]
    before_name, after_name = protocol.literals(protocol.INVOKE)[:2]
    return opening + before_name + ("" if name is None else name + after_name)


def open_answer(thinks: bool) -> str:
    """How the assistant's turn begins, with reasoning or at once.

    `encode` opens it after a question. The release does not after a system message, which `v4_jax.infer.prompts` does.
    """
    return protocol.ASSISTANT + (protocol.THINK_OPEN if thinks else protocol.THINK_CLOSE)


# Reading messages into turns


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call of an assistant turn."""

    id: str  # empty where the client gave none
    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What a tool returned."""

    call_id: str
    text: str


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of the wire format; a user turn may hold several user and tool messages, one block each."""

    role: str
    is_new: bool  # False for context, which is looked at but not written again
    blocks: tuple[str | ToolResult, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()  # the function schemas alone
    response_format: Any = None
    task: str | None = None
    wo_eos: bool = False


def _attach_to_system(old: list[Message], new: list[Message], key: str, value: Any) -> None:
    """Puts `value` onto the first system message of the conversation, which is in `old` or in `new`."""
    if not value:
        return
    for part in (old, new):
        for i, message in enumerate(part):
            if isinstance(message, Mapping) and message.get("role") == "system":
                if message.get(key):
                    raise EncodeError(f"{key} given both as an argument and on the system message; give one of them")
                part[i] = {**message, key: value}
                return
    (old or new).insert(0, {"role": "system", "content": "", key: value})


def _join_turns(messages: Sequence[Message], what: str, *, is_new: bool) -> list[Turn]:
    """Reads messages; user and tool messages in a row become one user turn."""
    turns: list[list[Turn]] = []  # what each is joined of: at the end, or many in a row would take quadratic time
    task: str | None = None  # of the last one
    for i, message in enumerate(messages):
        turn = _read_message(message, f"{what} {i}", is_new)
        previous = turns[-1][0] if turns else None
        if previous and previous.role == turn.role == "user" and (message["role"] == "tool" or not task):
            turns[-1].append(turn)
            task = turn.task or task
        else:
            turns.append([turn])
            task = turn.task
    return [_joined(parts) for parts in turns]


def _joined(parts: Sequence[Turn]) -> Turn:
    """One turn of several of the same role."""
    if len(parts) == 1:
        return parts[0]
    tasks = [turn.task for turn in parts if turn.task]
    blocks = tuple(block for turn in parts for block in turn.blocks)
    return dataclasses.replace(parts[0], blocks=blocks, task=tasks[-1] if tasks else parts[0].task)


def _read_message(message: Message, where: str, is_new: bool) -> Turn:
    if not isinstance(message, Mapping):
        raise EncodeError(f"{where} is a {type(message).__name__}; a message is a dict with 'role' and 'content'")
    role = message.get("role")
    if role not in ROLES:
        raise EncodeError(f"{where} has role {role!r}; legal roles are {legal(ROLES)}")
    _check_only_on(message, "tools", _CARRY_TOOLS, where)
    _check_only_on(message, "response_format", _CARRY_TOOLS, where)
    _check_only_on(message, "task", _CARRY_TASK, where)
    _check_only_on(message, "tool_calls", ("assistant",), where)
    task = message.get("task")
    if task is not None and task not in tuple(protocol.TASK_TOKENS):
        raise EncodeError(f"{where} has task {task!r}; legal tasks are {legal(protocol.TASK_TOKENS)}")

    text = _read_content(message.get("content"), where)
    if role == "developer" and not text:
        raise EncodeError(f"{where} is a developer message without content; its content must not be empty")
    if role == "tool":
        return Turn("user", is_new, blocks=(ToolResult(_read_text(message, "tool_call_id", where), text),))
    return Turn(
        role,
        is_new,
        blocks=(text,),
        reasoning=_read_text(message, "reasoning_content", where),
        tool_calls=tuple(_read_tool_call(call, where) for call in _as_list(message, "tool_calls", where)),
        tools=tuple(_read_tool(tool, where) for tool in _as_list(message, "tools", where)),
        response_format=message.get("response_format"),
        task=task,
        wo_eos=bool(message.get("wo_eos")),
    )


def _check_only_on(message: Message, key: str, roles: Iterable[str], where: str) -> None:
    # Present but empty (None, [], "") is what clients send for "none".
    if message.get(key) and message["role"] not in roles:
        raise EncodeError(f"{where} with role {message['role']!r} has {key}; only roles {legal(roles)} may")


def _as_list(message: Message, key: str, where: str) -> Sequence[Any]:
    value = message.get(key) or ()
    if not isinstance(value, list | tuple):
        raise EncodeError(f"{where} has {key} of type {type(value).__name__}; it must be a list")
    return value


def _read_text(message: Message, key: str, where: str) -> str:
    value = message.get(key) or ""
    if not isinstance(value, str):
        raise EncodeError(f"{where} has {key} of type {type(value).__name__}; it must be a string")
    return value


def _read_content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise EncodeError(
            f"{where} has content of type {type(content).__name__}; it must be a string or a list of parts"
        )
    return protocol.SEPARATOR.join(_read_part(part, where) for part in content)


def _read_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise EncodeError(f"{where} has a content part {part!r}; a part is a dict with a 'type', such as 'text'")
    if part["type"] != "text":
        return protocol.UNSUPPORTED_PART.format(type=part["type"])
    text = part.get("text", "")
    if not isinstance(text, str):
        raise EncodeError(f"{where} has a text part holding a {type(text).__name__}; its 'text' must be a string")
    return text


def _read_tool(tool: Any, where: str) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise EncodeError(
            f"{where} has a malformed tool {tool!r}; expected {{'type': 'function', 'function': {{'name': ..., ...}}}}"
        )
    return function


def _read_tool_call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise EncodeError(
            f"{where} has a malformed tool call {call!r}; "
            "expected {'id': ..., 'type': 'function', 'function': {'name': ..., 'arguments': ...}}"
        )
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str | Mapping):
        raise EncodeError(
            f"{where} calls {function['name']!r} with arguments of type {type(arguments).__name__}; "
            "they must be a JSON string or a dict"
        )
    return ToolCall(_read_text(call, "id", where), function["name"], _read_arguments(arguments))


def _read_arguments(arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(arguments, Mapping):
        return dict(arguments)
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    # A model's own mistake must not make the conversation impossible to continue: it is shown as it was.
    return parsed if isinstance(parsed, dict) else {"arguments": arguments}


def _sort_tool_results(turns: Sequence[Turn]) -> list[Turn]:
    """Puts tool results in the order of the preceding assistant's calls; text among them stays where it is."""
    result, order = [], dict[str, int]()
    for turn in turns:
        if turn.role == "assistant":
            order = {call.id: i for i, call in enumerate(turn.tool_calls)}
        elif any(isinstance(block, ToolResult) for block in turn.blocks):
            results = [block for block in turn.blocks if isinstance(block, ToolResult)]
            in_order = iter(sorted(results, key=lambda block: order.get(block.call_id, len(order))))
            blocks = tuple(next(in_order) if isinstance(block, ToolResult) else block for block in turn.blocks)
            turn = dataclasses.replace(turn, blocks=blocks)
        result.append(turn)
    return result


# Forgetting


def _last_prompt(turns: Sequence[Turn]) -> int:
    """Index of the last user or developer turn, -1 if there is none."""
    return max((i for i, turn in enumerate(turns) if turn.role in _PROMPTS), default=-1)


def _drop_old_developers(turns: Sequence[Turn]) -> list[Turn]:
    """Drops developer turns before the last question: they go along with the reasoning they led to."""
    last_prompt = _last_prompt(turns)
    return [turn for i, turn in enumerate(turns) if turn.role != "developer" or i >= last_prompt]


# Writing turns


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise EncodeError("a tool, a response_format or a tool call's argument is nested too deeply") from None
    except TypeError as error:
        raise EncodeError(
            f"a tool, a response_format or a tool call's argument is not JSON ({error}); "
            "legal are dicts, lists, strings, numbers, booleans and None"
        ) from None


def _write_turn(turn: Turn, thinks: bool) -> str:
    text = protocol.SEPARATOR.join(
        block if isinstance(block, str) else protocol.TOOL_RESULT.format(content=block.text) for block in turn.blocks
    )
    if turn.role == "assistant":
        reasoning = turn.reasoning + protocol.THINK_CLOSE if thinks else ""
        calls = protocol.SEPARATOR + _write_tool_calls(turn.tool_calls) if turn.tool_calls else ""
        return reasoning + text + calls + ("" if turn.wo_eos else protocol.EOS)
    opening = {"user": protocol.USER, "developer": protocol.USER, "latest_reminder": protocol.LATEST_REMINDER}
    parts = [opening.get(turn.role, "") + text]
    if turn.tools:
        parts.append(protocol.TOOLS_BLOCK.format(tool_schemas="\n".join(map(_json, turn.tools))))
    if turn.response_format:
        parts.append(protocol.RESPONSE_FORMAT.format(schema=_json(turn.response_format)))
    return protocol.SEPARATOR.join(parts)


def _write_tool_calls(calls: Iterable[ToolCall]) -> str:
    return protocol.TOOL_CALLS.format(
        calls="\n".join(
            protocol.INVOKE.format(
                name=call.name,
                parameters="\n".join(_write_parameter(name, value) for name, value in call.arguments.items()),
            )
            for call in calls
        )
    )


def _write_parameter(name: str, value: Any) -> str:
    is_string = isinstance(value, str)
    return protocol.PARAMETER.format(
        name=name, is_string="true" if is_string else "false", value=value if is_string else _json(value)
    )


def _write_transition(turn: Turn, thinks_after: bool, thinking: bool) -> str:
    """What follows a turn that is answered next: the task's token, or the assistant's opening."""
    if turn.task == "action":
        # The one task that is asked of the assistant in its own voice.
        return protocol.ASSISTANT + (protocol.THINK_OPEN if thinking else protocol.THINK_CLOSE) + _task_token(turn.task)
    if turn.task:
        return _task_token(turn.task)
    return open_answer(thinks_after) if turn.role in _PROMPTS else ""


def _task_token(task: str) -> str:
    return protocol.TASK_TOKENS[task]
