"""Batch files: lines of requests, wherever they stand and whatever they hold."""

import json
import math

import pytest

from tests.models import two
from v4_jax.infer.engine.requests import Event
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.openai.batch import BodyError, Lines, PreparedLine, answer_lines, line_id, read_request
from v4_jax.infer.openai.bodies import read_body
from v4_jax.infer.openai.completions import Completion, Defaults, Model
from v4_jax.tokenizer import ByteTokenizer

BODY = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def model():
    return Model("tiny", two().config, ByteTokenizer(320), Defaults(Sampling(), (1,), 8), 2048)


def line(**changes):
    return json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY} | changes)


def test_lines_are_read_where_they_stand(tmp_path):
    texts = [b'"a"', b"", b"  ", b'"\xe2\x80\xa8b"', b"x" * (3 << 20), b'"last"']
    path = tmp_path / "in.jsonl"
    for end in (b"", b"\n"):
        path.write_bytes(b"\n".join(texts) + end)
        lines = Lines(path)
        assert lines.numbers == [1, 4, 5, 6]
        assert [lines[number].rstrip(b"\n") for number in lines.numbers] == [texts[0], *texts[3:]]
    path.write_bytes(b"")
    assert Lines(path).numbers == []


def test_requests_come_in_three_forms():
    assert read_request(line().encode()).id == "a"
    assert read_request(b'{"id": 7, "prompt": "x"}')[0] == 7
    question, text = read_request(b'"Why?"'), read_request(b'"Why?"', raw=True)
    assert question.body.messages == [{"role": "user", "content": "Why?"}] and text.body.prompt == "Why?"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nonsense", "the line is not JSON: Expecting value at column 1"),
        (b"\xff", "the line is not UTF-8"),
        ("[" * 100_000, "the line is nested too deeply"),
        ("[" * 200 + "]" * 200, "the line is nested too deeply; expected at most 128 levels"),
        (
            line(custom_id="a", body=BODY | {"x": "\ud83d"}),
            r"the line is not text: it holds half a surrogate pair \(.ud83d\)",
        ),
        (line(body=BODY | {"\ud83d": 1}), "half a surrogate pair"),
        (line(body=BODY | {"temperature": float("nan")}), "the line is not JSON: NaN is not a JSON number"),
        (line(body=BODY | {"seed": 1}).replace("1}", "1e999}"), "the number 1e999 is too large"),
        (line(body=BODY | {"seed": 1}).replace("1}", "1" * 5000 + "}"), "a number has 5,000 digits"),
        (json.dumps({"prompt": "x", "id": [1]}), "custom_id or id is of type list"),
        ("[1]", "the line is a list"),
        ("{}", 'the body has neither "messages" nor "prompt"'),
        (line(url="/v1/embeddings"), "url is '/v1/embeddings'; expected /v1/chat/completions or /v1/completions"),
        (line(url=["/v1/completions"]), r"url is \['/v1/completions'\]; expected"),
        (line(method="GET"), "method is 'GET'; expected POST"),
        (line(extra=1), "extra in a batch line"),
        (line(url="/v1/completions"), "prompt is missing"),
        (line(body=BODY | {"stream": True}), "stream is true; answers in a file are whole"),
        (json.dumps({"custom_id": "a", "body": BODY}), "url is None"),
    ],
)
def test_bad_lines_are_refused_in_a_sentence(text, sentence):
    text = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(BodyError, match=sentence):
        read_request(text)
    if len(text) < 5000:  # one with such a number is not read a second time
        assert line_id(text) == ("a" if b'"custom_id"' in text else None)


def test_ids_are_kept_as_far_as_they_are_text():
    assert line_id(rb'{"custom_id": "a\ud83d", "body": 1}') == "a?"
    assert line_id(b'{"custom_id": {"a": 1}}') is None and line_id(b'{"id": 7}') == 7


def test_a_byte_order_mark_is_no_text(tmp_path):
    path, mark = tmp_path / "in.jsonl", b"\xef\xbb\xbf"
    path.write_bytes(mark + b'"Why?"\r\n' + b'"How?"\r\n')
    lines = Lines(path)
    assert lines.numbers == [1, 2] and read_request(lines[1]).body.messages[0]["content"] == "Why?"
    path.write_bytes(mark + b"\n" + b'"How?"')
    assert Lines(path).numbers == [2]


def test_logits_that_are_not_finite_are_their_lines_error(model):
    """Nobody answers for an engine here: its events say what came."""
    given = {1: {"prompt": "x", "n": 2, "id": "a"}, 2: {"prompt": "y", "id": "b"}}
    prepared = {n: PreparedLine(n, body.pop("id"), Completion(read_body(body), model, 0)) for n, body in given.items()}
    first, second = Event(0, 0, 65, -0.5, None), Event(1, 0, 65, -0.5, "length")
    broken = Event(0, 1, 0, math.nan, "error")
    cancelled, records, numbers = [], [], iter((0, 1))

    class Engine:
        slots, waiting = 2, 0
        cancel = staticmethod(lambda *which: cancelled.append(which))
        submit = staticmethod(lambda request: next(numbers))

        def run(self):
            return iter((first, broken, second))

    answer_lines(Engine(), [1, 2], prepared.__getitem__, records.append, lambda: None)
    assert cancelled == [(0,)] and [one["custom_id"] for one in records] == ["a", "b"]
    assert records[0]["response"] is None and records[0]["error"]["code"] == "not_finite"
    assert "are not finite numbers" in records[0]["error"]["message"]
    assert records[1]["error"] is None and records[1]["response"]["body"]["choices"][0]["text"]


def test_a_line_of_several_prompts_is_one_answer(model):
    prepared = PreparedLine(1, "a", Completion(read_body({"prompt": ["x", "y"]}), model, 0))
    records, asked = [], []

    class Engine:
        slots, waiting = 2, 0

        def submit(self, request):
            asked.append(request)
            return len(asked) - 1

        def run(self):
            return iter((Event(1, 0, 66, -0.5, "length"), Event(0, 0, 65, -0.5, "length")))

    answer_lines(Engine(), [1], lambda number: prepared, records.append, lambda: None)
    assert asked == prepared.completion.requests and len(asked) == 2
    [answer] = records
    assert [choice["text"] for choice in answer["response"]["body"]["choices"]] == [">", "?"]  # bytes, from id 3 on
