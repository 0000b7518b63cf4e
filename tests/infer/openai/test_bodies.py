"""Request bodies: what is understood, and what is refused in which words."""

import pytest

from tests.models import two
from v4_jax import chat
from v4_jax.infer.engine.requests import Event
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.openai.answers import Answer, usage
from v4_jax.infer.openai.bodies import BodyError, ChatBody, CompletionBody, read_body
from v4_jax.infer.openai.completions import Completion, Defaults, Model
from v4_jax.tokenizer import ByteTokenizer

HELLO = [{"role": "user", "content": "Hello"}]


def test_the_kind_is_told_by_what_a_body_holds():
    assert isinstance(read_body({"messages": HELLO}), ChatBody)
    assert isinstance(read_body({"prompt": "Hello"}), CompletionBody)
    assert read_body({"prompt": [1, 2]}).prompt == [1, 2]


@pytest.mark.parametrize(
    ("fields", "default", "mode"),
    [
        ({}, "non-think", "non-think"),
        ({}, "max", "max"),
        ({"reasoning_effort": "none"}, "max", "non-think"),
        ({"reasoning_effort": "low"}, "max", "low"),
        ({"reasoning_effort": "minimal"}, "non-think", "low"),
        ({"reasoning_effort": "medium"}, "non-think", "low"),
        ({"reasoning_effort": "high"}, "non-think", "high"),
        ({"reasoning_effort": "xhigh"}, "non-think", "max"),
        ({"thinking": {"type": "enabled"}}, "non-think", "low"),
        ({"thinking": {"type": "enabled"}}, "max", "max"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "max"}, "non-think", "max"),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, "high", "non-think"),
    ],
)
def test_efforts_are_the_release_modes(fields, default, mode):
    assert read_body({"messages": HELLO, **fields}).mode(default) == mode


def test_limits_and_stops():
    assert read_body({"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 7}).limit == 7
    assert read_body({"messages": HELLO, "max_tokens": 5}).limit == 5
    assert read_body({"prompt": "x", "stop": "a"}).stops == ["a"]
    assert read_body({"prompt": "x", "stop": ["a", "b"]}).stops == ["a", "b"]
    assert read_body({"prompt": "x"}).stops == []


@pytest.mark.parametrize(
    ("content", "sentence", "param"),
    [
        ([], "the body is a list; expected an object", None),
        ({}, 'the body has neither "messages" nor "prompt"', None),
        ({"prompt": "x", "foo": 1}, "foo is not supported; legal fields are ", "foo"),
        ({"prompt": "x", "echo": 1}, "echo is 1: input should be a valid boolean", "echo"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens is 0; expected at least 1, or echo true", "max_tokens"),
        ({"prompt": "x", "suffix": "y"}, "suffix is not supported: ", "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of is 2 and n 1; ", "best_of"),
        ({"prompt": ["x", [1]]}, "prompt is ['x', [1]]: ", "prompt"),
        ({"prompt": ["x"] * 600, "n": 2}, "prompt has 600 texts and n is 2; expected at most 1024", "prompt"),
        ({"messages": HELLO, "chat_template_kwargs": {"mood": 1}}, "chat_template_kwargs.mood is not supported", None),
        (
            {"messages": HELLO, "reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "max"}},
            "reasoning_effort ('low') and chat_template_kwargs.reasoning_effort ('max') do not agree; expected one",
            "reasoning_effort",
        ),
        (
            {"messages": HELLO, "thinking": {"type": "enabled"}, "chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs.enable_thinking (False) and thinking (True) do not agree",
            "chat_template_kwargs.enable_thinking",
        ),
        ({"prompt": "x", "temperature": "hot"}, "temperature is 'hot': input should be a valid number", "temperature"),
        ({"prompt": "x", "temperature": -1}, "temperature is -1: input should be greater than", "temperature"),
        ({"prompt": "x", "n": 0}, "n is 0: input should be greater than", "n"),
        ({"prompt": "x", "n": True}, "n is True: input should be a valid integer", "n"),
        ({"prompt": 3}, "prompt is 3: input should be a valid string or input should be a valid list", "prompt"),
        ({"prompt": []}, "prompt is []: ", "prompt"),
        ({"messages": []}, "messages is []: list should have at least 1 item", "messages"),
        ({"messages": ["x"]}, "messages.0 is 'x': input should be a valid dictionary", "messages.0"),
        ({"messages": HELLO, "response_format": {"type": "text", "x": 1}}, "response_format.x is not", None),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs is for log-probabilities; expected", "top_logprobs"),
        ({"prompt": "x", "stream_options": {}}, "stream_options is for streams; expected", "stream_options"),
        ({"prompt": "x", "n": 300_000}, "n is 300000: input should be less than or equal to 1024", "n"),
        ({"messages": HELLO * 100_001}, "messages is [{'role'", "messages"),
        ({"messages": HELLO, "thinking": {}}, "thinking.type is missing", "thinking.type"),
        ({"prompt": "x", "stop": [1]}, "stop is ", "stop"),
        ({"prompt": "x", "seed": -2}, "seed is -2: input should be greater than or equal to -1", "seed"),
        ({"prompt": "x", "user": "y" * 200, "seed": 2**32}, "seed is 4294967296: input should be less than", "seed"),
        ({"prompt": "x", "metadata": "y" * 200}, "metadata is 'yyyyy", "metadata"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(content, sentence, param):
    with pytest.raises(BodyError) as caught:
        read_body(content)
    assert str(caught.value).startswith(sentence) and len(str(caught.value)) < 400
    if param:
        assert caught.value.param == param


HARMLESS = {
    "store": True,
    "metadata": {"a": "b"},
    "user": "me",
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "stop": "",
    "seed": -1,
    "top_k": -1,
    "stream": True,
    "stream_options": {"include_obfuscation": False},
}
OF_A_CHAT = {"parallel_tool_calls": True, "verbosity": "low", "chat_template_kwargs": {}}
OF_A_TEXT = {"echo": False, "suffix": None, "best_of": 1}


@pytest.mark.parametrize(
    ("asked", "more"), [({"messages": HELLO}, OF_A_CHAT), ({"prompt": "Hello"}, OF_A_TEXT)], ids=["chat", "text"]
)
def test_harmless_fields_change_no_request(asked, more):
    model = Model("tiny", two().config, ByteTokenizer(320), Defaults(Sampling(top_k=5), (1,), 8), 2048)
    plain, laden = (Completion(read_body(body), model, 7) for body in (asked | {"top_k": 0}, asked | HARMLESS | more))
    assert plain.requests == laden.requests and plain.requests[0].sampling.seed == 7
    assert read_body(asked | {"stop": ["", "a"]}).stops == ["a"]


@pytest.mark.parametrize(
    ("template", "plain"),
    [
        ({"thinking": True}, {"thinking": {"type": "enabled"}}),
        ({"enable_thinking": True, "reasoning_effort": "max"}, {"reasoning_effort": "max"}),
        ({"thinking_mode": "chat"}, {"reasoning_effort": "none"}),
        ({"thinking_mode": "thinking", "effort_profile": "official"}, {"thinking": {"type": "enabled"}}),
        ({"drop_thinking": True}, {"reasoning_effort": "high"}),
    ],
)
def test_what_a_template_is_told_of_thinking_is_honoured(template, plain):
    model = Model("tiny", two().config, ByteTokenizer(320), Defaults(Sampling(), (1,), 8, "high"), 2048)
    bodies = ({"messages": HELLO, "chat_template_kwargs": template}, {"messages": HELLO, **plain})
    told, said = (Completion(read_body(body), model, 0).requests[0].prompt for body in bodies)
    kept = {"role": "assistant", "content": "A", "reasoning_content": "why"}
    turns = {"messages": [*HELLO, kept, *HELLO], "reasoning_effort": "high"}
    dropped, all_ = (
        Completion(read_body(turns | {"chat_template_kwargs": {"drop_thinking": drop}}), model, 0).requests[0].prompt
        for drop in (True, False)
    )
    profile = template.get("effort_profile", "preview")
    official = dict(thinking_mode="thinking", reasoning_effort="high", effort_profile="official")
    assert told == (said if profile == "preview" else ByteTokenizer(320).encode(chat.encode(HELLO, **official)))
    assert len(all_) > len(dropped)


def test_each_of_several_prompts_is_a_request():
    model = Model("tiny", two().config, ByteTokenizer(320), Defaults(Sampling(), (1,), 8), 2048, slots=2)
    asked = {"n": 2, "max_tokens": 3}
    alone = [Completion(read_body({"prompt": one, "seed": 5} | asked), model, 0).requests[0] for one in ("a", "b")]
    together = Completion(read_body({"prompt": ["a", "b"], "seed": 5} | asked), model, 0)
    assert together.requests == alone and len(together.choices) == 4
    ids = read_body({"prompt": [[5, 6], [7]]})
    assert [list(one.prompt) for one in Completion(ids, model, 0).requests] == [[5, 6], [7]]
    free = Completion(read_body({"prompt": ["a", "a"]} | asked), model, 9).requests
    assert [one.sampling.seed for one in free] == [9, 11]  # sample number i takes the seed plus i
    update = together.push(Event(1, 1, 65, -0.5, "length"))
    assert update.number == 3 and Answer(together, "x").answer()["choices"][3]["text"] == ">"
    assert usage(together)["prompt_tokens"] == sum(len(one.prompt) for one in alone)


def test_an_echo_of_nothing_is_refused():
    model = Model("tiny", two().config, ByteTokenizer(320), Defaults(Sampling(), (1,), 8), 2048)
    with pytest.raises(BodyError, match="max_tokens is 0 and the prompt one token"):
        Completion(read_body({"prompt": [5], "echo": True, "max_tokens": 0}), model, 0)


def test_samples_are_counted_before_anything_is_made():
    model = Model("tiny", two().config, None, Defaults(Sampling(), (1,), 8), 2048, slots=2)  # no tokenizer is asked
    with pytest.raises(ValueError, match="n is 9, but there are 2 slots; expected at most so many samples"):
        Completion(read_body({"messages": HELLO, "n": 9}), model, 0)


def test_the_kind_may_be_given():
    with pytest.raises(BodyError, match="messages is missing"):
        read_body({"prompt": "x"}, chat=True)


@pytest.mark.parametrize("default", ["preview", "official"])
def test_the_profile_of_efforts_is_the_models_or_the_bodys(default):
    tokenizer, config = ByteTokenizer(320), two().config
    model = Model("tiny", config, tokenizer, Defaults(Sampling(), (1,), 8, "high", default), 2048)

    def prompt(**fields):
        return Completion(read_body({"messages": HELLO, **fields}), model, 0).requests[0].prompt

    def encoded(effort, profile):
        how = dict(thinking_mode="thinking", reasoning_effort=effort, effort_profile=profile)
        return tokenizer.encode(chat.encode(HELLO, **how))

    assert prompt() == encoded("high", default)
    assert prompt(thinking={"type": "enabled"}, reasoning_effort="max") == encoded("max", default)
    for profile in ("preview", "official"):
        assert prompt(effort_profile=profile) == encoded("high", profile)
    with pytest.raises(BodyError, match="effort_profile is 'new': input should be 'preview' or 'official'"):
        prompt(effort_profile="new")
    with pytest.raises(BodyError, match="reasoning_effort is 'some': input should be 'none', 'minimal', 'low'"):
        prompt(reasoning_effort="some")


def test_parts_of_characters_have_their_bytes_and_alternatives_stay_apart():
    tokenizer = ByteTokenizer(320)
    model = Model("tiny", two().config, tokenizer, Defaults(Sampling(), (1,), 8), 2048)
    first, second = tokenizer.encode("é")
    [letter], unused = tokenizer.encode("A"), 319
    others = tuple((id, -float(place)) for place, id in enumerate((first, second, unused, letter)))
    event = Event(0, 0, first, 0.0, "length", others)

    def logprobs(**body):
        completion = Completion(read_body(body), model, 0)
        completion.push(event)
        return Answer(completion, "x").answer()["choices"][0]["logprobs"]

    legacy = logprobs(prompt="x", logprobs=4)
    names = ["bytes:\\xc3", "bytes:\\xa9", "token_id:319", "A"]
    assert legacy["tokens"] == names[:1] and legacy["top_logprobs"] == [dict(zip(names, (0, -1, -2, -3), strict=True))]
    [entry] = logprobs(messages=HELLO, logprobs=True, top_logprobs=4)["content"]
    assert [other["token"] for other in entry["top_logprobs"]] == names
    assert [other["bytes"] for other in entry["top_logprobs"]] == [[0xC3], [0xA9], None, [65]]
