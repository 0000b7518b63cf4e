"""`v4-jax generate`: the prompt, the tokens and the text are the right ones, and what is wrong is said."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from tests.conftest import DATA
from v4_jax import chat
from v4_jax.commands.shared.models import ModelDirectory
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.tokenizer import load_tokenizer

FAST = ("--policy", "float32", "--max-tokens", "12", "--prefill-chunk", "16")


@pytest.fixture
def reply(run, model):
    """The JSON object of a command that goes well."""

    def call(*arguments, stdin=""):
        result = run("generate", model, "--json", *FAST, *arguments, stdin=stdin)
        assert result.code == 0, result.err
        return json.loads(result.out)

    return call


@pytest.fixture
def tokenizer(model):
    return load_tokenizer(model, 320)


def test_greedy_tokens_are_the_models_best(logprobs_of, reply):
    made = reply("--tokens", "5, 6 7,8", "--greedy")
    assert made["prompt"] == [5, 6, 7, 8] and len(made["tokens"]) == 12
    logprobs = logprobs_of([made["prompt"] + made["tokens"]])[0][3:-1]
    assert logprobs.argmax(-1).tolist() == made["tokens"]
    np.testing.assert_allclose(made["logprobs"], logprobs.max(-1), atol=1e-4)
    assert made["sampling"]["temperature"] == 0 and made["finish_reason"] == "length"
    assert made["speed"]["prompt_tokens"] == 4 and made["speed"]["new_tokens"] == 12


def test_seeds(reply):
    texts = [reply("--tokens", "5", "--seed", seed)["tokens"] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_drafts(run, model, reply):
    """The same tokens, in fewer steps; both outputs say how many guesses were right."""
    plain, drafted = reply("--tokens", "5", "--greedy"), reply("--tokens", "5", "--greedy", "--draft", "mtp:2")
    assert drafted["tokens"] == plain["tokens"] and plain["speed"]["drafts"] == []
    first, second = drafted["speed"]["drafts"]
    assert first["offered"] == second["offered"] > 0 and first["offered"] >= first["accepted"] >= second["accepted"]
    said = run("generate", model, "--tokens", "5", "--draft", "mtp:1", *FAST).err
    assert "ended by token limit, drafts accepted by depth: " in said
    assert (
        "draft is 'mtp:5', expected none, mtp:1 to mtp:4, "
        in run("generate", model, "--tokens", "5", "--draft", "mtp:5").err
    )


class Prompted(Exception):
    pass


def test_prompts(run, model, monkeypatch, tokenizer, tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(messages))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    (tmp_path / "tools.json").write_text(json.dumps({"messages": messages, "tools": tools}))
    single = [{"role": "user", "content": "Hi"}]

    def prompt(messages, **options):
        return tokenizer.encode(chat.encode(messages, **options))

    def stop_there(engine, request, *_):
        raise Prompted(request.prompt)

    def given(*arguments, stdin=""):
        with pytest.raises(Prompted) as stopped:
            run("generate", model, *arguments, stdin=stdin)
        return stopped.value.args[0]

    monkeypatch.setattr("v4_jax.commands.generate.stream", stop_there)
    assert given("--prompt", "Hi") == prompt(single)
    assert given("--prompt", "Hi", "--mode", "high") == prompt(single, thinking_mode="thinking")
    longest = prompt(single, thinking_mode="thinking", reasoning_effort="max")
    assert given("--prompt", "Hi", "--mode", "max") == longest != prompt(single, thinking_mode="thinking")
    official = given("--prompt", "Hi", "--mode", "high", "--effort-profile", "official")
    assert official == longest and given("--prompt", "Hi", "--mode", "low") == prompt(single, thinking_mode="thinking")
    assert given(stdin="Hi\n") == prompt(single)
    assert given("--chat", file) == prompt(messages)
    assert given("--chat", "-", stdin=file.read_text()) == prompt(messages)
    assert given("--chat", tmp_path / "tools.json") == prompt(messages, tools=tools)
    text = tmp_path / "prompt.txt"
    text.write_text("Hi\n")
    told = [{"role": "system", "content": "Be."}]
    assert given("--prompt-file", text) == prompt(single) and given("--raw", "--prompt-file", text)[0] == 0
    assert given("--prompt", "Hi", "--system", "Be.") == prompt(told + single)
    file.write_text(json.dumps(single))
    assert given("--chat", file, "--system", "Be.") == prompt(told + single)
    assert given("--raw", "--prompt", "Hi") == [0, *tokenizer.encode("Hi")]
    assert given("--raw", "--prompt", chat.BOS + "Hi") == [0, *tokenizer.encode("Hi")]
    assert given("--raw", stdin="Hi\n\n") == [0, *tokenizer.encode("Hi\n")]


def test_the_directory_says_what_efforts_mean(run, model, monkeypatch, tokenizer, tmp_path):
    """By its own encoding, unless an option says otherwise."""
    copy = shutil.copytree(model, tmp_path / "official")
    (copy / "encoding").mkdir()
    (copy / "encoding" / "encoding_dsv4.py").write_text("REASONING_EFFORT_PROMPTS = {}\n")

    def stop_there(engine, request, *_):
        raise Prompted(request.prompt)

    monkeypatch.setattr("v4_jax.commands.generate.stream", stop_there)
    for options, profile in (((), "official"), (("--effort-profile", "preview"), "preview")):
        with pytest.raises(Prompted) as stopped:
            run("generate", copy, "--prompt", "Hi", "--mode", "max", *options)
        how = dict(thinking_mode="thinking", reasoning_effort="max", effort_profile=profile)
        assert stopped.value.args[0] == tokenizer.encode(chat.encode([{"role": "user", "content": "Hi"}], **how))
    card = json.loads(run("info", copy, "--json").out)["efforts"]
    assert card["profile"] == "official" and json.loads(run("info", model, "--json").out)["efforts"]["profile"] is None
    assert card["instruction_bytes"] == {
        "preview": {"non-think": 0, "low": 0, "high": 0, "max": 476},
        "official": {"non-think": 0, "low": 0, "high": 476, "max": 528},
    }
    assert "this model is of official" in run("info", copy).out
    assert "'hihg'" in run("generate", copy, "--prompt", "Hi", "--mode", "hihg").err


def test_text_goes_to_stdout_and_speed_to_stderr(run, model, reply, tokenizer):
    made = reply("--raw", "--prompt", "Hi")
    result = run("generate", model, *FAST, "--raw", "--prompt", "Hi")
    text = tokenizer.decode(made["tokens"])
    assert made["content"] == text and made["reasoning_content"] == "" and made["tool_calls"] == []
    assert result.out == text.removesuffix("\n") + "\n"
    assert result.err.count("\n") == 1
    assert "first token after" in result.err and "memory at most" in result.err
    assert "prefill 3 tokens in" in result.err and "decode 11 tokens in" in result.err and "token limit" in result.err


def test_output_and_verbose(run, model, reply, tmp_path):
    """A file in place of stdout, and what was loaded, read and computed with on stderr."""
    made = reply("--raw", "--prompt", "Hi")
    arguments = ("generate", model, *FAST, "--raw", "--prompt", "Hi", "--output", tmp_path / "reply", "--verbose")
    result = run(*arguments)
    assert result.code == 0 and result.out == "" and list(tmp_path.iterdir()) == [tmp_path / "reply"]
    assert (tmp_path / "reply").read_text() == made["content"].removesuffix("\n") + "\n"
    for part in ("model: ", "2 layers", "computation: float32, cache float32 of ", "on 1 cpu device", "'<｜begin"):
        assert part in result.err, part
    assert run(*arguments, "--json").out == ""
    found = json.loads((tmp_path / "reply").read_text())
    assert found["content"] == made["content"] and found["speed"]["peak_bytes"] > 10**7
    assert found["speed"]["first_token_seconds"] == found["speed"]["prefill_seconds"]


def test_profile(run, model, tmp_path):
    result = run("generate", model, *FAST, "--tokens", "5", "--profile", tmp_path / "trace")
    assert result.code == 0 and re.search(rf"profile: \d+ rounds in {tmp_path}/trace", result.err), result.err
    (trace,) = (tmp_path / "trace").rglob("*.xplane.pb")
    assert len(trace.read_bytes()) > 1000 and "first token after" in result.err
    assert "--profile " in run("generate", model, "--tokens", "5", "--profile", trace).err


def test_reasoning_is_told_apart(run, model, reply, tokenizer):
    arguments = (*FAST, "--prompt", "Hi", "--mode", "high")
    made = reply("--prompt", "Hi", "--mode", "high")
    assert made["reasoning_content"] == tokenizer.decode(made["tokens"]) and made["content"] == ""
    assert run("generate", model, *arguments).out == ""
    shown = run("generate", model, *arguments, "--show-reasoning").out
    assert shown.rstrip("\n") == f"Reasoning:\n{made['reasoning_content']}".rstrip("\n")


def test_stop_strings(run, model, reply, tokenizer):
    free = reply("--raw", "--prompt", "Hi")
    text = free["content"]
    stop = text[5:7]
    cut = reply("--raw", "--prompt", "Hi", "--stop", "never said", "--stop", stop)
    assert cut["content"] == text[: text.index(stop)] and cut["finish_reason"] == "stop string"
    assert cut["tokens"] == free["tokens"][: len(cut["tokens"])] and len(cut["tokens"]) < 12
    assert "ended by stop string" in run("generate", model, *FAST, "--raw", "--prompt", "Hi", "--stop", stop).err


def test_the_directorys_generation_defaults(model, reply, tokenizer):
    path = model / "generation_config.json"
    before = path.read_text()
    greedy = reply("--tokens", "5", "--greedy")["tokens"]
    stop = greedy[3]
    try:
        path.write_text(json.dumps({"do_sample": False, "eos_token_id": [1, stop], "unrelated": {}}))
        made = reply("--tokens", "5")
        assert made["tokens"] == greedy[: greedy.index(stop) + 1] and made["finish_reason"] == "stop"
        assert made["content"] == tokenizer.decode(made["tokens"][:-1])  # the stop token's own text is not part of it
        path.write_text(json.dumps({"temperature": 0.5, "top_p": 0.25, "top_k": 7, "eos_token_id": 1}))
        made = reply("--tokens", "5", "--top-k", "9", "--seed", "4")
        assert made["sampling"] == dataclasses.asdict(Sampling(0.5, top_p=0.25, top_k=9, seed=4))
        assert reply("--tokens", "5", "--greedy")["sampling"]["temperature"] == 0
        path.unlink()
        assert reply("--tokens", "5")["sampling"]["temperature"] == 1
    finally:
        path.write_text(before)


def test_think_max_wants_room(run, model):
    result = run("generate", model, *FAST, "--prompt", "Hi", "--mode", "max")
    assert result.code == 0 and "warning: Think Max wants a context of at least 384K" in result.err
    result = run("generate", model, *FAST, "--prompt", "Hi", "--mode", "max", "--context", "384K")
    assert result.code == 0 and "warning" not in result.err
    assert "warning" not in run("generate", model, *FAST, "--prompt", "Hi", "--mode", "high").err


def test_context_bounds_the_reply(reply):
    assert len(reply("--tokens", "5 6 7", "--context", "10")["tokens"]) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", " \n"), "the prompt is empty"),
        ((), "the prompt is empty"),
        (("--tokens", ""), "the prompt is empty"),
        (("--tokens", "1, 320"), "token id 320 is outside of the vocabulary; legal ids are 0 to 319"),
        (("--tokens", "1, x"), "--tokens '1, x' is not understood"),
        (("--tokens", "1", "--prompt", "a"), "--prompt and --tokens both give a prompt"),
        (("--chat", "c.json", "--raw"), "expected one of them"),
        (("--prompt", "a", "--prompt-file", "b"), "--prompt and --prompt-file both give a prompt"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt cannot be read: No such file"),
        (("--prompt", "a", "--raw", "--system", "b"), "--system is for chats, and --raw is none"),
        (("--prompt", "a", "--output", "no/where"), "there is no directory"),
        (("--promt", "a"), "; perhaps --prompt is meant (see"),
        (("--max-new-tokens", "9", "-p", "a"), "; --max-new-tokens is --max-tokens here; -p is --prompt here"),
        (
            ("--temp=1", "--model", "x"),
            "--temp is --temperature here; the model is given without --model: v4-jax generate",
        ),
        (("--chat", "nowhere.json"), "nowhere.json cannot be read: No such file"),
        (("--prompt", "a", "--context", "2M"), "--context 2M is more than the model's 1M tokens"),
        (("--prompt", "a" * 50, "--context", "20"), "leaves no room in a context of 20"),
        (("--tokens", "1", "--context", "1"), "the prompt has 1 tokens, which leaves no room in a context of 1"),
        (("--prompt", "a", "--context", "1T"), "size '1T' is not understood"),
        (("--prompt", "a", "--max-tokens", "0"), "size '0' is not understood"),
        (("--prompt", "a", "--prefill-chunk", "0"), "expected at least 1"),
        (("--prompt", "a", "--top-p", "1.5"), "top_p is 1.5, expected a number from 0 to 1"),
        (("--prompt", "a", "--seed", "-1"), "seed is -1"),
        (("--prompt", "a", "--greedy", "--temperature", "1"), "--greedy means --temperature 0"),
        (("--prompt", "a", "--stop", ""), "a stop string is empty"),
        (("--prompt", "a", "--policy", "released"), "the policy 'released' rounds keys in blocks of 64"),
        (("--prompt", "a", "--cache-dtype", "released"), "needs the policy 'released'"),
        (("--prompt", "\ud800"), "surrogate"),
    ],
)
def test_bad_input(run, model, arguments, message):
    result = run("generate", model, *arguments)
    assert result.code == 2 and result.out == ""
    # complaints about the form of an argument are tyro's and come with its help; all others are one sentence
    assert message in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err and (result.err.count("\n") == 1 or "For full helptext" in result.err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"role": "user"', "is not JSON: Expecting ',' delimiter at line 1, column 17"),
        (b"\xff\xfe", "is not UTF-8 text (byte 0)"),
        (b'"hello"', "does not hold a list of messages"),
        (b'["hello"]', "does not hold a list of messages"),
        (b"[]", "no messages"),
        (b'[{"role": "wizard", "content": "x"}]', "message 0 has role 'wizard'; legal roles are"),
        (b'{"messages": [], "temperature": 1}', "has the keys ['temperature']"),
        (b"[" * 100000, "nested too deeply"),
    ],
)
def test_bad_chat_files(run, model, tmp_path, content, message):
    file = tmp_path / "chat.json"
    file.write_bytes(content)
    result = run("generate", model, "--chat", file)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert str(file) in result.err and message in result.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds a JSON list, expected an object"),
        ('{"temperature": "hot"}', "has temperature 'hot', expected a number"),
        ('{"eos_token_id": ["x"]}', "has eos_token_id ['x']"),
        ('{"top_p": 2}', "has top_p 2, expected a number from 0 to 1"),
        ("{", "is not valid JSON"),
    ],
)
def test_bad_generation_defaults(run, model, content, message):
    path = model / "generation_config.json"
    before = path.read_text()
    try:
        path.write_text(content)
        result = run("generate", model, "--prompt", "a")
    finally:
        path.write_text(before)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1) and message in result.err


def test_bad_directories(run, tmp_path):
    result = run("generate", tmp_path / "nowhere", "--prompt", "a")
    assert (result.code, result.out) == (2, "") and result.err.startswith("v4-jax: there is no directory")
    for name, url in (("org/name-1.2", "hf://org/name-1.2"), ("https://huggingface.co/org/name/tree", "hf://org/name")):
        for verb in ("generate", "info"):
            assert url in run(verb, name).err
    assert "hub" not in run("generate", "nowhere").err + run("generate", f"{tmp_path}/x").err
    result = run("generate", tmp_path, "--prompt", "a")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1) and "config.json" in result.err


@pytest.mark.parametrize(
    ("chosen", "mode", "said"),
    [("auto", "max", True), ("auto", None, True), ("auto", "low", False), ("official", "max", False)],
)
def test_a_directory_that_may_be_of_either_generation(capsys, chosen, mode, said):
    """DSpark stages alone do not tell, which is said where it matters."""
    profile = ModelDirectory.open(DATA / "dspark-tiny").effort_profile(chosen, mode)
    assert profile == ("official" if chosen == "official" else "preview")
    assert ("may be of either generation" in capsys.readouterr().err) == said
