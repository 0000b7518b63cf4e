"""Batch files: lines of requests, wherever they stand and whatever they hold."""

import json

import pytest

from v4_jax.infer.openai.batch import BodyError, Lines, line_id, read_request

BODY = {"messages": [{"role": "user", "content": "Hello"}]}


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
    assert line_id(text) == ("a" if b'"custom_id"' in text else None)
