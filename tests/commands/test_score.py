"""`v4-jax score`: lines in, lines out."""

import json

import jax
import numpy as np
import pytest

from v4_jax.tokenizer import load_tokenizer

LINES = ['{"text": "Hello\\u2028 there", "id": "a"}', '{"tokens": [5, 6, 7]}', '{"tokens": [9]}']


def test_scores(run, model, logprobs_of, tmp_path):
    source, target = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    source.write_text("\n".join(LINES) + "\n")
    result = run("score", model, "--input", source, "--output", target, "--policy", "float32")
    assert (result.code, result.out) == (0, "") and result.err.startswith("scored 3 texts, ")
    scores = [json.loads(line) for line in target.read_text().splitlines()]
    hello = [0, *load_tokenizer(model, 320).encode("Hello\u2028 there")]
    assert [score["tokens"] for score in scores] == [hello, [5, 6, 7], [9]]
    assert scores[0]["id"] == "a" and "id" not in scores[1]
    for score, logprobs in zip(scores, logprobs_of([score["tokens"] for score in scores]), strict=True):
        expected = [logprobs[i, token] for i, token in enumerate(score["tokens"][1:])]
        assert score["logprobs"][0] is None and score["count"] == len(expected)
        np.testing.assert_allclose(score["logprobs"][1:], expected, atol=1e-4)
        assert score["total"] == pytest.approx(sum(map(float, expected)), abs=1e-3)


def test_stdin_to_stdout(run, model):
    result = run("score", model, "--no-bos", stdin=LINES[0] + "\n")
    assert result.code == 0
    assert json.loads(result.out)["tokens"] == load_tokenizer(model, 320).encode("Hello\u2028 there")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"tokens": [1]}\n{"text"', "stdin: line 2 is not JSON"),
        ('{"tokens": [1]}\n\n{"tokens": [320]}', "stdin: line 3 cannot be scored: token id 320 is outside"),
        ("", "stdin: there are no lines to score"),
    ],
)
def test_bad_lines(run, model, lines, message):
    result = run("score", model, stdin=lines)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith(f"v4-jax: {message}")


def test_one_process_writes(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert run("score", model, "--output", tmp_path / "scores.jsonl", stdin=LINES[1]).code == 0
    assert not list(tmp_path.iterdir())


def test_bad_places(run, model, tmp_path):
    result = run("score", model, "--input", tmp_path / "nowhere")
    assert (result.code, result.out) == (2, "") and "nowhere cannot be read: No such file" in result.err
    result = run("score", model, "--output", tmp_path / "nowhere" / "x", stdin=LINES[1])
    assert (result.code, result.out) == (2, "") and "there is no directory" in result.err
    result = run("score", model, "--output", tmp_path, stdin=LINES[1])
    assert (result.code, result.out) == (2, "") and "is a directory; expected the name of a file" in result.err
    assert not list(tmp_path.iterdir())


def test_options_out_of_range(run, model):
    for option in ("--batch", "--chunk"):
        result = run("score", model, option, "0", stdin=LINES[1])
        assert result.code == 2 and "expected at least 1" in result.err
