"""`v4-jax serve` from the outside: it says where it listens, answers, and ends when its requests are answered."""

import contextlib
import json
import re
import signal
import socket

import httpx
import openai
import pytest

from tests.processes import free_address, one_of_two

OPTIONS = ("--policy", "float32", "--context", "1K", "--slots", "2")


def test_serves_and_drains(start, model, tmp_path):
    """Told to end in the middle of a stream, it ends after the stream; what it has read is kept on disk."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    kept = ("--prefix-directory", tmp_path / "pages", "--prefix-windows", "256")
    process = start("serve", model, *OPTIONS, *kept, "--port", port, "--name", "small", V4_JAX_API_KEY="secret\n")
    try:
        said = ""
        while "serving" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        address = re.search(r"serving small at (http://127.0.0.1:\d+/v1)$", said, flags=re.MULTILINE)[1]
        assert "cache: 2 slots of up to 1K tokens, 16 pages of 128 tokens" in said
        assert httpx.get(address + "/models").status_code == 401
        client = openai.OpenAI(base_url=address, api_key="secret", max_retries=0)
        for found in (0, 256):
            usage = client.completions.create(model="small", prompt=[5] * 300 + [6], max_tokens=1).usage
            assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (301, found)
            assert (usage.prompt_cache_hit_tokens, usage.prompt_cache_miss_tokens) == (found, 301 - found)
        metrics = httpx.get(address.replace("/v1", "/metrics")).text
        assert "v4_jax_cached_tokens_total 256.0" in metrics and "v4_jax_prompt_tokens_total 602.0" in metrics
        asked = dict(model="small", prompt="Hello", max_tokens=900, temperature=1.5, seed=2)
        stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        next(stream)
        process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.usage.completion_tokens > 1
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
        said = process.stderr.read()
        assert "Traceback" not in said and "SIGTERM: no more requests are taken, 1 are answered yet" in said
        assert re.search(
            r"POST /v1/completions 200, 301 prompt tokens \(256 cached\), 1 new, .*: (length|stop)$", said, re.M
        )
        assert "GET /v1/models 401" in said and "/metrics" not in said and "Hello" not in said and "secret" not in said
        kept = {file.name.partition(".")[2] for file in (tmp_path / "pages").iterdir()}
        assert kept == {"page.pages", "tail.pages"}
    finally:
        process.kill()
        process.communicate()


def test_what_cannot_be_served(run, model, tmp_path, monkeypatch):
    empty = tmp_path / "keys"
    empty.write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for options, sentence in (
            (("--port", taken.getsockname()[1]), "cannot listen at 127.0.0.1 port "),
            (("--port", 70000), "cannot listen at 127.0.0.1 port 70000: "),
            (("--host", "nowhere.invalid"), "cannot listen at nowhere.invalid"),
            (("--context", "2M"), "--context 2M is more than the model's"),
            (
                ("--prefix-windows", 100),
                "--prefix-windows: windows is 100, expected 'full', 'none', or tokens, a multip",
            ),
            (("--prefix-directory", empty), "keys is a file; expected a directory, or none yet"),
            (("--keys", empty), "holds no keys; expected one a line"),
            (
                ("--memory", "1K", "--slots", 2),
                "1,024 bytes per device has no room for 32,768 tokens: 2 slots with pages",
            ),
        ):
            result = run("serve", model, *options)
            assert result.code == 2 and sentence in result.err, result
    monkeypatch.setenv("V4_JAX_API_KEY", " \n")
    assert "V4_JAX_API_KEY holds no keys; expected one a line" in run("serve", model).err


@contextlib.contextmanager
def two_processes(start, model):
    """Two processes that serve one model: the first one, the other, and where the first one listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    coordinator = free_address()
    processes = [
        start(
            *("serve", model, *OPTIONS, "--mesh", "expert=2", "--distributed", "--port", port),
            **one_of_two(number, coordinator),
            XLA_FLAGS="--xla_force_host_platform_device_count=1",
        )
        for number in range(2)
    ]
    try:
        said = ""
        while "serving" not in said:
            line = processes[0].stderr.readline()
            assert line, said
            said += line
        yield *processes, f"http://127.0.0.1:{port}"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


ASKED = dict(prompt=[*range(5, 155), *range(5, 155), 6], max_tokens=12, temperature=0.9, seed=3, logprobs=2, n=2)


def test_two_processes_serve_one_model(start, run, model, tmp_path):
    """They answer as one does: in company, with constraints, when clients leave; and end together."""
    (tmp_path / "in.jsonl").write_text(json.dumps(ASKED) + "\n")
    alone = run("batch", model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", *OPTIONS[:2], "--slots", 2)
    assert alone.code == 0
    expected = json.loads((tmp_path / "out.jsonl").read_text())["response"]["body"]["choices"]
    with two_processes(start, model) as (first, second, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        left = client.completions.create(model=model.name, prompt="x", max_tokens=900, stream=True)
        next(left)
        left.close()  # its slot becomes free in both
        for cached in (0, 256):
            answer = client.completions.create(model=model.name, **ASKED)
            found = answer.choices
            assert answer.usage.prompt_tokens_details.cached_tokens == cached
            assert [one.text for one in found] == [one["text"] for one in expected]
            for one, other in zip(found, expected, strict=True):
                assert one.logprobs.token_logprobs == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-4)
        schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [17, "no"]}}}
        said = client.chat.completions.create(
            model=model.name, messages=[{"role": "user", "content": "?"}], response_format=schema
        )
        assert json.loads(said.choices[0].message.content) in (17, "no")
        for process in (second, first):  # as a pod's hosts are told
            process.send_signal(signal.SIGTERM)
        assert (first.wait(60), second.wait(60)) == (0, 0)
        assert "Traceback" not in first.stderr.read() + second.stderr.read()


def test_a_lost_process_is_noticed(start, model):
    with two_processes(start, model) as (first, second, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model=model.name, prompt="x", max_tokens=900, stream=True)
        next(stream)
        second.kill()
        with pytest.raises(openai.APIError, match="the engine does not run"):
            list(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=model.name, prompt="x")
        assert caught.value.status_code == 503 and caught.value.response.headers["Retry-After"] == "30"
        assert httpx.get(f"{address}/health").status_code == 503
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 1
