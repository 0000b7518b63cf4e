"""Anthropic's Messages API, asked by Anthropic's own client: what chats say, as blocks."""

import anthropic
import httpx
import pytest

from tests.infer.serving import HELLO, Scripted, serving
from tests.models import two
from v4_jax import chat
from v4_jax.chat.protocol import ASSISTANT, EOS, SEPARATOR, THINK_CLOSE
from v4_jax.infer.anthropic.body import read_messages_body
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.openai.completions import Completion, Defaults, Model
from v4_jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(320)
PARAMETERS = (
    '<｜DSML｜parameter name="place" string="true">Rome "old"</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">[1, 2]</｜DSML｜parameter>\n'
)
CALL = chat.begin_tool_call("look") + PARAMETERS + "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
INPUT = {"place": 'Rome "old"', "days": [1, 2]}
TOOL = {"name": "look", "description": "d", "input_schema": {"type": "object", "properties": {}}}
FUNCTION = {"name": "look", "description": "d", "parameters": TOOL["input_schema"]}
CHAT_TOOL = {"type": "function", "function": FUNCTION}
THINKS = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}
ASKED = dict(model="tiny", max_tokens=500, messages=HELLO)


def client_of(address, **options):
    return anthropic.Anthropic(base_url=address, max_retries=0, **{"api_key": "none"} | options)


@pytest.fixture
def scripted(parts):
    """Asks a server that says what it is told to."""
    engine = Scripted(parts[1])
    with serving((engine, parts[1])) as (address, _):
        yield engine, client_of(address)


def completion(**fields):
    model = Model("tiny", two().config, TOKENIZER, Defaults(Sampling(), (1,), 8), 2048)
    return Completion(read_messages_body(ASKED | fields), model, 0)


def prompt(**fields):
    return TOKENIZER.decode(completion(**fields).requests[0].prompt)


def test_it_says_what_a_chat_says(served, client):
    asked = dict(model="tiny", messages=HELLO, max_tokens=9)
    said = client.chat.completions.create(**asked, temperature=0)
    whole = client_of(served[0]).messages.create(**asked, extra_body={"temperature": 0})
    assert whole.content[0].text == said.choices[0].message.content and whole.stop_reason == "max_tokens"
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (said.usage.prompt_tokens, 9)
    with client_of(served[0]).messages.stream(**asked, extra_body={"temperature": 0}) as stream:
        final = stream.get_final_message()
    assert final.model_dump(exclude={"id", "content"}) == whole.model_dump(exclude={"id", "content"})
    assert final.content[0].text == whole.content[0].text


def test_thinking_text_and_calls_are_blocks(scripted):
    engine, client = scripted
    engine.says = [f"why{THINK_CLOSE}Sure.{CALL}{EOS}"] * 2
    whole = client.messages.create(**ASKED, tools=[TOOL], **THINKS)
    thinking, text, call = whole.content
    assert whole.stop_reason == "tool_use" and thinking.thinking == "why" and text.text == "Sure."
    assert (call.name, call.input, call.type) == ("look", INPUT, "tool_use")
    with client.messages.stream(**ASKED, tools=[TOOL], **THINKS) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.model_dump(exclude={"id"}) for block in final.content] == [
        block.model_dump(exclude={"id"}) for block in whole.content
    ]
    assert final.stop_reason == "tool_use" and final.usage == whole.usage
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    # What came goes back, with what the tool returned.
    engine.says = ["Warm." + EOS]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "20 C"}]}
    assistant = {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in whole.content]}
    after = [*HELLO, assistant, {"role": "user", "content": [result, {"type": "text", "text": "And?"}]}]
    assert client.messages.create(**ASKED | {"messages": after}, tools=[TOOL]).content[0].text == "Warm."
    called = {"id": call.id, "type": "function", "function": {"name": "look", "arguments": INPUT}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": "Sure.", "reasoning_content": "why", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": call.id, "content": "20 C"},
        {"role": "user", "content": "And?"},
    ]
    assert TOKENIZER.decode(engine.asked[-1].prompt) == chat.encode(messages, tools=[CHAT_TOOL])


def test_why_it_ends(scripted):
    engine, client = scripted
    engine.says = ["Yes" + EOS, "Yes or no", "Yes"]
    assert client.messages.create(**ASKED).stop_reason == "end_turn"
    stopped = client.messages.create(**ASKED, stop_sequences=["x", " or"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", " or", "Yes")
    assert client.messages.create(**ASKED | {"max_tokens": 3}).stop_reason == "max_tokens"


def test_arguments_that_have_no_values_stay_as_they_are_written(scripted):
    engine, client = scripted
    large = CALL.replace("[1, 2]", "1e999")
    engine.says = [large + EOS]
    assert client.messages.create(**ASKED, tools=[TOOL]).content[0].input == {
        "arguments": r'{"place": "Rome \"old\"", "days": 1e999}'
    }


def test_blocks_are_the_messages_that_say_the_same():
    assert prompt(system=[{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}]).startswith(
        chat.encode([{"role": "system", "content": "S"}])
    )
    assert prompt(messages=[*HELLO, {"role": "assistant", "content": "The"}]).endswith(f"{ASSISTANT}{THINK_CLOSE}The")
    call = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "no such place", "is_error": True}
    after = [*HELLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert f"error:{SEPARATOR}no such place" in prompt(messages=after)


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, None),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "adaptive"}}, "low"),
        (THINKS, "high"),
        ({"output_config": {"effort": "max"}}, "max"),
    ],
)
def test_thinking_is_the_chats(fields, effort):
    mode = "chat" if effort is None else "thinking"
    found = completion(**fields)
    assert list(found.requests[0].prompt) == TOKENIZER.encode(
        chat.encode(HELLO, thinking_mode=mode, reasoning_effort=effort)
    )
    assert found.requests[0].reasoning_budget == fields.get("thinking", {}).get("budget_tokens")


def test_a_choice_of_tools_is_the_chats():
    for choice, expected in (
        ({"type": "any"}, (True, None)),
        ({"type": "tool", "name": "look"}, (True, "look")),
        ({"type": "auto", "disable_parallel_tool_use": True}, (False, None)),
        ({"type": "none"}, (False, None)),
    ):
        assert read_messages_body(ASKED | {"tools": [TOOL], "tool_choice": choice}).call() == expected
    schema = {"type": "object"}
    body = read_messages_body(ASKED | {"output_config": {"format": {"type": "json_schema", "schema": schema}}})
    assert body.response_format.json_schema.schema_ == schema


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_tokens": None}, "max_tokens is None"),
        ({"container": "c"}, "container is not supported; legal fields are"),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
        ({"temperature": 1.5}, "temperature is 1.5"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0 is of type 'bash_20250124', which is not"),
        ({"tools": [TOOL | {"input_examples": [{}]}]}, "tools.0.input_examples is not supported"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice has a name if and only if"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role is 'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0 is of type 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking"}]}]}, "is of type 'thinking', which is not"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "whose text is 3; expected a text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}]}, "content.0.x is not"),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": [{"type": "thinking", "thinking": 1}]}]},
            "is 1; expec",
        ),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display is 'omitted'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields, sentence):
    with pytest.raises(ValueError) as caught:
        prompt(**fields)
    assert sentence in str(caught.value) and len(str(caught.value)) < 600


def test_errors_and_keys_have_anthropics_form(served, parts):
    client = client_of(served[0])
    with pytest.raises(anthropic.BadRequestError, match="mood is not supported") as caught:
        client.messages.create(**ASKED, extra_body={"mood": 1})
    assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'other'"):
        client.messages.create(**ASKED | {"model": "other"})
    assert httpx.get(f"{served[0]}/v1/messages").json()["type"] == "error"
    with serving(parts, keys=["one"]) as (address, _):
        with pytest.raises(anthropic.AuthenticationError, match="the key is missing or unknown"):
            client_of(address).messages.create(**ASKED)
        assert client_of(address, api_key="one").messages.create(**ASKED | {"max_tokens": 1}).content
        assert client_of(address, api_key=None, auth_token="one").messages.create(**ASKED | {"max_tokens": 1}).content
        assert httpx.post(f"{address}/messages", json={}).status_code == 401


def test_what_goes_wrong_later_is_an_event(scripted):
    engine, client = scripted
    engine.says, engine.breaks_at = ["Sure."], 3
    events = client.messages.create(**ASKED, stream=True)
    assert next(iter(events)).type == "message_start"
    with pytest.raises(anthropic.APIStatusError, match="are not finite numbers") as caught:
        list(events)
    assert caught.value.body["error"]["type"] == "api_error"


def test_tokens_are_counted_without_an_answer(served):
    """As many as are read when the same is asked, with tools and thinking; what only an answer has is refused."""
    client = client_of(served[0])
    asked = dict(model="tiny", system="Be brief.", messages=HELLO, tools=[TOOL], **THINKS)
    counted = client.messages.count_tokens(**asked)
    assert counted.input_tokens == len(completion(**asked).requests[0].prompt)
    assert counted.input_tokens > client.messages.count_tokens(model="tiny", messages=HELLO).input_tokens
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.count_tokens(**asked, extra_body={"max_tokens": 3})
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'other'"):
        client.messages.count_tokens(model="other", messages=HELLO)
