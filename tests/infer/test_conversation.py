"""What clients send as a conversation: nothing of it is lost on the way to the prompt, or it is refused by name."""

import pytest

from v4_jax import chat
from v4_jax.chat import encoding
from v4_jax.chat.protocol import ASSISTANT, BOS, EOS, SEPARATOR, THINK_CLOSE, THINK_OPEN, USER
from v4_jax.infer.conversation import check_tools
from v4_jax.infer.prompts import chat_prompt
from v4_jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(320)
ASKED = {"role": "user", "content": "Q"}
CALLED = {"name": "f", "arguments": '{"x": 1}'}


def prompt(*messages, mode="non-think", **options):
    return TOKENIZER.decode(chat_prompt(TOKENIZER, messages, mode, **options).ids)


def said(**fields):
    return {"role": "assistant", "content": None} | fields


ROLES = ("system", "developer")


@pytest.mark.parametrize("mode", ["non-think", "high"])
def test_a_developer_is_the_system(mode):
    for before in ([], [ASKED, said(content="A")]):
        spoken = [prompt(*before, {"role": role, "content": "In French."}, ASKED, mode=mode) for role in ROLES]
        assert spoken[0] == spoken[1] and "In French." in spoken[0]


@pytest.mark.parametrize(("mode", "think"), [("non-think", THINK_CLOSE), ("high", THINK_OPEN)])
def test_what_comes_last_decides_who_speaks(mode, think):
    opened = f"{ASSISTANT}{think}"
    assert prompt({"role": "system", "content": "S"}, mode=mode) == f"{BOS}S{opened}"
    late = prompt(ASKED, said(content="A"), {"role": "developer", "content": "S"}, mode=mode)
    assert late.endswith(f"A{EOS}S{opened}")
    closed = f"{opened}{THINK_CLOSE if think == THINK_OPEN else ''}"
    for extra in ({}, {"prefix": True}):
        assert prompt(ASKED, said(content="The", **extra), mode=mode) == f"{BOS}{USER}Q{closed}The"
    assert prompt({"role": "system", "content": "S"}, said(content="The"), mode=mode) == f"{BOS}S{closed}The"
    assert prompt(said(content="The"), mode=mode) == f"{BOS}{closed}The"
    reasoned = chat_prompt(TOKENIZER, [ASKED, said(content="The", reasoning="why")], mode)
    assert TOKENIZER.decode(reasoned.ids).endswith((f"why{THINK_CLOSE}" if mode == "high" else THINK_CLOSE) + "The")
    assert reasoned.thinking_mode == "chat"  # what follows is answer


def test_other_conversations_are_encoded_as_they_are():
    messages = [
        {"role": "system", "content": "S"},
        ASKED,
        said(content="A", reasoning_content="why", tool_calls=[{"id": "a", "type": "function", "function": CALLED}]),
        {"role": "tool", "tool_call_id": "a", "content": "r"},
    ]
    assert prompt(*messages, mode="high") == chat.encode(messages, thinking_mode="thinking", reasoning_effort="high")


def test_parts_of_every_kind_of_text_count():
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, {"type": "output_text", "text": "c"}]
    assert f"{USER}a{SEPARATOR}b{SEPARATOR}c{ASSISTANT}" in prompt({"role": "user", "content": parts})
    refused = said(content=[{"type": "refusal", "refusal": "no"}])
    assert f"no{EOS}" in prompt(ASKED, refused, ASKED) and f"no{EOS}" in prompt(ASKED, said(refusal="no"), ASKED)


def test_names_and_older_and_other_servers_words_are_honoured():
    assert f"{USER}alice: hi" in prompt({"role": "user", "name": "alice", "content": "hi"})
    newer = [
        said(tool_calls=[{"id": "a", "type": "function", "function": CALLED}], reasoning_content="why"),
        {"role": "tool", "tool_call_id": "a", "name": "f", "content": "r"},
    ]
    older = [said(function_call=CALLED, reasoning="why"), {"role": "function", "name": "f", "content": "r"}]
    tools = [{"type": "function", "function": {"name": "f"}}]  # with which reasoning is kept
    spoken = [prompt(ASKED, *messages, mode="high", tools=tools) for messages in (newer, older)]
    assert spoken[0] == spoken[1] and f"why{THINK_CLOSE}" in spoken[0]
    block = "<｜DSML｜tool_calls>half"
    assert f"A{SEPARATOR}{block}{EOS}" in prompt(ASKED, said(content="A", unparsed_tool_calls=block), ASKED)


@pytest.mark.parametrize("arguments", ["", " ", "null", "{}", None, {}])
def test_empty_arguments_are_none(arguments):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    bare = {"id": "a", "type": "function", "function": {"name": "f"}}
    result = {"role": "tool", "tool_call_id": "a", "content": "r"}
    found = prompt(ASKED, said(tool_calls=[call]), result)
    assert found == prompt(ASKED, said(tool_calls=[bare]), result) and "parameter" not in found


def test_what_is_empty_loses_nothing():
    answered = said(content="A", refusal=None, annotations=[], audio=None, function_call=None, tool_calls=[])
    assert prompt(ASKED, answered, ASKED) == prompt(ASKED, said(content="A"), ASKED)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([{"role": "bot", "content": ""}], "message 0 has role 'bot'; legal roles are 'system', 'user'"),
        ([ASKED | {"role": ["user"]}], "message 0 has role ['user']; legal roles are"),
        ([ASKED | {"mood": "glad"}], "message 0 has 'mood', which is not supported; legal are role, content, name"),
        ([ASKED | {"weight": 0}], "message 0 has 'weight', which is not supported"),  # zero says something
        (
            [ASKED | {"content": [{"type": "image_url", "image_url": {"url": ""}}]}],
            "type 'image_url'; this model reads",
        ),
        ([ASKED | {"content": [{"type": "input_audio", "input_audio": {}}]}], "a part of type 'input_audio'"),
        ([ASKED | {"content": [{"type": "riddle"}]}], "a part of type 'riddle'; this model reads text alone"),
        ([ASKED | {"content": [{"type": "text", "text": 3}]}], "whose text is 3; expected a text"),
        ([ASKED | {"content": ["x"]}], "message 0 has a part 'x'"),
        ([ASKED | {"name": 3}], "message 0 has a name of type int"),
        ([ASKED, said(content="A", prefix=True), ASKED], "message 1 has prefix, but is not the last message"),
        ([ASKED, said(tool_calls=[{"id": "a", "function": CALLED}])], "the last message calls tools; expected their"),
        ([ASKED, said(tool_calls=[{"id": "a", "type": "custom", "custom": {}}]), ASKED], "message 1 has a tool call"),
        ([ASKED, said(reasoning="a", reasoning_content="b"), ASKED], "both reasoning and reasoning_content"),
        ([{"role": "function", "name": "f", "content": "r"}], "no function_call stands before it"),
    ],
)
def test_what_has_no_place_is_refused_by_name(messages, sentence):
    with pytest.raises(ValueError) as caught:
        prompt(*messages)
    assert sentence in str(caught.value) and len(str(caught.value)) < 400


def test_continuing_may_be_said():
    assert prompt(ASKED, said(content="A"), continues=True).endswith("A")
    with pytest.raises(ValueError, match="the last message has role 'user'; expected 'assistant'"):
        prompt(ASKED, continues=True)
    with pytest.raises(ValueError, match="continue_final_message is false; expected a message to answer"):
        prompt(ASKED, said(content="A"), continues=False)


@pytest.mark.parametrize(
    ("tool", "sentence"),
    [
        ({"type": "function", "function": {}}, "tool 0 has the name None"),
        ({"type": "function", "function": {"name": ""}}, "tool 0 has the name ''"),
        ({"type": "web_search"}, "tool 0 is of type 'web_search'"),
        ({"type": "function", "name": "f"}, "tool 0 has 'name', which is not supported"),
    ],
)
def test_tools_have_names(tool, sentence):
    check_tools([{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(ValueError, match=sentence):
        prompt(ASKED, tools=[tool])


def test_many_messages_are_joined_at_once(monkeypatch):
    """Questions in a row become one turn; to join it anew for each of them would take quadratic time."""
    join, joined = encoding._joined, []

    def spy(parts):
        joined.append(len(parts))
        return join(parts)

    monkeypatch.setattr(encoding, "_joined", spy)
    assert prompt(*[ASKED] * 50).count("Q") == 50
    assert joined == [50]
