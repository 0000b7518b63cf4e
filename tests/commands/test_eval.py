"""`v4-jax eval`: sets in, scores out."""

import json
import re
import sys
from importlib import resources

import pytest

PNG = b"\x89PNG\r\n\x1a\n"

QUESTIONS = [
    {"context": "The door is red.", "question": "What colour has the door?", "answer": "red"},
    {"documents": ["One fox.", "Two owls."], "question": "How many owls?", "answers": ["2", "two"], "id": "owls"},
    {"context": "Long. " * 100, "question": "How long?", "answer": "very"},
    {"context": "None.", "question": "How many?", "answer": "0", "length": 512},
]

# Everything is as small as it can be, and all runs share their programs.
SMALL = ("--policy", "float32", "--prefill-chunk", "64")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    return path


def test_a_set_from_a_file(run, model, questions, tmp_path):
    arguments = ("eval", model, "--task", "questions", "--data", questions, "--context", "256", "--max-tokens", "5")
    result = run(*arguments, *SMALL, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert re.search(r"(?m)^asked 3 questions: \d+ tokens read and \d+ generated in [\d.]+ s", result.err)
    assert "; 1 of the questions skipped, longer than 256 tokens" in result.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "results.png"]
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(PNG)

    found = json.loads((tmp_path / "out" / "results.json").read_text())
    settings = found["settings"]
    assert (settings["task"], settings["mode"], settings["max_tokens"]) == ("questions", "non-think", 5)
    assert settings["data"] == str(questions) and settings["sampling"]["temperature"] == 0
    assert [one["id"] for one in found["skipped"]] == [3] and found["skipped"][0]["tokens"] > 600
    records = found["questions"]
    assert [(one["id"], one["length"]) for one in records] == [(1, 128), ("owls", 128), (4, 512)]
    for one, line in zip(records, (QUESTIONS[0], QUESTIONS[1], QUESTIONS[3]), strict=True):
        assert one["expected"] == line.get("answers", [line.get("answer")])
        assert (
            1 <= one["reply_tokens"] <= 5
            and one["finish"] in ("stop", "length")
            and set(one["scores"])
            == {
                "exact match",
                "contained",
                "F1",
            }
        )
    cells = {(cell["metric"], cell["length"]): cell for cell in found["table"]}
    assert cells["F1", 128]["questions"] == 2 and cells["F1", None]["questions"] == 3
    mean = sum(one["scores"]["F1"] for one in records) / 3
    assert cells["F1", None]["mean"] == pytest.approx(mean)
    assert re.search(r"questions +│ +2 │ +1 │ +3 ", result.out) and "exact match" in result.out

    # One at a time, the answers are the same.
    assert run(*arguments, *SMALL, "--slots", "1", "--output", tmp_path / "alone").code == 0
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert alone["questions"] == records and alone["table"] == found["table"]


def test_a_set_that_was_made_up_can_be_kept(run, model, tmp_path):
    """And asked again, with the same answers; to look at it, no model is loaded."""
    kept, made = tmp_path / "set.jsonl", ("--lengths", "2K,3K", "--needles", "2", "--samples", "1", "--seed", "4")
    result = run("eval", model, "--task", "mrcr", *made, "--generate", kept)
    assert (result.code, result.out, result.err) == (0, "", f"wrote 2 questions to {kept}\n")
    printed = run("eval", model, "--task", "mrcr", *made, "--generate", "-")
    assert (printed.code, printed.out) == (0, kept.read_text())
    asked = ("eval", model, "--task", "mrcr", "--max-tokens", "8", "--policy", "float32", "--output")
    for name, arguments in (("made", made), ("kept", ("--data", kept))):
        result = run(*asked, tmp_path / name, *arguments)
        assert result.code == 0, result.err
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("made", "kept"))
    assert [(record["needles"], record["length"]) for record in one["questions"]] == [(2, 2048), (2, 4096)]
    assert one["settings"]["lengths"] == [2048, 3072] and one["settings"]["seed"] == 4
    for record, line in zip(one["questions"], kept.read_text().splitlines(), strict=True):
        assert record["expected"] == [json.loads(line)["answer"]]
    assert one["questions"] == other["questions"] and one["table"] == other["table"]


def test_the_embedded_model_finds_needles(run, tmp_path):
    """Far outside of its window of 32 tokens, where guesses are right once in a hundred times."""
    with resources.as_file(resources.files("v4_jax") / "data" / "demo") as path:
        arguments = ("--lengths", "512", "--depths", "0,0.5", "--samples", "4", "--policy", "float32")
        result = run("eval", path, "--raw", "--no-bos", *arguments, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    all_ = found["table"][-1]
    assert (all_["questions"], all_["length"], all_["series"]) == (8, None, None)
    assert all_["low"] > 0.5
    assert {one["prompt_tokens"] for one in found["questions"]} == {510}  # which leaves two for the digits
    assert [one["depth"] for one in found["questions"]] == [0] * 4 + [0.5] * 4
    assert "needle: found, %" in result.out and "100.0" in result.out


def refusal(run, model, *arguments):
    result = run("eval", model, *arguments)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    return result.err.removeprefix("v4-jax: ")


def test_bad_sets(run, model, tmp_path, questions):
    assert "nowhere.jsonl cannot be read: No such file" in refusal(run, model, "--data", tmp_path / "nowhere.jsonl")
    expected = f'{questions}: line 1 is no question: it has no "depth"; expected either "text" or "prompt"'
    assert refusal(run, model, "--data", questions).startswith(expected)
    questions.write_text(json.dumps(QUESTIONS[0]) + "\n" + json.dumps(QUESTIONS[0] | {"answer": 3}) + "\n")
    message = refusal(run, model, "--task", "questions", "--data", questions)
    assert message.startswith(f'{questions}: line 2 is no question: "answer" is 3; expected either "context"')
    questions.write_text('{"text": "AB12 fox AB", "answer": "12", "depth": 0}')
    assert "texts to continue; expected --raw" in refusal(run, model, "--data", questions)


def test_bad_lengths(run, model, questions):
    assert "--lengths: 2M is more than the 1M tokens of" in refusal(run, model, "--lengths", "4K,2M")
    assert "--lengths: 4K is more than the 2K tokens of" in refusal(run, model, "--lengths", "4K", "--context", "2K")
    assert "--context 2M is more than the model's 1M tokens" in refusal(run, model, "--context", "2M")
    message = refusal(run, model, "--lengths", "64", "--raw")
    assert message == "--lengths: 64 tokens have no room for 24 records; expected a greater length\n"
    message = refusal(run, model, "--task", "questions", "--data", questions, "--context", "32")
    assert re.search(r"questions.jsonl: none of 4 questions fits in 32 tokens; the shortest takes \d+\n$", message)


def test_bad_options(run, model, questions):
    message = refusal(run, model, "--data", questions, "--lengths", "4K")
    assert message.startswith(f"--lengths is for a set that is made up, but --data {questions} gives one")
    message = refusal(run, model, "--task", "mrcr", "--depths", "0.5")
    assert message == "--depths is not for --task mrcr; expected some of --lengths, --needles, --samples\n"
    assert refusal(run, model, "--no-bos") == "--no-bos is for --raw; a chat always begins with that token\n"
    for option, value, expected in (
        ("--depths", "0,2", "expected 0 to 1"),
        ("--lengths", "4K,x", "'x' is not understood"),
        ("--needles", "0", "expected at least 1"),
        ("--temperature", "-1", "temperature is -1.0, expected a finite number from 0 up"),
    ):
        assert expected in refusal(run, model, option, value)


def test_bad_places(run, model, questions, tmp_path):
    given = ("--task", "questions", "--data", questions)
    assert "is a file; expected a directory" in refusal(run, model, *given, "--output", questions)
    assert "there is no directory" in refusal(run, model, *given, "--output", tmp_path / "nowhere" / "out")
    assert "there is no directory" in refusal(run, model, "--generate", tmp_path / "nowhere" / "set.jsonl")
    assert "is a directory; expected the name of a file" in refusal(run, model, "--generate", tmp_path)


def test_without_matplotlib(run, model, questions, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = refusal(run, model, "--task", "questions", "--data", questions, "--output", tmp_path / "out")
    assert "not installed; it comes with pip install 'v4-jax[eval]'" in message


def test_interrupted(run, model, questions, tmp_path, monkeypatch):
    """Nothing is left behind, whether it comes while the model works or while results are written."""
    given = ("eval", model, "--task", "questions", "--data", questions, "--context", "256", "--max-tokens", "5", *SMALL)
    (tmp_path / "out").mkdir()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for place in ("v4_jax.infer.engine.scheduler.Engine._collect", "v4_jax.files.os.fsync"):
        with monkeypatch.context() as context:
            context.setattr(place, interrupt)
            assert run(*given, "--output", tmp_path / "out").code == 130
        assert not list((tmp_path / "out").iterdir())


def test_chats_as_training_has_them(run, model, tmp_path):
    """The assistant's last turn is left out, and right, unless the line says what is."""
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    lines = [{"messages": turns}, {"messages": turns[:1], "answers": ["two", "2"]}, {"messages": turns, "answer": "3"}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("eval", model, "--task", "chats", "--context", "256", "--max-tokens", "5", *SMALL)
    result = run(*arguments, "--data", path, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out" / "results.json").read_text())["questions"]
    assert [one["expected"] for one in found] == [["2"], ["two", "2"], ["3"]]
    assert len({one["prompt_tokens"] for one in found}) == 1
    assert "no set is made up for --task chats; expected --data FILE" in run(*arguments).err
    path.write_text(json.dumps({"messages": turns[1:]}) + "\n")
    assert (
        'line 1 is no question: it has neither "answer" nor "answers"; expected "messages"'
        in run(*arguments, "--data", path).err
    )
