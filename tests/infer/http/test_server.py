"""The server, asked by OpenAI's own client, and tried against its own OpenAPI page."""

import asyncio
import json
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import schemathesis
import starlette.testclient
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.infer.serving import HELLO, LENGTH, MOST, SLOTS, Scripted, serving, until
from tests.models import two
from v4_jax import chat
from v4_jax.chat.protocol import EOS, THINK_CLOSE
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.http.server import make_app
from v4_jax.infer.http.service import Overloaded, Service, ServiceDown
from v4_jax.infer.score import Scorer, TextToScore

JSON = {"Content-Type": "application/json"}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; this server has 'tiny'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_paths_do_without_their_version(served):
    client = openai.OpenAI(base_url=served[0], api_key="none", max_retries=0)
    assert client.models.retrieve("tiny").id == "tiny"
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).choices


def test_a_chat_whole_and_streamed(client, parts):
    asked = dict(model="tiny", messages=HELLO, max_tokens=9, seed=3, n=2, logprobs=True)
    whole = client.chat.completions.create(**asked)
    prompt = parts[1].tokenizer.encode(chat.encode(HELLO))
    assert whole.usage.prompt_tokens == len(prompt)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert [choice.finish_reason for choice in whole.choices] in (["length"] * 2, ["stop"] * 2, ["length", "stop"])
    assert whole.choices[0].message.content != whole.choices[1].message.content
    text, tokens, finish = ["", ""], [[], []], [None, None]
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert chunk.id.startswith("chatcmpl-")
        for choice in chunk.choices:
            text[choice.index] += choice.delta.content or ""
            tokens[choice.index] += (choice.logprobs and choice.logprobs.content) or []
            finish[choice.index] = choice.finish_reason or finish[choice.index]
    assert chunk.choices == [] and chunk.usage == whole.usage
    assert text == [choice.message.content for choice in whole.choices]
    assert tokens == [choice.logprobs.content for choice in whole.choices]
    assert finish == [choice.finish_reason for choice in whole.choices]


def test_a_completion_of_text_and_of_tokens(client, parts):
    asked = dict(model="tiny", max_tokens=7, temperature=0)
    text = client.completions.create(prompt="Hello", logprobs=0, **asked)
    ids = [0, *parts[1].tokenizer.encode("Hello")]
    assert client.completions.create(prompt=ids, **asked).choices[0].text == text.choices[0].text
    assert len(text.choices[0].logprobs.tokens) == text.usage.completion_tokens
    pieces = [chunk.choices[0].text for chunk in client.completions.create(prompt="Hello", stream=True, **asked)]
    assert "".join(pieces) == text.choices[0].text


def test_several_texts_are_each_continued(client):
    """As each alone; more of them than there are slots."""
    asked = dict(model="tiny", max_tokens=5, temperature=0)
    prompts = ["Hello", "ab", "c"]
    alone = [client.completions.create(prompt=prompt, **asked) for prompt in prompts]
    whole = client.completions.create(prompt=prompts, **asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert [choice.text for choice in whole.choices] == [one.choices[0].text for one in alone]
    assert whole.usage.total_tokens == sum(one.usage.total_tokens for one in alone)
    text = [""] * 3
    for chunk in client.completions.create(prompt=prompts, stream=True, **asked):
        text[chunk.choices[0].index] += chunk.choices[0].text
    assert text == [choice.text for choice in whole.choices]
    with pytest.raises(openai.BadRequestError, match="token id 9999 is outside"):
        client.completions.create(prompt=[[5], [9999]], **asked)


def test_an_echo_says_how_probable_the_prompt_is(client, parts):
    """As scored by the model itself, whatever stop ids are in it, and what follows is what follows without an echo."""
    config, params = two().config, two().params
    ids = [0, *parts[1].tokenizer.encode("Hello"), config.eos_token_id, *parts[1].tokenizer.encode("lo!")]
    scorer = Scorer(config, longest=len(ids), policy="float32", cache_dtype="float32", batch=1, chunk=32)
    [score] = scorer.score(params, [TextToScore(1, ids)])
    asked = dict(
        model="tiny", prompt=ids, max_tokens=3, temperature=1, seed=5, logit_bias={1: -100}, presence_penalty=1
    )
    plain = client.completions.create(**asked).choices[0]
    for echoed in (
        client.completions.create(**asked, echo=True, logprobs=1, stop="lo!"),
        client.completions.create(**asked | {"max_tokens": 0}, echo=True, logprobs=1),
    ):
        choice, found = echoed.choices[0], echoed.choices[0].logprobs
        new = echoed.usage.completion_tokens
        assert echoed.usage.prompt_tokens == len(ids) and len(found.tokens) == len(ids) + new and new in (0, 3)
        assert choice.text == parts[1].tokenizer.decode(ids) + (plain.text if new else "")
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None and choice.finish_reason == "length"
        values = np.asarray(found.token_logprobs[1 : len(ids)])
        np.testing.assert_allclose(values, score.logprobs, rtol=0, atol=1e-4)
    text, tokens = "", []
    for chunk in client.completions.create(**asked, echo=True, logprobs=1, stream=True):
        text += chunk.choices[0].text
        tokens += chunk.choices[0].logprobs.tokens
    assert text == parts[1].tokenizer.decode(ids) + plain.text and len(tokens) == len(ids) + 3
    # Of a text, what was given alone: each of its tokens comes after the one that begins a text.
    given = client.completions.create(model="tiny", prompt="Hello", max_tokens=0, echo=True, logprobs=0).choices[0]
    assert given.text == "Hello" and given.logprobs.tokens == list("Hello")
    np.testing.assert_allclose(given.logprobs.token_logprobs, score.logprobs[:5], rtol=0, atol=1e-4)


def test_a_stop_string_ends_an_answer(client):
    asked = dict(model="tiny", prompt="Hello", temperature=0.0, max_tokens=20)
    text = client.completions.create(**asked).choices[0].text
    stopped = client.completions.create(**asked, stop=text[5:7]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == text[: text.index(text[5:7])]


def test_reasoning_comes_apart(client):
    """The tiny model never closes its reasoning: all it writes is that."""
    asked = dict(model="tiny", messages=HELLO, reasoning_effort="high", max_tokens=5, seed=1)
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.content == "" and message.reasoning_content
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == message.reasoning_content
    enabled = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, seed=1, extra_body={"thinking": {"type": "enabled"}}
    )
    assert enabled.choices[0].message.reasoning_content == message.reasoning_content


def test_a_tool_that_must_be_called(client, parts):
    """The answer begins as a call does, at once or after reasoning."""
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    begun = chat.begin_tool_call("look").lstrip("\n")
    asked = dict(model="tiny", messages=HELLO, tools=tools, max_tokens=len(begun) + 5)
    chosen = {"type": "function", "function": {"name": "look"}}
    free, forced = (
        client.chat.completions.create(**asked, tool_choice=choice).choices[0].message for choice in ("auto", chosen)
    )
    assert forced.unparsed_tool_calls.startswith(begun) and forced.content == ""
    assert not hasattr(free, "unparsed_tool_calls")
    for choice, sentence in (
        ({"type": "function", "function": {"name": "hear"}}, r"tool_choice asks for 'hear'; the tools are \['look'\]"),
        ("sometimes", "tool_choice is 'sometimes': "),
    ):
        with pytest.raises(openai.BadRequestError, match=sentence):
            client.chat.completions.create(**asked, tool_choice=choice)
    thinking = {"type": "enabled", "budget_tokens": 3}
    forced = client.chat.completions.create(**asked, tool_choice=chosen, extra_body={"thinking": thinking})
    message = forced.choices[0].message
    assert message.reasoning_content and message.content == "" and message.unparsed_tool_calls.startswith(begun)


def test_calls_stream_as_they_are_written(parts):
    """Arguments piece by piece, under the ids of the whole answer; one call alone where no more are wanted."""
    text = 'Mind the "gap".\n' * 5
    parameter = f'<｜DSML｜parameter name="text" string="true">{text}</｜DSML｜parameter>\n'
    first = chat.begin_tool_call("say") + parameter + "</｜DSML｜invoke>\n"
    second = chat.begin_tool_call("stop").strip().split("\n")[-1] + "\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    asked = dict(model="tiny", messages=HELLO, max_tokens=500, seed=1)
    engine = Scripted(parts[1], *[first + second + EOS] * 2, *[f"why{THINK_CLOSE}{first}{second}{EOS}"] * 2)
    with serving((engine, parts[1])) as (address, service):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        whole = client.chat.completions.create(**asked).choices[0]
        assert whole.finish_reason == "tool_calls" and len(whole.message.tool_calls) == 2
        assert json.loads(whole.message.tool_calls[0].function.arguments) == {"text": text}
        with client.chat.completions.stream(**asked) as stream:
            chunks = [event.chunk for event in stream if event.type == "chunk"]
            final = stream.get_final_completion().choices[0]
        deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        assert len(deltas) > 50 and final.finish_reason == "tool_calls"
        assert all(isinstance(delta.function.name, str) == bool(delta.id) for delta in deltas)
        for one, other in zip(final.message.tool_calls, whole.message.tool_calls, strict=True):
            assert (one.id, one.function.name) == (other.id, other.function.name)
            assert one.function.arguments == other.function.arguments
        asked |= dict(parallel_tool_calls=False, reasoning_effort="high")
        alone = client.chat.completions.create(**asked)
        [call] = alone.choices[0].message.tool_calls
        assert call.function.name == "say" and alone.choices[0].finish_reason == "tool_calls"
        assert alone.usage.completion_tokens_details.reasoning_tokens == 4  # three letters and the end of it
        *_, last = client.chat.completions.create(**asked, stream=True)
        assert last.choices[0].finish_reason == "tool_calls"
        until(lambda: service.active == 0 and engine.idle)


def test_an_answer_that_keeps_to_a_schema(client, parts):
    """Whole, and after reasoning that its budget ends. Left to itself, this model would write blanks for long."""
    blanks = {token: -100 for token in parts[1].tokenizer.encode(" \t\r\n")}
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["kind", "legs"],
        "additionalProperties": False,
    }
    asked = dict(model="tiny", messages=HELLO, max_tokens=200, temperature=0.3, logit_bias=blanks)
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
    for more in ({}, {"extra_body": {"thinking": {"type": "enabled", "budget_tokens": 5}}}):
        choice = client.chat.completions.create(**asked, response_format=form, seed=4, **more).choices[0]
        pet = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and set(pet) == {"kind", "legs"} and pet["kind"] in ("cat", "dog")
        assert hasattr(choice.message, "reasoning_content") == bool(more)
    free = client.chat.completions.create(**asked | {"max_tokens": 3}, response_format={"type": "json_object"})
    assert free.choices[0].message.content.startswith(("{}", '{"'))
    for form, sentence in (
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}, "JSON schema cannot"),
        ({"type": "xml"}, "response_format is "),
        ({"type": "json_schema"}, "response_format.json_schema is missing"),
    ):
        with pytest.raises(openai.BadRequestError, match=sentence):
            client.chat.completions.create(**asked, response_format=form)


def test_sampling_is_the_bodys(client, parts):
    """A bias decides, the best tokens are named with their log-probabilities, penalties change the text."""
    tokenizer = parts[1].tokenizer
    [z] = tokenizer.encode("z")
    asked = dict(model="tiny", messages=HELLO, max_tokens=5, temperature=0)
    biased = client.chat.completions.create(**asked, logit_bias={z: 100}, logprobs=True, top_logprobs=3).choices[0]
    assert biased.message.content == "zzzzz"
    for entry in biased.logprobs.content:
        assert entry.bytes == [122] and len(entry.top_logprobs) == 3
        values = [other.logprob for other in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and entry.logprob <= values[0]
    penalized = client.chat.completions.create(**asked, logit_bias={z: 100}, frequency_penalty=2, presence_penalty=2)
    assert penalized.choices[0].message.content == "zzzzz"  # 100 outweighs five times 2, and 2
    plain, varied = (
        client.completions.create(model="tiny", prompt="aaaa", max_tokens=40, temperature=0, **more).choices[0].text
        for more in ({}, {"extra_body": {"repetition_penalty": 5.0}})
    )
    assert len(set(varied)) > len(set(plain))
    legacy = client.completions.create(model="tiny", prompt="a", max_tokens=2, logprobs=2).choices[0].logprobs
    assert all(len(best) == 2 for best in legacy.top_logprobs)  # parts of characters too


@pytest.mark.parametrize(
    ("fields", "sentence", "param"),
    [
        ({"messages": []}, "messages is []", "messages"),
        ({"messages": [{"role": "bot", "content": ""}]}, "message 0 has role 'bot'", None),
        ({"temperature": 3}, "temperature is 3: ", "temperature"),
        ({"max_tokens": LENGTH}, f"exceed the {LENGTH} tokens that a slot has room for", None),
        ({"n": 9}, "n is 9, but there are 2 slots", None),
        ({"extra_body": {"unheard": 1}}, "unheard is not supported", "unheard"),
    ],
)
def test_what_is_wrong_is_said(client, served, fields, sentence, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO} | fields)
    assert sentence in caught.value.body["message"] and caught.value.body["param"] == param
    assert served[1].active == 0


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", "/v1/completions", {"content": b"{", "headers": JSON}, 400),
        ("POST", "/v1/completions", {"content": b"[" * 9999, "headers": JSON}, 400),
        ("POST", "/v1/completions", {"content": b"{}"}, 415),
        ("POST", "/v1/completions", {"json": [1]}, 400),
        ("POST", "/v1/completions", {"content": rb'{"prompt": "x", "\ud800": 1}', "headers": JSON}, 400),
        ("POST", "/v1/chat/completions", {"content": rb'{"messages": [], "\ud800": 1}', "headers": JSON}, 400),
        ("POST", "/v1/completions", {"content": b'{"prompt": "x", "seed": 1e999}', "headers": JSON}, 400),
        ("POST", "/v1/completions", {"content": b'\xef\xbb\xbf{"prompt": "x", "max_tokens": 1}', "headers": JSON}, 200),
        ("GET", "/v1/completions", {}, 405),
        ("GET", "/", {}, 404),
    ],
)
def test_errors_have_openais_form(served, method, path, options, status):
    response = httpx.request(method, served[0] + path, **options)
    assert response.status_code == status
    if status == 200:
        return
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_keys_are_kept_apart_in_the_prefix_cache(parts):
    """What the engine is asked; that another salt finds nothing is the prefix cache's test."""

    def salts(**options):
        service, seen = Service(parts[0], MOST), []
        app = make_app(service, parts[1], **options)

        async def tokens(requests, ended_early):
            seen.extend(request.salt for request in requests)
            raise Overloaded("seen")
            yield

        service.tokens = tokens
        with starlette.testclient.TestClient(app, raise_server_exceptions=False) as client:
            for key in ("one", "two", "one"):
                sent = {"Authorization": f"Bearer {key}"}
                assert client.post("/v1/completions", json={"prompt": "x"}, headers=sent).status_code == 429
        return seen

    first, second, third = salts(keys=["one", "two"])
    assert first and second and first == third != second
    assert salts(keys=["one", "two"], share_prefixes=True) == [b""] * 3 == salts()


def test_logits_that_are_not_finite_are_an_error(parts):
    """Whole, and streamed after the first tokens; others are answered as ever."""

    class Damaged:
        """The engine, whose tokens from the second on are broken where the prompt begins so."""

        def __init__(self, engine):
            self._engine, self._numbers = engine, {}

        def __getattr__(self, name):
            return getattr(self._engine, name)

        def submit(self, request):
            number = self._engine.submit(request)
            self._numbers[number] = -1 if len(request.prompt) < 5 else len(request.prompt) % 2
            return number

        def round(self):
            events = []
            for event in self._engine.round():
                left = self._numbers[event.request]
                self._numbers[event.request] = left - 1
                if left == 0:
                    self._engine.cancel(event.request)
                    event = event._replace(finish="error", logprob=float("nan"))
                events.append(event)
            return events

    with serving((Damaged(parts[0]), parts[1])) as (address, service):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        asked = dict(model="tiny", max_tokens=6, seed=1, extra_body={}, logit_bias={1: -100})
        assert client.completions.create(**asked, prompt="x").usage.completion_tokens == 6
        for prompt in ("12345", "123456"):  # the first token, the second one
            with pytest.raises(openai.InternalServerError, match="are not finite numbers") as caught:
                client.completions.create(**asked, prompt=prompt)
            assert caught.value.body["code"] == "not_finite"
        with pytest.raises(openai.APIError, match="are not finite numbers"):
            list(client.completions.create(**asked, prompt="123456", stream=True))
        until(lambda: service.active == 0 and parts[0].idle)


def test_keys(parts):
    with serving(parts, keys=["one", "two"]) as (address, _):
        for key in ("one", "two"):
            assert openai.OpenAI(base_url=f"{address}/v1", api_key=key).models.retrieve("tiny")
        for key in ("three", "on", "one "):
            with pytest.raises(openai.AuthenticationError, match="the key is missing or unknown"):
                openai.OpenAI(
                    base_url=f"{address}/v1", api_key=key.strip() + ("x" if key == "one " else "")
                ).models.list()
        for path in ("/v1/models", "/models", "/models/tiny"):
            assert httpx.get(address + path).headers["WWW-Authenticate"] == "Bearer"
        for path in ("/completions", "/chat/completions"):
            assert httpx.post(address + path, json={}).status_code == 401
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_metrics(served, client):
    client.completions.create(model="tiny", prompt="x", max_tokens=3, temperature=0)
    page = httpx.get(served[0] + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(values['v4_jax_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(values["v4_jax_generated_tokens_total"]) >= 3 and float(values["v4_jax_slots"]) == SLOTS
    assert float(values["v4_jax_active_requests"]) == 0 and float(values["v4_jax_first_token_seconds_count"]) >= 1


def test_the_time_between_tokens_is_without_that_of_the_prompt(parts):
    class Slow(Scripted):
        draft_steps = 0

        def round(self):
            if len(self._left.get(0, ())) == 6:
                time.sleep(0.5)  # reads the prompt
            return super().round()

    with serving((Slow(parts[1], "Hello" + EOS), parts[1])) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        client.completions.create(model="tiny", prompt="x", max_tokens=6)
        page = httpx.get(f"{address}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(values["v4_jax_first_token_seconds_sum"]) >= 0.5
    assert float(values["v4_jax_token_seconds_count"]) == 1 and float(values["v4_jax_token_seconds_sum"]) < 0.08


def test_a_broken_engine_is_said(parts):
    """Requests that are there fail with 503, later ones too, and so does /health."""

    class Broken:
        idle, slots, waiting, draft_depth, max_length = False, 2, 0, 0, LENGTH

        def submit(self, request):
            return 0

        def round(self):
            time.sleep(0.3)
            raise RuntimeError("broken")

    threading.excepthook, hook = lambda arguments: None, threading.excepthook
    try:
        with serving((Broken(), parts[1])) as (address, service):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            for _ in range(2):
                with pytest.raises(openai.InternalServerError) as caught:
                    client.completions.create(model="tiny", prompt="x")
                assert caught.value.status_code == 503
            assert httpx.get(f"{address}/health").status_code == 503 and service.active == 0
    finally:
        threading.excepthook = hook


def test_closing_fails_what_is_left(parts):
    async def scenario():
        service = Service(parts[0], MOST)
        await service.start()
        tokens = service.tokens([Request([3, 4, 5], 1500, stop_ids=())], lambda event: False)
        await anext(tokens)
        await service.close()
        with pytest.raises(ServiceDown):
            async for _ in tokens:
                pass

    asyncio.run(scenario())
    assert list(parts[0].run()) == [] and parts[0].idle


# A legal body may still not fit the model.
LEFT_OUT = [positive_data_acceptance]

PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
    *("/v1/models", "/v1/models/{model}", "/health", "/metrics"),
)


@pytest.mark.parametrize("path", PATHS)
def test_the_page_holds(served, path):
    """Bodies made of the page, legal ones and not, get answers as the page says."""
    schema = schemathesis.openapi.from_url(served[0] + "/openapi.json")
    assert set(schema) == set(PATHS)
    for operation in schema[path].values():

        @given(case=operation.as_strategy())
        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def holds(case):
            for name in ("max_tokens", "max_output_tokens"):
                if isinstance(case.body, dict) and isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 3)
            case.call_and_validate(excluded_checks=LEFT_OUT)

        holds()


def test_the_page_describes_the_bodies(served):
    page = httpx.get(served[0] + "/openapi.json").json()
    fields = page["components"]["schemas"]["ChatBody"]["properties"]
    assert {"messages", "tools", "reasoning_effort", "stream"} <= set(fields)
    assert json.dumps(page).count("#/$defs") == 0
