"""Scores are the published logits' log-probabilities, whatever rows and chunks the texts went through."""

import json
import math

import jax
import numpy as np
import pytest

from tests.conftest import DATA
from tests.models import golden
from v4_jax import Config
from v4_jax.checkpoint import load
from v4_jax.infer.score import ScoreError, Scorer, TextToScore, read_texts, schedule, write_lines
from v4_jax.tokenizer import ByteTokenizer

TOLERANCE = 2e-4  # of the published logits

# (row of the published tokens, how many of them): more texts than batch rows, in no order of length
TEXTS = [(0, 520), (1, 5), (0, 1), (1, 300), (0, 2), (1, 131), (0, 38), (0, 39), (1, 66)]


@pytest.fixture(scope="module")
def published():
    path = DATA / "flash-tiny"
    expected = golden(path)
    return *load(path), expected["tokens"], np.asarray(jax.nn.log_softmax(expected["logits"]))


@pytest.fixture(scope="module")
def scorer(published):
    return Scorer(
        published[0],
        longest=520,
        policy="float32",
        cache_dtype="float32",
        batch=3,
        chunk=37,
    )


def test_published_logits(published, scorer):
    _, params, tokens, expected = published
    texts = [TextToScore(line, tokens[row, :length].tolist(), id=line * 10) for line, (row, length) in enumerate(TEXTS)]
    seen = []
    scores = list(scorer.score(params, texts, progress=lambda done, total: seen.append((done, total))))
    assert [score.text for score in scores] == texts
    for (row, length), score in zip(TEXTS, scores, strict=True):
        wanted = np.take_along_axis(expected[row, : length - 1], tokens[row, 1:length, None], axis=1)[:, 0]
        np.testing.assert_allclose(score.logprobs, wanted, atol=TOLERANCE, rtol=0)
        line = json.loads(json.dumps(score.as_json()))
        assert line["id"] == score.text.id and line["tokens"] == tokens[row, :length].tolist()
        assert line["logprobs"][0] is None and line["count"] == length - 1 == len(line["logprobs"]) - 1
        assert line["total"] == pytest.approx(float(wanted.sum()), abs=TOLERANCE * length)
    total = sum(length - 1 for _, length in TEXTS)
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_scores_come_before_everything_is_read(published, scorer):
    _, params, tokens, _ = published
    read = []
    texts = [TextToScore(1, tokens[0, :5].tolist()), *(TextToScore(2, tokens[0].tolist()) for _ in range(6))]
    assert len(next(scorer.score(params, texts, progress=lambda done, total: read.append(done))).logprobs) == 4
    assert read[-1] < 300


def test_damaged_weights(published, scorer):
    """A text that meets them has an error in place of its scores; the others have what they always have."""
    _, params, tokens, _ = published
    bad, good = tokens[0, :5].tolist(), [token for token in tokens[1].tolist() if token != tokens[0, 2]][:9]
    broken = params | {"embed": params["embed"].at[bad[2]].set(math.nan)}
    texts = [TextToScore(7, bad), TextToScore(8, good), TextToScore(9, good)]
    [first, *others], [_, *whole] = (list(scorer.score(weights, texts)) for weights in (broken, params))
    assert first.error.startswith("line 7 has log-probabilities that are not finite numbers")
    assert first.as_json() == {"tokens": bad, "error": first.error}
    for other, wanted in zip(others, whole, strict=True):
        assert other.error is None and np.array_equal(other.logprobs, wanted.logprobs)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_schedule(batch):
    lengths, chunk = [10, 0, 1, 25, 7, 7, 30, 0, 2], 7
    read = {text: [] for text in range(len(lengths))}
    owner = {}
    steps = list(schedule(lengths, batch, chunk))
    for number, chunks in enumerate(steps):
        assert len(chunks) == batch
        for row, one in enumerate(chunks):
            if one:
                assert 0 < one.size <= chunk
                assert owner.setdefault(one.text, row) == row  # its cache is there
                read[one.text] += range(one.begin, one.begin + one.size)
        if None in chunks:  # a row rests only when no text waits
            assert not any(one and one.begin == 0 for later in steps[number + 1 :] for one in later)
    assert all(read[text] == list(range(length)) for text, length in enumerate(lengths))


CONFIG = Config.tiny()


def read(*lines, **arguments):
    return read_texts(lines, CONFIG, lambda: ByteTokenizer(512), **arguments)


def test_reading():
    texts = read(
        '{"text": "hi", "id": {"a": 1}}\n', "  \n", '{"tokens": [5, 6]}', '{"text": "<｜begin▁of▁sentence｜>hi"}'
    )
    assert texts[0].tokens == texts[2].tokens == [0, *ByteTokenizer(512).encode("hi")]
    assert [text.line for text in texts] == [1, 3, 4]
    assert [text.id for text in texts] == [{"a": 1}, None, None]
    assert texts[1].tokens == [5, 6]
    assert read('{"text": "hi"}', bos=False)[0].tokens == ByteTokenizer(512).encode("hi")


def test_no_tokenizer_for_token_ids():
    assert read_texts(['{"tokens": [1]}'], CONFIG, lambda: pytest.fail("not needed"))[0].tokens == [1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "hi"', "line 2 is not JSON .* column 14"),
        ("[1, 2]", "line 2 cannot be scored: expected an object"),
        ("{}", 'either "text" .* or "tokens"'),
        ('{"text": "a", "tokens": [1]}', "line 2"),
        ('{"text": 5}', "line 2"),
        ('{"tokens": "1 2"}', "line 2"),
        ('{"tokens": [1, true]}', "line 2"),
        ('{"tokens": [1, 2.5]}', "line 2"),
        ('{"tokens": []}', "line 2 .*empty"),
        ('{"tokens": [1, 512]}', "line 2 .*token id 512 is outside of the vocabulary; legal ids are 0 to 511"),
        ('{"text": "\\ud800"}', "line 2 .*surrogate"),
        ("[" * 100000, "line 2"),
        (json.dumps({"tokens": [1] * (2**20 + 1)}), "line 2 .*1048577 tokens exceed the model's 1048576"),
    ],
)
def test_bad_lines(line, message):
    with pytest.raises(ScoreError, match=message):
        read('{"tokens": [1]}', line)


def test_empty_text_without_bos():
    assert read('{"text": ""}')[0].tokens == [0]
    with pytest.raises(ScoreError, match=r"line 1 .*empty"):
        read('{"text": ""}', bos=False)


def test_nothing_to_score():
    with pytest.raises(ScoreError, match="no lines"):
        read("", "\n")


def test_files_appear_when_complete(tmp_path):
    path = tmp_path / "scores.jsonl"
    write_lines(["a", "文字"], path)
    assert path.read_bytes() == "a\n文字\n".encode()

    def fails():
        yield "b"
        assert path.read_text(encoding="utf-8") == "a\n文字\n"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(fails(), path)
    assert path.read_text(encoding="utf-8") == "a\n文字\n"
    assert [file.name for file in tmp_path.iterdir()] == ["scores.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"longest": 0}, "longest is 0"),
        ({"longest": 2**21}, "1 to 1048576 tokens"),
        ({"cache_dtype": "released"}, "needs the policy 'released'"),
    ],
)
def test_bad_scorers(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scorer(CONFIG, **({"longest": 10} | arguments))
