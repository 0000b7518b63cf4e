"""OpenAI's Responses API, asked by OpenAI's own client: what chats say, as items."""

import httpx
import openai
import pytest

from tests.infer.serving import HELLO, Scripted, serving
from tests.models import two
from v4_jax import chat
from v4_jax.chat.protocol import EOS, SEPARATOR, THINK_CLOSE
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.openai.bodies import BodyError
from v4_jax.infer.openai.completions import Completion, Defaults, Model
from v4_jax.infer.openai.responses_body import read_responses
from v4_jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(320)
PARAMETER = '<｜DSML｜parameter name="place" string="true">Rome "old"</｜DSML｜parameter>\n'
CALL = chat.begin_tool_call("look") + PARAMETER + "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
ARGUMENTS = r'{"place": "Rome \"old\""}'
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}, "strict": True}
CHAT_TOOL = {"type": "function", "function": {"name": "look", "parameters": TOOL["parameters"]}}
THINKS = {"reasoning": {"effort": "high"}}


@pytest.fixture
def scripted(parts):
    """Asks a server that says what it is told to."""
    engine = Scripted(parts[1])
    with serving((engine, parts[1])) as (address, _):
        yield engine, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def prompt(body):
    model = Model("tiny", two().config, TOKENIZER, Defaults(Sampling(), (1,), 8), 2048)
    return TOKENIZER.decode(Completion(read_responses(body)[1], model, 0).requests[0].prompt)


def test_it_says_what_a_chat_says(client):
    asked = dict(model="tiny", temperature=0)
    whole = client.responses.create(input="Hello", max_output_tokens=9, **asked)
    said = client.chat.completions.create(messages=HELLO, max_tokens=9, **asked)
    assert whole.output_text == said.choices[0].message.content and whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens" and whole.store is False
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (said.usage.prompt_tokens, 9)
    *_, item, last = client.responses.create(input="Hello", max_output_tokens=9, stream=True, **asked)
    assert last.type == "response.incomplete" and last.response.output_text == whole.output_text
    assert item.type == "response.output_item.done" and item.item == last.response.output[-1]
    assert item.item.status == whole.output[-1].status == "incomplete"


def test_reasoning_text_and_calls_are_items(scripted):
    engine, client = scripted
    asked = dict(model="tiny", input="Hello", tools=[TOOL], max_output_tokens=500, **THINKS)
    engine.says = [f"why{THINK_CLOSE}Sure.{CALL}{EOS}"] * 2
    whole = client.responses.create(**asked)
    reasoning, message, call = whole.output
    assert whole.status == "completed" and reasoning.content[0].text == "why" and message.content[0].text == "Sure."
    assert (call.name, call.arguments, call.type) == ("look", ARGUMENTS, "function_call")
    assert whole.usage.output_tokens_details.reasoning_tokens == len(TOKENIZER.encode(f"why{THINK_CLOSE}"))
    with client.responses.stream(
        **{key: value for key, value in asked.items() if key != "tools"}, tools=[TOOL]
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))

    def joined(kind):
        return "".join(event.delta for event in events if event.type == f"response.{kind}.delta")

    assert joined("reasoning_text") == "why" and joined("output_text") == "Sure."
    assert joined("function_call_arguments") == ARGUMENTS
    same = [
        [item.model_dump(exclude={"id", "parsed_arguments", "call_id"}) for item in one.output]
        for one in (whole, final)
    ]
    assert [item["type"] for item in same[1]] == ["reasoning", "message", "function_call"]
    assert same[0][0] == same[1][0] and same[0][2] == same[1][2]
    begun = [event.item.type for event in events if event.type == "response.output_item.added"]
    assert begun == ["reasoning", "message", "function_call"]
    # What came goes back, with what the tool returned.
    engine.says = ["Warm." + EOS]
    back = [{"role": "user", "content": "Hello"}, *(item.model_dump(exclude_none=True) for item in whole.output)]
    back.append({"type": "function_call_output", "call_id": call.call_id, "output": "20 C"})
    assert client.responses.create(**asked | {"input": back, "reasoning": {"effort": "none"}}).output_text == "Warm."
    called = {"id": call.call_id, "type": "function", "function": {"name": "look", "arguments": ARGUMENTS}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": "Sure.", "reasoning_content": "why", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "20 C"},
    ]
    assert TOKENIZER.decode(engine.asked[-1].prompt) == chat.encode(messages, tools=[CHAT_TOOL])


def test_calls_that_cannot_be_read_are_text_that_comes_back_as_it_was(scripted):
    engine, client = scripted
    half = chat.begin_tool_call("look").lstrip("\n") + "<｜DSML｜parameter"
    engine.says = [f"Sure.{SEPARATOR}{half}"] * 2
    asked = dict(model="tiny", input="Hello", max_output_tokens=500)
    whole = client.responses.create(**asked)
    assert whole.output_text == f"Sure.{SEPARATOR}{half}"
    *_, last = client.responses.create(**asked, stream=True)
    assert last.response.output_text == whole.output_text


def test_log_probabilities_are_those_of_the_answers_tokens(scripted):
    engine, client = scripted
    engine.says = [f"why{THINK_CLOSE}Yes{EOS}"] * 2
    asked = dict(model="tiny", input="Hello", include=["message.output_text.logprobs"], max_output_tokens=99, **THINKS)
    found = client.responses.create(**asked).output[1].content[0].logprobs
    assert [one.token for one in found] == ["Y", "e", "s", EOS]
    events = [one for one in client.responses.create(**asked, stream=True) if one.type == "response.output_text.delta"]
    assert [one.token for event in events for one in event.logprobs] == ["Y", "e", "s"]


def test_items_are_the_messages_that_say_the_same():
    parts = [{"type": "input_text", "text": "Q"}]
    items = [
        {"role": "developer", "content": "D"},
        {"type": "message", "role": "user", "content": parts},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "why"}]},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": ""},
        {"type": "function_call", "call_id": "b", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "two"}]},
        {"type": "function_call_output", "call_id": "a", "output": "one"},
    ]
    calls = [{"id": id, "type": "function", "function": {"name": "look", "arguments": "{}"}} for id in "ab"]
    messages = [
        {"role": "system", "content": "S"},
        {"role": "system", "content": "D"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "reasoning_content": "why", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "two"},
        {"role": "tool", "tool_call_id": "a", "content": "one"},
    ]
    found = prompt({"input": items, "instructions": "S", "tools": [TOOL], **THINKS})
    expected = dict(thinking_mode="thinking", reasoning_effort="high", tools=[CHAT_TOOL])
    assert found == chat.encode(messages, **expected)


HARMLESS = {
    "store": True,
    "metadata": {"a": "b"},
    "user": "u",
    "include": ["reasoning.encrypted_content"],
    "truncation": "disabled",
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "reasoning": {"summary": "auto"},
    "prompt_cache_key": "k",
    "previous_response_id": None,
}


def test_fields_that_change_nothing_are_taken():
    assert prompt({"input": "Q"} | HARMLESS) == prompt({"input": "Q"})
    schema = {"type": "json_schema", "name": "a", "schema": {"type": "string"}, "strict": True}
    format = read_responses({"input": "Q", "text": {"format": schema}})[1].response_format
    assert format.json_schema.schema_ == {"type": "string"} and format.json_schema.name == "a"
    chosen = read_responses({"input": "Q", "tools": [TOOL], "tool_choice": {"type": "function", "name": "look"}})[1]
    assert chosen.call() == (True, "look")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is 'resp_1': input should be None"),
        ({"conversation": "c"}, "conversation is 'c'"),
        ({"background": True}, "background is True: input should be False"),
        ({"truncation": "auto"}, "truncation is 'auto'"),
        ({"include": ["file_search_call.results"]}, "include.0 is 'file_search_call.results'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0 is of type 'web_search', which is not supported"),
        ({"max_tokens": 3}, "max_tokens is not supported; legal fields are"),
        ({"input": []}, "input is []"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0 is of type 'item_reference', which is not"),
        ({"input": [{"type": ["message"]}]}, "input.0 is of type ['message']"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role is 'tool'; expected user"),
        ({"input": [{"role": "user", "content": "x", "mood": "glad"}]}, "input.0.mood is not supported"),
        ({"input": [{"role": "user", "content": "x", "temperature": 0.0}]}, "input.0.temperature is not supported"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input.0.encrypted_content is not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "a part of type 'input_image'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields, sentence):
    with pytest.raises(ValueError) as caught:
        prompt({"input": "Q"} | fields)
    assert sentence in str(caught.value) and len(str(caught.value)) < 600


def test_errors_have_openais_form(served, client):
    with pytest.raises(openai.BadRequestError, match="previous_response_id is 'x'") as caught:
        client.responses.create(model="tiny", input="x", previous_response_id="x")
    assert caught.value.body["param"] == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")  # nothing is kept
    assert httpx.post(f"{served[0]}/responses", json={"input": "x", "max_output_tokens": 1}).status_code == 200
    with pytest.raises(BodyError):
        read_responses([])


def test_what_goes_wrong_later_is_an_event(scripted):
    engine, client = scripted
    engine.says, engine.breaks_at = ["Sure."], 3
    *_, delta, last = client.responses.create(model="tiny", input="Hello", stream=True)
    assert delta.type == "response.output_text.delta" and last.type == "error" and last.code == "not_finite"
