"""Job files: lines, journals that survive anything, outputs that appear whole."""

import json
import multiprocessing
import os

import pytest

from v4_jax.infer.openai.batch import (
    BodyError,
    Journal,
    JournalError,
    Lines,
    Part,
    journal_path,
    line_id,
    merge,
    read_job,
)

HEADER = {"input": "abc", "parts": 1}
BODY = {"messages": [{"role": "user", "content": "Hello"}]}


def line(**changes):
    return json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY} | changes)


def record(number):
    return {"line": number, "response": "e\u2028\u00e9" * number, "error": None}


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


def test_parts_split_the_lines():
    parts = [Part.parse(f"{number}/3") for number in (1, 2, 3)]
    assert [[line for line in range(1, 8) if part.holds(line)] for part in parts] == [[1, 4, 7], [2, 5], [3, 6]]
    for text in ("0/3", "4/3", "3", "a/b", "1/0", "-1/2", "1/2/3"):
        with pytest.raises(ValueError, match="expected a part and how many there are"):
            Part.parse(text)


def test_jobs_come_in_three_forms():
    assert read_job(line().encode()).id == "a"
    assert read_job(b'{"id": 7, "prompt": "x"}')[0] == 7
    question, text = read_job(b'"Why?"'), read_job(b'"Why?"', raw=True)
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
        read_job(text)
    assert line_id(text) == ("a" if b'"custom_id"' in text else None)


def test_a_journal_goes_on_after_a_torn_line(tmp_path):
    """Cut at any byte, it keeps the whole records before, and the same job can go on."""
    output = tmp_path / "out.jsonl"
    journal = Journal(output, Part(), HEADER)
    for number in (2, 3):
        journal.add(record(number))
    journal.close()
    path = journal_path(output, Part())
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        journal = Journal(output, Part(), HEADER)
        whole = sum(end <= cut for end in ends)
        assert journal.lines == set((2, 3)[: max(0, whole - 1)])
        journal.add(record(1))
        journal.close()
        assert not merge(output, 1, HEADER, [1, 2, 3, 4], as_finished=False) and not output.exists()
        if journal.lines == {1, 2, 3}:
            assert merge(output, 1, HEADER, [1, 2, 3], as_finished=cut < len(content))
            lines = [json.loads(text) for text in output.read_bytes().split(b"\n")[:-1]]
            assert lines == [record(number) for number in (1, 2, 3)]
            output.unlink()
        assert set(os.listdir(tmp_path)) <= {path.name}


def test_the_order_of_the_output(tmp_path):
    output = tmp_path / "out.jsonl"
    for as_finished, order in ((False, [1, 2, 3]), (True, [3, 1, 2])):
        journal = Journal(output, Part(), HEADER)
        for number in (3, 1, 2):
            journal.add(record(number))
        journal.close()
        assert merge(output, 1, HEADER, [1, 2, 3], as_finished=as_finished)
        assert [json.loads(text)["line"] for text in output.read_bytes().split(b"\n")[:-1]] == order


def test_parts_are_merged_by_the_last(tmp_path):
    output, header = tmp_path / "out.jsonl", HEADER | {"parts": 2}
    for part, numbers, whole in ((Part(2, 2), (2,), False), (Part(1, 2), (3, 1), True)):
        journal = Journal(output, part, header)
        for number in numbers:
            journal.add(record(number))
        journal.close()
        assert merge(output, 2, header, [1, 2, 3], as_finished=False) is whole
    assert [json.loads(text)["line"] for text in output.read_bytes().split(b"\n")[:-1]] == [1, 2, 3]
    assert os.listdir(tmp_path) == [output.name]
    assert merge(output, 2, header, [1, 2, 3], as_finished=False)  # as by whoever was a moment later


def test_a_journal_belongs_to_one_job_and_one_process(tmp_path):
    output = tmp_path / "out.jsonl"
    journal = Journal(output, Part(), HEADER)
    # A lock is a process's own: another one has to ask for it.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert "is being written by another process" in pool.apply(_try, (output,))
    journal.close()
    with pytest.raises(
        JournalError, match=r"holds answers of a job with {'input': 'abc'}, this one has {'input': 'x'}"
    ):
        Journal(output, Part(), HEADER | {"input": "x"})
    Journal(output, Part(), HEADER).close()


def _try(output):
    try:
        Journal(output, Part(), HEADER)
    except JournalError as error:
        return str(error)
    return ""
