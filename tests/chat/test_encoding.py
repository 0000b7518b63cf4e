"""The chat encoding against the release's own cases and generated ones, byte for byte, and its rules one by one."""

import copy
import json
from pathlib import Path

import pytest

from v4_jax import chat
from v4_jax.chat import protocol
from v4_jax.chat.protocol import ASSISTANT, BOS, EOS, LATEST_REMINDER, TASK_TOKENS, THINK_CLOSE, THINK_OPEN, USER

DATA = Path(__file__).parents[1] / "data" / "encoding"
CASES = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))["encode"]
PUBLISHED = json.loads((DATA / "published_cases.json").read_text(encoding="utf-8"))
PUBLISHED_MODES = ("thinking", "thinking", "thinking", "chat")  # the release's tests name them, its files do not

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def user(content="question", **extra):
    return {"role": "user", "content": content, **extra}


def assistant(content="answer", **extra):
    return {"role": "assistant", "content": content, **extra}


def call(name, arguments, call_id=None):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("case", CASES)
def test_generated_cases(case):
    options = {key: case[key] for key in ("thinking_mode", "reasoning_effort", "drop_thinking")}
    assert chat.encode(case["messages"], **options) == case["expected"]


@pytest.mark.parametrize(("case", "mode"), list(zip(PUBLISHED, PUBLISHED_MODES, strict=True)))
def test_published_cases(case, mode):
    given = case["input"] if isinstance(case["input"], dict) else {"messages": case["input"]}
    assert chat.encode(**given, thinking_mode=mode) == case["expected"]


@pytest.mark.parametrize("case", CASES)
def test_context_then_messages_is_the_whole(case):
    """What a server has encoded stays a prefix, wherever the assistant has just spoken."""
    options = {"thinking_mode": case["thinking_mode"], "drop_thinking": False}
    messages = case["messages"]
    whole = chat.encode(messages, **options)
    for i in range(1, len(messages)):
        if messages[i - 1]["role"] == "assistant":
            before = chat.encode(messages[:i], **options)
            assert before + chat.encode(messages[i:], context=messages[:i], **options) == whole


@pytest.mark.parametrize("case", CASES)
def test_input_is_left_alone(case):
    messages = copy.deepcopy(case["messages"])
    chat.encode(messages, thinking_mode=case["thinking_mode"], response_format=None, tools=None)
    assert messages == case["messages"]


def test_modes_and_efforts():
    ask = [user()]
    opened = BOS + USER + "question" + ASSISTANT
    assert chat.encode(ask) == opened + THINK_CLOSE
    assert chat.encode(ask, reasoning_effort="max") == opened + THINK_CLOSE
    assert chat.encode(ask, thinking_mode="thinking") == opened + THINK_OPEN
    assert chat.encode(ask, thinking_mode="thinking", reasoning_effort="high") == opened + THINK_OPEN
    best = chat.encode(ask, thinking_mode="thinking", reasoning_effort="max")
    assert best == BOS + protocol.REASONING_EFFORT_MAX + opened.removeprefix(BOS) + THINK_OPEN
    assert chat.encode(ask, thinking_mode="thinking", reasoning_effort="low") == opened + THINK_OPEN
    assert chat.encode(ask, add_bos=False) == opened.removeprefix(BOS) + THINK_CLOSE
    follow_up = chat.encode(
        [user("more")], context=[user(), assistant()], thinking_mode="thinking", reasoning_effort="max"
    )
    assert follow_up == USER + "more" + ASSISTANT + THINK_OPEN


def test_reasoning_is_dropped_before_the_last_question_unless_tools_are_declared():
    messages = [
        user("q1"),
        assistant("a1", reasoning_content="r1"),
        user("q2"),
        assistant("a2", reasoning_content="r2"),
    ]
    dropped = chat.encode(messages, thinking_mode="thinking")
    assert "r1" not in dropped
    assert THINK_OPEN + "r2" + THINK_CLOSE in dropped
    kept = chat.encode(messages, thinking_mode="thinking", drop_thinking=False)
    assert THINK_OPEN + "r1" + THINK_CLOSE in kept
    assert THINK_OPEN + "r1" + THINK_CLOSE in chat.encode(messages, thinking_mode="thinking", tools=[WEATHER])
    # The declaration may also lie in text that was encoded before.
    context = [{"role": "system", "content": "", "tools": [WEATHER]}, user("q0"), assistant("a0")]
    assert "r1" in chat.encode(messages, context=context, thinking_mode="thinking")


def test_developer_turns_are_dropped_with_the_reasoning():
    messages = [{"role": "developer", "content": "rules"}, assistant("a1"), user("q2")]
    assert "rules" not in chat.encode(messages, thinking_mode="thinking")
    assert "rules" in chat.encode(messages, thinking_mode="thinking", drop_thinking=False)
    assert chat.encode(messages[:1]) == BOS + USER + "rules" + ASSISTANT + THINK_CLOSE


def test_tools_and_response_format_go_onto_the_system_message():
    schema = {"type": "object", "title": "ответ"}
    on_message = [{"role": "system", "content": "S", "tools": [WEATHER], "response_format": schema}, user()]
    expected = chat.encode(on_message)
    as_arguments = [{"role": "system", "content": "S"}, user()]
    assert chat.encode(as_arguments, tools=[WEATHER], response_format=schema) == expected
    assert '{"type": "object", "title": "ответ"}' + USER in expected
    without_system = chat.encode([user()], tools=[WEATHER])
    assert without_system == chat.encode([{"role": "system", "content": "", "tools": [WEATHER]}, user()])
    with pytest.raises(ValueError, match="both as an argument and on the system message"):
        chat.encode(on_message, tools=[WEATHER])


def test_user_and_tool_messages_in_a_row_are_one_turn():
    calls = [call("f", "{}", "x"), call("f", "{}", "y")]
    messages = [
        user("a"),
        user("b"),
        assistant("", tool_calls=calls),
        {"role": "tool", "tool_call_id": "y", "content": "second"},
        user("between"),
        {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "first"}, {"type": "image_url"}]},
        user("after"),
    ]
    text = chat.encode(messages)
    assert text.startswith(BOS + USER + "a\n\nb" + ASSISTANT)
    first = protocol.TOOL_RESULT.format(content="first\n\n" + protocol.UNSUPPORTED_PART.format(type="image_url"))
    second = protocol.TOOL_RESULT.format(content="second")
    assert text.endswith(EOS + USER + f"{first}\n\nbetween\n\n{second}\n\nafter" + ASSISTANT + THINK_CLOSE)


@pytest.mark.parametrize("arguments", ["not json", "[1, 2]", "7"])
def test_arguments_that_are_no_object_are_wrapped(arguments):
    text = chat.encode([user(), assistant(None, tool_calls=[call("f", arguments)])])
    assert protocol.PARAMETER.format(name="arguments", is_string="true", value=arguments) in text


def test_arguments_may_be_a_dict():
    as_dict, as_text = ([user(), assistant("", tool_calls=[call("f", a)])] for a in ({"n": [1, "é"]}, '{"n":[1,"é"]}'))
    assert chat.encode(as_dict) == chat.encode(as_text)


@pytest.mark.parametrize("task", chat.TASKS)
@pytest.mark.parametrize("mode", chat.THINKING_MODES)
def test_tasks(task, mode):
    prompt = chat.encode([user("q", task=task)], thinking_mode=mode)
    opening = ASSISTANT + (THINK_OPEN if mode == "thinking" else THINK_CLOSE) if task == "action" else ""
    assert prompt == BOS + USER + "q" + opening + TASK_TOKENS[task]
    # The answer to an instruction has no think part, whatever the mode.
    answered = chat.encode([user("q", task=task), assistant("Search", reasoning_content="r")], thinking_mode=mode)
    assert answered == prompt + "Search" + EOS


def test_a_task_follows_the_assistants_eos_and_is_not_lost_or_extended():
    titled = chat.encode([user(), assistant("answer", task="title")])
    assert titled.endswith("answer" + EOS + TASK_TOKENS["title"])
    assert chat.encode([user("a"), user("b", task="query")]) == BOS + USER + "a\n\nb" + TASK_TOKENS["query"]
    assert chat.encode([user("a", task="query"), user("b")]) == BOS + USER + "a" + USER + "b" + ASSISTANT + THINK_CLOSE


def test_tools_given_with_context_belong_to_the_context():
    messages = [user("q1"), assistant("a1", reasoning_content="r1"), user("q2")]
    options = {"thinking_mode": "thinking", "tools": [WEATHER]}
    continued = chat.encode(messages[1:], context=messages[:1], **options)
    assert chat.encode(messages[:1], **options) + continued == chat.encode(messages, **options)
    assert continued.startswith("r1" + THINK_CLOSE)


def test_latest_reminder_and_open_turn():
    reminder = {"role": "latest_reminder", "content": "now"}
    after_user = chat.encode([user(), reminder])
    assert after_user == BOS + USER + "question" + ASSISTANT + THINK_CLOSE + LATEST_REMINDER + "now"
    assert (
        chat.encode([reminder, user()]) == BOS + LATEST_REMINDER + "now" + USER + "question" + ASSISTANT + THINK_CLOSE
    )
    assert chat.encode([user(), assistant("so far", wo_eos=True)]).endswith(THINK_CLOSE + "so far")


@pytest.mark.parametrize(
    ("messages", "options", "sentence"),
    [
        ([], {}, "at least one is needed"),
        (["hi"], {}, "message 0 is a str"),
        ([user(), {"role": "bot", "content": ""}], {}, "message 1 has role 'bot'; legal roles are 'system', 'user'"),
        ([{"content": "x"}], {}, "has role None"),
        ([user()], {"context": [{"role": "bot"}]}, "context message 0 has role 'bot'"),
        ([user()], {"thinking_mode": "fast"}, "unknown thinking_mode 'fast'; legal modes are 'chat', 'thinking'"),
        (
            [user()],
            {"reasoning_effort": "medium"},
            "unknown reasoning_effort 'medium'; legal efforts are None, 'low', 'high', 'max'",
        ),
        (
            [user()],
            {"effort_profile": "0731"},
            "unknown effort_profile '0731'; legal profiles are 'preview', 'official'",
        ),
        ([{"role": "developer", "content": ""}], {}, "must not be empty"),
        ([{"role": "developer"}], {}, "must not be empty"),
        ([user(task="sing")], {}, "has task 'sing'; legal tasks are 'action'"),
        ([user(task=["title"])], {}, "legal tasks are 'action'"),
        ([{"role": "system", "content": "s", "task": "title"}], {}, "has task; only roles"),
        ([user(tools=[WEATHER])], {}, "message 0 with role 'user' has tools; only roles 'system', 'developer' may"),
        ([user(response_format={"a": 1})], {}, "has response_format; only roles"),
        ([user(tool_calls=[call("f", "{}")])], {}, "has tool_calls; only roles 'assistant' may"),
        ([user(7)], {}, "content of type int"),
        ([user(["x"])], {}, "content part 'x'"),
        ([user([{"type": "text", "text": 1}])], {}, "its 'text' must be a string"),
        ([assistant(reasoning_content=["r"])], {}, "reasoning_content of type list"),
        ([assistant(tool_calls="f()")], {}, "tool_calls of type str; it must be a list"),
        ([assistant(tool_calls=["f()"])], {}, "malformed tool call 'f()'"),
        ([assistant(tool_calls=[{"name": "f"}])], {}, "malformed tool call"),
        ([assistant(tool_calls=[call(None, "{}")])], {}, "malformed tool call"),
        ([assistant(tool_calls=[call("f", [1])])], {}, "arguments of type list"),
        ([assistant(tool_calls=[call("f", "{}", 3)])], {}, "id of type int"),
        ([{"role": "tool", "tool_call_id": ["x"]}], {}, "tool_call_id of type list"),
        ([user()], {"tools": [{"name": "f"}]}, "malformed tool"),
        ([user()], {"tools": [{"function": {"name": {1, 2}}}]}, "is not JSON"),
    ],
)
def test_bad_input_is_one_sentence(messages, options, sentence):
    with pytest.raises(ValueError) as caught:
        chat.encode(messages, **options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wire_format_is_spelled_in_the_data_file_alone():
    root = Path(chat.__file__).parents[2]
    here = [*root.glob("v4_jax/chat/*.py"), root / "v4_jax/tokenizer.py"]
    here += [*Path(__file__).parent.glob("*.py"), Path(__file__).parents[1] / "test_tokenizer.py"]
    assert len(here) >= 8
    spelled = [(p.name, t) for p in here for t in protocol.SPECIAL_TOKENS if t in p.read_text(encoding="utf-8")]
    assert not spelled
