"""`v4-jax batch` from the outside: answers, errors as records, and going on after kill -9."""

import json
import os
import resource
import shutil
import signal
import time

import pytest

from tests.processes import free_address, one_of_two
from v4_jax.infer.openai.journal import Journal

OPTIONS = ("--policy", "float32", "--max-tokens", "6", "--prefill-chunk", "16", "--context", "256")


def write(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def comparable(records):
    """Without the time and the count of drafts, and with log-probabilities as far as programs of other sizes agree."""
    for one in records:
        if one["response"]:
            del one["response"]["body"]["created"]
            one["response"]["body"]["usage"].pop("completion_tokens_details", None)
            for choice in one["response"]["body"]["choices"]:
                for entry in (choice["logprobs"] or {}).get("content", ()):
                    entry["logprob"] = pytest.approx(entry["logprob"], abs=1e-4)
    return records


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Twelve lines, three of which cannot be served."""
    chat = {"messages": [{"role": "user", "content": "Hi"}], "n": 2, "logprobs": True, "stop": "\n"}
    lines = [{"custom_id": "first", "method": "POST", "url": "/v1/chat/completions", "body": chat}]
    lines += ["How are you?", {"prompt": "x" * 300}, {"prompt": [0, 17, 42], "id": 3, "seed": 5}, {"prompt": ""}]
    lines += [{"prompt": f"Number {number}", "id": number} for number in range(6)] + [7]
    return write(tmp_path_factory.mktemp("batch") / "in.jsonl", lines)


@pytest.fixture(scope="module")
def answers():
    """The whole output, once a test has made it."""
    return {}


def test_every_line_gets_a_record(run, model, questions, tmp_path, answers):
    output = tmp_path / "out.jsonl"
    result = run("batch", model, questions, output, *OPTIONS, "--slots", 3)
    assert (result.code, result.out) == (0, "")
    assert "cache: 3 slots of up to 256 tokens, 6 pages of 128 tokens" in result.err
    assert "answered 12 requests, 3 of them with an error" in result.err
    records = read(output)
    assert [one["line"] for one in records] == list(range(1, 13)) and os.listdir(tmp_path) == ["out.jsonl"]
    errors = {one["line"]: one["error"]["message"] for one in records if one["error"]}
    assert list(errors) == [3, 5, 12]
    assert "301 tokens and a continuation of 1 exceed the 256 tokens" in errors[3]
    assert errors[5] == "prompt is empty; expected some text" and errors[12].startswith("the line is a int")
    first, fourth = records[0], records[3]
    assert first["custom_id"] == "first" and fourth["custom_id"] == 3 and first["response"]["status_code"] == 200
    body = first["response"]["body"]
    assert body["object"] == "chat.completion" and [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice in body["choices"]:
        assert "\n" not in choice["message"]["content"] and choice["finish_reason"] in ("stop", "length")
        assert all(entry["logprob"] <= 0 for entry in choice["logprobs"]["content"])
    made = sum(len(choice["logprobs"]["content"]) for choice in body["choices"])
    usage = body["usage"]
    assert usage["completion_tokens"] == made and usage["total_tokens"] == usage["prompt_tokens"] + made
    assert fourth["response"]["body"]["usage"]["prompt_tokens"] == 3
    answers["whole"] = comparable(read(output))

    again = run("batch", model, questions, output, *OPTIONS)
    assert again.code == 2 and "is there already; expected the name of a file to make, or --overwrite" in again.err


def test_the_number_of_slots_changes_no_answer(run, model, questions, tmp_path, answers):
    output = tmp_path / "out.jsonl"
    assert run("batch", model, questions, output, *OPTIONS, "--slots", 5, "--as-finished").code == 0
    records = comparable(read(output))
    assert [one["line"] for one in records] != list(range(1, 13))
    assert sorted(records, key=lambda one: one["line"]) == answers["whole"]


def test_drafts_change_no_answer(run, model, questions, tmp_path, answers):
    output = tmp_path / "out.jsonl"
    result = run("batch", model, questions, output, *OPTIONS, "--slots", 3, "--draft", "mtp:2")
    assert result.code == 0 and "drafts accepted by depth: " in result.err
    records = read(output)
    counts = [one["response"]["body"]["usage"]["completion_tokens_details"] for one in records if one["response"]]
    for one in counts:
        first, second = one["drafts_by_position"]
        assert first["offered"] == second["offered"] and first["accepted"] >= second["accepted"]
        assert one["accepted_prediction_tokens"] == first["accepted"] + second["accepted"]
        assert one["rejected_prediction_tokens"] == 2 * first["offered"] - one["accepted_prediction_tokens"]
    assert sum(one["rejected_prediction_tokens"] for one in counts) > 0
    assert comparable(records) == answers["whole"]


def test_parts_make_one_output(run, model, questions, tmp_path, answers):
    output = tmp_path / "out.jsonl"
    first = run("batch", model, questions, output, *OPTIONS, "--slots", 3, "--part", "1/2")
    assert first.code == 0 and "part 1 of 2 is done; " in first.err and not output.exists()
    assert run("batch", model, questions, output, *OPTIONS, "--slots", 3, "--part", "2/2").code == 0
    assert comparable(read(output)) == answers["whole"] and os.listdir(tmp_path) == ["out.jsonl"]


def test_kill_loses_nothing_and_does_nothing_twice(run, start, model, questions, tmp_path, answers):
    """Killed whenever a further record was kept, three times; then to the end."""
    output = tmp_path / "out.jsonl"
    journal = tmp_path / ".out.jsonl.journal"
    kept = b""
    for _ in range(3):
        process = start("batch", model, questions, output, *OPTIONS, "--slots", 2)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > kept.count(b"\n") + 1:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if output.exists():
            break
        content = journal.read_bytes()
        assert content.startswith(kept[: kept.rfind(b"\n") + 1])
        kept = content
    assert output.exists() or kept.count(b"\n") > 3
    if not output.exists():
        result = run("batch", model, questions, output, *OPTIONS, "--slots", 2)
        assert result.code == 0 and "requests are answered already" in result.err
    records = comparable(read(output))
    assert [one["line"] for one in records] == list(range(1, 13))
    assert records == answers["whole"]
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_two_processes_serve_one_model(start, model, questions, tmp_path, answers):
    """With weights in 4 bits, of which each holds a part; the first one writes."""
    output, address = tmp_path / "out.jsonl", free_address()
    processes = [
        start(
            *("batch", model, questions, output, *OPTIONS, "--slots", 4, "--mesh", "expert=2", "--distributed"),
            **one_of_two(number, address),
            XLA_FLAGS="--xla_force_host_platform_device_count=1",
        )
        for number in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert comparable(read(output)) == answers["whole"] and os.listdir(tmp_path) == ["out.jsonl"]


def test_another_job_does_not_go_on_from_a_journal(run, model, questions, tmp_path):
    (tmp_path / ".out.jsonl.journal").write_text(json.dumps({"input": "other"}) + "\n")
    result = run("batch", model, questions, tmp_path / "out.jsonl", *OPTIONS)
    assert result.code == 2 and "holds answers of another job: " in result.err and not (tmp_path / "out.jsonl").exists()


def test_another_model_of_the_same_name_does_not_go_on(run, model, questions, tmp_path):
    """Nothing is loaded before it is refused, and the sentence names what differs."""
    output, other = tmp_path / "out.jsonl", tmp_path / model.name
    refused = run("batch", model, write(tmp_path / "in.jsonl", [7]), output, *OPTIONS, "--as-finished", "--part", "1/2")
    assert refused.code == 0  # the other part is missing, so its journal stays
    shutil.copytree(model, other)
    again = ("batch", other, tmp_path / "in.jsonl", output, *OPTIONS, "--as-finished", "--part", "1/2")
    assert run(*again).code == 0
    weights = sorted(other.glob("*.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    result = run(*again)
    assert result.code == 2 and "holds answers of another job: fingerprint was '" in result.err
    result = run(*again, "--policy", "bfloat16")
    assert "; options.policy was 'float32', is 'bfloat16'; expected the same model" in result.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--memory", "1K"), "a cache of 1,024 bytes per device has no room for 256 tokens"),
        (("--part", "3/2"), "part '3/2' is not understood"),
        (("--context", "2M"), "--context 2M is more than the model's"),
        (("--greedy", "--temperature", "1"), "--greedy means --temperature 0"),
        (("--mesh", "seq=64"), "--mesh seq=64: "),
        (("--draft", "mtp:5"), "draft is 'mtp:5', expected none, mtp:1 to mtp:4, dspark or auto"),
    ],
)
def test_options_that_do_not_fit(run, model, questions, tmp_path, options, sentence):
    result = run("batch", model, questions, tmp_path / "out.jsonl", *OPTIONS, *options)
    assert result.code == 2 and sentence in result.err and result.err.count("\n") <= 2
    assert not (tmp_path / "out.jsonl").exists()


def test_files_that_do_not_fit(run, model, tmp_path):
    empty = write(tmp_path / "empty.jsonl", [])
    for input, output, sentence in (
        (tmp_path / "none.jsonl", tmp_path / "out.jsonl", "No such file"),
        (empty, tmp_path / "out.jsonl", "has no lines"),
        (empty, tmp_path / "none" / "out.jsonl", "there is no directory"),
        (empty, tmp_path, "is a directory"),
    ):
        result = run("batch", model, input, output)
        assert result.code == 2 and sentence in result.err, result
    assert os.listdir(tmp_path) == ["empty.jsonl"]


def test_nothing_is_loaded_where_no_line_can_be_served(run, model, tmp_path):
    input, output = write(tmp_path / "in.jsonl", [1, {"prompt": ""}]), tmp_path / "out.jsonl"
    result = run("batch", model, input, output)
    assert (
        result.code == 0 and "cache" not in result.err and [one["error"] is None for one in read(output)] == [False] * 2
    )


def test_a_full_disk_ends_in_a_sentence_and_loses_nothing(run, model, questions, tmp_path, monkeypatch, answers):
    """Files may not grow beyond a size that the journal reaches in the middle of a record."""
    output, limit = tmp_path / "out.jsonl", 1500
    add, (_, most) = Journal.add, resource.getrlimit(resource.RLIMIT_FSIZE)

    def add_on_a_full_disk(journal, record):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            add(journal, record)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    with monkeypatch.context() as context:
        context.setattr(Journal, "add", add_on_a_full_disk)
        result = run("batch", model, questions, output, *OPTIONS, "--slots", 3)
    assert result.code == 2 and "answers are kept, to go on from: File too large" in result.err
    assert (tmp_path / ".out.jsonl.journal").stat().st_size == limit and not output.exists()
    assert run("batch", model, questions, output, *OPTIONS, "--slots", 3).code == 0
    assert comparable(read(output)) == answers["whole"]
