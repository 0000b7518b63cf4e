"""Journals that survive anything, and outputs that appear whole."""

import json
import multiprocessing
import os

import pytest

from v4_jax.infer.openai.journal import Journal, JournalError, Share, join_shares, journal_path

HEADER = {"input": "abc", "parts": 1}


def record(number):
    return {"line": number, "response": "e\u2028\u00e9" * number, "error": None}


def test_shares_split_the_lines():
    shares = [Share.parse(f"{number}/3") for number in (1, 2, 3)]
    assert [[line for line in range(1, 8) if share.holds(line)] for share in shares] == [[1, 4, 7], [2, 5], [3, 6]]
    for text in ("0/3", "4/3", "3", "a/b", "1/0", "-1/2", "1/2/3"):
        with pytest.raises(ValueError, match="expected a part and how many there are"):
            Share.parse(text)


def test_a_journal_goes_on_after_a_torn_line(tmp_path):
    """Cut at any byte, it keeps the whole records before, and the same batch can be resumed."""
    output = tmp_path / "out.jsonl"
    journal = Journal(output, Share(), HEADER)
    for number in (2, 3):
        journal.add(record(number))
    journal.close()
    path = journal_path(output, Share())
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        journal = Journal(output, Share(), HEADER)
        whole = sum(end <= cut for end in ends)
        assert journal.lines == set((2, 3)[: max(0, whole - 1)])
        journal.add(record(1))
        journal.close()
        assert not join_shares(output, 1, HEADER, [1, 2, 3, 4], as_finished=False) and not output.exists()
        if journal.lines == {1, 2, 3}:
            assert join_shares(output, 1, HEADER, [1, 2, 3], as_finished=cut < len(content))
            lines = [json.loads(text) for text in output.read_bytes().split(b"\n")[:-1]]
            assert lines == [record(number) for number in (1, 2, 3)]
            output.unlink()
        assert set(os.listdir(tmp_path)) <= {path.name}


def test_the_order_of_the_output(tmp_path):
    output = tmp_path / "out.jsonl"
    for as_finished, order in ((False, [1, 2, 3]), (True, [3, 1, 2])):
        journal = Journal(output, Share(), HEADER)
        for number in (3, 1, 2):
            journal.add(record(number))
        journal.close()
        assert join_shares(output, 1, HEADER, [1, 2, 3], as_finished=as_finished)
        assert [json.loads(text)["line"] for text in output.read_bytes().split(b"\n")[:-1]] == order


def test_shares_are_joined_by_the_last(tmp_path):
    output, header = tmp_path / "out.jsonl", HEADER | {"parts": 2}
    for share, numbers, whole in ((Share(2, 2), (2,), False), (Share(1, 2), (3, 1), True)):
        journal = Journal(output, share, header)
        for number in numbers:
            journal.add(record(number))
        journal.close()
        assert join_shares(output, 2, header, [1, 2, 3], as_finished=False) is whole
    assert [json.loads(text)["line"] for text in output.read_bytes().split(b"\n")[:-1]] == [1, 2, 3]
    assert os.listdir(tmp_path) == [output.name]
    assert join_shares(output, 2, header, [1, 2, 3], as_finished=False)  # as by whoever was a moment later


def test_a_journal_belongs_to_one_batch_and_one_process(tmp_path):
    output = tmp_path / "out.jsonl"
    journal = Journal(output, Share(), HEADER)
    # A lock is a process's own: another one has to ask for it.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert "is being written by another process" in pool.apply(_try, (output,))
    journal.close()
    with pytest.raises(JournalError, match="holds answers of another job: input was 'abc', is 'x'; expected the same"):
        Journal(output, Share(), HEADER | {"input": "x"})
    Journal(output, Share(), HEADER).close()


def test_what_differs_is_named_alone(tmp_path):
    output = tmp_path / "out.jsonl"
    header = HEADER | {"options": {"policy": "bfloat16", "sampling": {"top_p": 1.0, "seed": 0}}}
    Journal(output, Share(), header).close()
    other = HEADER | {"options": {"policy": "bfloat16", "sampling": {"top_p": 0.5, "seed": 0}, "raw": True}}
    with pytest.raises(JournalError) as caught:
        Journal(output, Share(), other)
    assert "job: options.raw was None, is True; options.sampling.top_p was 1.0, is 0.5; expected" in str(caught.value)
    Journal(output, Share(), header).close()  # whoever keeps the error keeps no lock


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[1]", "3", '"a"', '{"response": 1}', '{"line": null}', '{"line": "1"}', "[" * 99_999, "1" * 5000],
)
def test_other_files_are_no_journals(tmp_path, line):
    """Neither as the header nor as a record; what is there stays as it is."""
    output = tmp_path / "out.jsonl"
    path = journal_path(output, Share())
    for content in (f"{line}\n", f"{json.dumps(HEADER)}\n{line}\n"):
        if line.startswith("{") and content.startswith(line):
            continue  # a header of another job
        path.write_text(content)
        for use in (
            lambda: Journal(output, Share(), HEADER),
            lambda: join_shares(output, 1, HEADER, [1], as_finished=False),
        ):
            with pytest.raises(JournalError, match="that is no record of a journal; expected a journal of this job"):
                use()
        assert path.read_text() == content


def _try(output):
    try:
        Journal(output, Share(), HEADER)
    except JournalError as error:
        return str(error)
    return ""
