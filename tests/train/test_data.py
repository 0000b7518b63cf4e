"""Batches hold every document once and whole, in the same order each time and wherever training resumes."""

import gzip
import itertools
import json
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from v4_jax.train.corpus import Corpus
from v4_jax.train.documents import DataError, Source
from v4_jax.train.objectives.sft import Conversations
from v4_jax.train.on_policy.prompts import Prompts
from v4_jax.train.packing import PackedRows
from v4_jax.train.teachers.rows import TeacherRows

VOCAB = 100_000
TEXTS = ["one", "zwei\nlines", "三", "", "x" * 50]


def encode(text):
    return [ord(letter) for letter in text]


def open_corpus(*sources, **arguments):
    defaults = {"encode": encode, "vocab_size": VOCAB, "bos_id": None, "eos_id": None, "seed": 0}
    return Corpus(sources, **(defaults | arguments))


def write_text(path, values, field):
    path.mkdir()
    for i, value in enumerate(values):
        (path / f"{i}.{['txt', 'md', 'py'][i % 3]}").write_text(value, encoding="utf-8")


def write_lines(path, values, field):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"id": i, field: value}) for i, value in enumerate(values)))


def write_parquet(path, values, field):
    pq.write_table(pa.table({"id": range(len(values)), field: values}), path, row_group_size=2)


def write_records(path, values, field):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for value in values:
        writer.write(json.dumps({field: value}).encode())
    writer.close()


WRITERS = {
    "files": write_text,
    "lines.jsonl": write_lines,
    "lines.jsonl.gz": write_lines,
    "table.parquet": write_parquet,
    "records.array_record": write_records,
    "records.arrayrecord": write_records,
}


def write(path, values, field="text"):
    """Writes documents in the format that the name stands for; returns their path."""
    WRITERS[path.name](path, values, field)
    return str(path)


def in_order(corpus, count):
    return [corpus.documents[i].ids.tolist() for i in range(count)]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.fixture
def numbered(tmp_path):
    """60 documents of up to 19 tokens and one of 47, all tokens different."""
    lengths = [*np.random.default_rng(0).integers(1, 20, 60).tolist(), 47]
    ends = np.cumsum(lengths)
    documents = [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]
    return Source(write(tmp_path / "lines.jsonl", documents, "tokens"), field="tokens"), documents


def segments(batch):
    """The packed documents of each row; checks what must hold for any batch."""
    assert batch.tokens.dtype == batch.segment_ids.dtype == np.int32
    assert not batch.tokens[batch.segment_ids == 0].any()
    rows = []
    for tokens, ids in zip(batch.tokens, batch.segment_ids, strict=True):
        used = int((ids > 0).sum())
        assert used and not ids[used:].any()  # padding stands at the end
        assert ids[0] == 1 and set(np.diff(ids[:used])) <= {0, 1}
        rows.append([tokens[ids == segment].tolist() for segment in range(1, ids.max() + 1)])
    return rows


def same(batch, other):
    return np.array_equal(batch.tokens, other.tokens) and np.array_equal(batch.segment_ids, other.segment_ids)


@pytest.mark.parametrize("name", WRITERS)
def test_text_of_each_format(tmp_path, name):
    path = write(tmp_path / name, TEXTS)
    corpus = open_corpus(Source(path), shuffle=False, bos_id=7, eos_id=8)
    expected = [[7, *encode(text), 8] if text else [] for text in TEXTS]
    assert in_order(corpus, 2 * len(TEXTS)) == expected * 2


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "files"])
def test_token_ids_of_each_format(tmp_path, name):
    documents = [[5, 6, VOCAB - 1], [], [0], [3] * 10, [9]]
    source = Source(write(tmp_path / name, documents, "tokens"), field="tokens")
    corpus = open_corpus(source, encode=None, shuffle=False, bos_id=7, eos_id=8)
    assert in_order(corpus, 2 * len(documents)) == documents * 2


def test_directories_and_patterns(tmp_path):
    (tmp_path / "below" / ".hidden").mkdir(parents=True)
    for name, text in (
        ("a.txt", "A"),
        ("below/b", "B"),
        ("c.rst", "C"),
        ("below/.d.txt", "D"),
        ("below/.hidden/e", "E"),
    ):
        (tmp_path / name).write_text(text)
    write(tmp_path / "below" / "lines.jsonl", ["F", "G"])
    write(tmp_path / "table.parquet", ["H"])

    def read(path, **arguments):
        corpus = open_corpus(Source(str(path), **arguments), shuffle=False)
        return "".join(chr(document[0]) for document in in_order(corpus, corpus.identity["documents"][0]))

    assert read(tmp_path) == "ABCFGH"
    assert read(tmp_path, format="text") == "ABC"
    assert read(tmp_path, format="jsonl") == "FG"
    assert read(tmp_path / "**" / "*.jsonl") == "FG"
    assert read(tmp_path / "*.*t") == "ACH"
    (tmp_path / "lines").write_bytes((tmp_path / "below" / "lines.jsonl").read_bytes())
    assert read(tmp_path / "lines", format="jsonl") == "FG"


@pytest.mark.parametrize("scan", [1, 16, 1 << 24])
def test_lines_end_in_any_way(tmp_path, monkeypatch, scan):
    monkeypatch.setattr("v4_jax.train.documents._SCAN_BYTES", scan)
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "A"}\r\n  \n{"text": "B"}\n\n{"text": "C"}')
    assert in_order(open_corpus(Source(str(tmp_path / "a.jsonl")), shuffle=False), 6) == [[], [65], [], [66], [], [67]]


def test_epochs(numbered):
    source, documents = numbered
    corpus, count = open_corpus(source), len(documents)
    epochs = [in_order(corpus, 3 * count)[i * count : (i + 1) * count] for i in range(3)]
    assert all(sorted(epoch) == sorted(documents) for epoch in epochs)
    assert documents not in epochs and epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert in_order(open_corpus(source), 3 * count) == joined(epochs)
    assert in_order(open_corpus(source, seed=1), count) != epochs[0]
    assert in_order(open_corpus(source, shuffle=False), count) == documents


def test_mixture(tmp_path):
    for name, text in (("a", "A"), ("b", "B")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "lines.jsonl", [text] * 7)
    corpus = open_corpus(Source(str(tmp_path / "a"), weight=3), Source(str(tmp_path / "b"), weight=1))
    drawn = np.asarray(in_order(corpus, 400))[:, 0] == ord("A")
    shares = np.convolve(drawn, np.ones(40), mode="valid")
    assert drawn.sum() == 300 and shares.min() >= 29 and shares.max() <= 31


def test_sources_are_not_read_in_step(numbered):
    source, documents = numbered
    drawn = in_order(open_corpus(source, source), 2 * len(documents))
    assert drawn[::2] != drawn[1::2] and sorted(drawn[::2]) == sorted(drawn[1::2]) == sorted(documents)


@pytest.mark.parametrize("open_rows", [1, 8])
def test_whole_documents_in_order(numbered, open_rows):
    corpus = open_corpus(numbered[0])
    rows = PackedRows(corpus, open_rows=open_rows)
    stream = in_order(corpus, len(numbered[1]))
    number = {token: i for i, document in enumerate(stream) for token in document}
    for shape in ((1, 50), (3, 20), (1, 150)):
        for row in segments(rows.next_batch(*shape)):
            order = [number[document[0]] for document in row]
            assert order == sorted(order)
            assert shape[1] != 50 or row == [stream[i] for i in order]
    assert rows.state()["following"] <= len(stream)


def test_first_fit(tmp_path):
    # In rows of 10: 4 goes to the first 6, 3 to the 7. The third 6 fits nowhere and ends the oldest open row, of 5.
    lengths = [6, 7, 4, 5, 3, 6, 6, 10, 4]
    documents = [[number] * length for number, length in enumerate(lengths)]
    source = Source(write(tmp_path / "lines.jsonl", documents, "tokens"), field="tokens")
    rows = PackedRows(open_corpus(source, shuffle=False), open_rows=2)
    packed = [[(piece[0], len(piece)) for piece in row] for row in segments(rows.next_batch(5, 10))]
    assert packed == [[(0, 6), (2, 4)], [(1, 7), (4, 3)], [(3, 5)], [(7, 10)], [(5, 6), (8, 4)]]


def test_long_documents_are_cut(tmp_path):
    source = Source(write(tmp_path / "lines.jsonl", [list(range(1, 26))], "tokens"), field="tokens")
    rows = PackedRows(open_corpus(source), open_rows=1)
    packed = segments(rows.next_batch(3, 10))
    assert packed == [[list(range(1, 11))], [list(range(11, 21))], [list(range(1, 11))]]  # 21 to 25 wait
    assert segments(rows.next_batch(2, 10)) == [[list(range(11, 21))], [list(range(21, 26))] * 2]
    # Training ends in the middle of the second document, and goes on there with longer rows.
    rows = PackedRows(open_corpus(source), open_rows=1)
    rows.next_batch(1, 10)
    assert segments(rows.next_batch(1, 40)) == [[list(range(11, 26)), list(range(1, 26))]]


# Ramps of the batch size and stages of the length, down as well.
SHAPES = [(2, 20), (2, 20), (5, 20), (1, 50), (3, 50), (4, 8), (1, 8), (30, 8), (2, 20), (40, 20), (3, 20)]


def test_nothing_lost_and_nothing_twice(numbered):
    corpus = open_corpus(numbered[0])
    rows, given = PackedRows(corpus, open_rows=4), Counter()
    for shape in SHAPES:
        batch = rows.next_batch(*shape)
        assert batch.tokens.shape == shape
        for document in joined(segments(batch)):
            assert document == list(range(document[0], document[0] + len(document)))
            given.update(document)
        state = rows.state()
        held = Counter()
        for document, begin, _ in [*joined(state["rows"]), *state["waiting"]]:
            held.update(corpus.documents[document].ids[begin:].tolist())
        assert given + held == Counter(joined(in_order(corpus, state["following"])))
    assert state["following"] > 2 * len(numbered[1])


def test_resume(numbered):
    shapes, states, batches = SHAPES * 2, [], []
    rows = PackedRows(open_corpus(numbered[0]), open_rows=4)
    for shape in shapes:
        states.append(json.dumps(rows.state()))
        batches.append(rows.next_batch(*shape))
    assert not same(batches[0], batches[1])
    assert json.loads(states[-1])["following"] > 4 * len(numbered[1])  # epochs end on the way
    for begin in range(len(shapes)):
        if begin % 3:  # the same process goes back, or a new one begins
            rows = PackedRows(open_corpus(numbered[0]), open_rows=4, threads=1 + begin % 2)
        rows.restore(json.loads(states[begin]))
        assert rows.state() == json.loads(states[begin])
        for shape, batch in list(zip(shapes, batches, strict=True))[begin : begin + 5]:
            assert same(rows.next_batch(*shape), batch)


def test_state_has_no_tokens_and_does_not_grow(tmp_path):
    source = Source(write(tmp_path / "lines.jsonl", ["x" * 1000, "y" * 300] * 20))
    rows, sizes = PackedRows(open_corpus(source)), []
    for _ in range(10):
        rows.next_batch(20, 2000)
        sizes.append(len(json.dumps(rows.state())))
    assert max(sizes) < 2000


def test_restoring_with_another_corpus(numbered, tmp_path):
    rows = PackedRows(open_corpus(numbered[0]))
    rows.next_batch(1, 20)
    with pytest.raises(DataError, match=r"another corpus .seed 0, which is now 1.: its place"):
        PackedRows(open_corpus(numbered[0], seed=1)).restore(rows.state())
    other = Source(write(tmp_path / "table.parquet", [[1] * 30] * len(numbered[1]), "tokens"), field="tokens")
    with pytest.raises(DataError, match=r"saved with (other|another)|which has other text"):
        PackedRows(open_corpus(other)).restore(rows.state())


def test_restoring_for_another_objective(numbered):
    """A run that goes on with another objective is told so, whichever way its data was read."""
    packed, texts = PackedRows(open_corpus(numbered[0])), PackedRows(open_corpus(numbered[0]))
    taught = TeacherRows({"teacher": texts}, {"teacher": 1.0})
    options = dict(vocab_size=1000, bos_id=None, seed=0, shuffle=True, on_bad=None, answer=1)
    prompts = Prompts([numbered[0]], [""], encode, conversations=Conversations(), **options)
    for one in (packed, taught, prompts):
        for other in (packed, taught, prompts):
            state = json.loads(json.dumps(other.state()))
            one.edited(state)  # may say so, and goes on
            if one is other:
                one.restore(state)
                continue
            with pytest.raises(DataError, match=r"saved with (another objective|no teachers)"):
                one.restore(state)
    with pytest.raises(DataError, match="with the teachers teacher, and they are now other; expected the data as it"):
        TeacherRows({"other": texts}, {"other": 1.0}).restore(taught.state())


def test_edited_text_is_said_or_refused(tmp_path):
    """The same number of files: other sizes are said; other places, or text that a state is amid, are refused."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"tokens": [i] * 5}) + "\n" for i in range(4)))
    source = Source(str(tmp_path), field="tokens")

    def opened():
        return PackedRows(open_corpus(source, shuffle=False), open_rows=1)

    rows = opened()
    rows.next_batch(1, 7)
    state = json.loads(json.dumps(rows.state()))
    assert not rows.edited(state)

    def edit(name, values):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"tokens": [i] * 5}) + "\n" for i in values))

    edit("b", [0, 1, 9, 3])  # as long as before
    assert opened().edited(state)
    edit("b", [100, 200, 300, 7])
    rows = opened()
    assert rows.edited(state)
    rows.restore(state)
    edit("a", [0, 9, 2, 3])
    with pytest.raises(DataError, match="amid document 1, which has other text or another tokenizer now"):
        opened().restore(state)
    edit("a", [0, 1, 2])
    edit("b", [1, 2, 3, 4, 5])
    with pytest.raises(
        DataError, match=r"saved with another corpus .layout .*: its place in the data would mean other"
    ):
        opened().restore(state)


def test_the_next_batch_is_made_in_the_background(tmp_path):
    calls = []
    source = Source(write(tmp_path / "lines.jsonl", ["abcde"] * 10))
    corpus = open_corpus(source, encode=lambda text: calls.append(text) or encode(text))
    rows = PackedRows(corpus, open_rows=1, threads=1)
    rows.next_batch(100, 10)
    deadline = time.monotonic() + 10
    while len(calls) < 2 * 200 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(calls) >= 2 * 200 and rows.state()["following"] <= 201


def test_little_padding(tmp_path):
    lengths = np.random.default_rng(0).lognormal(5, 1, 2000).astype(int) + 1
    source = Source(write(tmp_path / "table.parquet", [[1] * n for n in lengths], "tokens"), field="tokens")
    rows = PackedRows(open_corpus(source))
    padding = [float((rows.next_batch(20, 1024).segment_ids == 0).mean()) for _ in range(10)]
    assert np.mean(padding) < 0.03


def test_empty_documents_are_skipped(tmp_path):
    source = Source(write(tmp_path / "lines.jsonl", ["", "a", "", "", "b"]))
    rows = PackedRows(open_corpus(source, shuffle=False, bos_id=1, eos_id=2))
    assert segments(rows.next_batch(1, 12)) == [[[1, 97, 2], [1, 98, 2]] * 2]


def lines(content):
    def make(path):
        (path / "a.jsonl").write_bytes(content)
        return Source(str(path / "a.jsonl"))

    return make


def table(columns, field="text"):
    def make(path):
        pq.write_table(pa.table(columns), path / "a.parquet")
        return Source(str(path / "a.parquet"), field=field)

    return make


def file(name, content, **arguments):
    def make(path):
        (path / name).write_bytes(content)
        return Source(str(path / name), **arguments)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: Source(str(path / "none")), "no file at .*none'; expected a file, a directory .* or a glob"),
        (lambda path: Source(str(path)), "no file at"),
        (lambda path: Source(str(path), format="parquet"), "no parquet file at"),
        (lambda path: Source(str(path), format="csv"), "'csv'; legal formats are auto, text, jsonl"),
        (lambda path: Source("a", weight=0), "weight of 'a' is 0; expected a positive number"),
        (lambda path: Source("a", weight=-1.5), "weight of 'a' is -1.5"),
        (lambda path: Source("a", weight=float("nan")), "weight of 'a' is nan"),
        (lines(b""), "no documents in .*a.jsonl"),
        (file("a.txt", b"a", field="tokens"), r"a.txt' is text .*legal with them are \.jsonl"),
        (file("a.parquet", b"nothing"), "a.parquet' cannot be read"),
        (file("a.array_record", b"nothing" * 20000), "a.array_record' cannot be read"),
        (file("a.jsonl.gz", b"nothing"), "a.jsonl.gz' cannot be read"),
        (file("a.jsonl.gz", gzip.compress(b"{}" * 999)[:-9]), "a.jsonl.gz' cannot be read"),
        (table({"a": ["x"], "b": [1]}), "no column 'text'; its columns are 'a', 'b'"),
        (table({"text": [1]}), "column 'text' of .* holds int64; expected strings"),
        (table({"tokens": ["x"]}, "tokens"), "holds string; expected lists of integers"),
    ],
)
def test_bad_sources(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        open_corpus(make(tmp_path))


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lines(GOOD + b'{"body": "a", "id": 1}'), "^line 2 of .*a.jsonl' has no field 'text'; .* 'body', 'id'$"),
        (lines(GOOD + b"{}"), "line 2 .*its fields are none"),
        (lines(b"{}\n" + 99 * GOOD), "line 1 .*its fields are none"),
        (lines(GOOD + b"[1]"), r"line 2 of .* holds '\[1\]'; expected a JSON object"),
        (lines(GOOD + b'{"text": 5}'), "line 2 of .* has int in field 'text'; expected a string"),
        (lines(GOOD + b'{"text": "a"'), "line 2 of .* is not JSON .* at column 13"),
        (lines(GOOD + b'{"text": "\xff"}'), "line 2 of .* is not UTF-8: byte 0xff at position 10"),
        (lines(GOOD + b'{"text": "\xf4\x8f\xbf\xbf"}'), "line 2 of .* has token id 1114111; legal ids are 0 to 99999"),
        (lines(GOOD + b'{"text": "bad"}'), "line 2 of .* cannot be tokenised: no such letters"),
        (lines(GOOD + b"[" * 100_000), "line 2 of .* cannot be read"),
        (file("a.txt", b"a\xffb"), "a.txt' is not UTF-8: byte 0xff at position 1"),
        (table({"text": ["a", None]}), "row 2 of .* null in column 'text'"),
        (table({"tokens": [[1], [1, None]]}, "tokens"), "row 2 of .* null in column 'tokens'"),
        (table({"tokens": [[1], [VOCAB]]}, "tokens"), "row 2 of .* has token id 100000; legal ids are 0 to 99999"),
        (file("a.jsonl", b'{"tokens": [-1]}', field="tokens"), "line 1 of .* has token id -1"),
        (file("a.jsonl", b'{"tokens": [1e3]}', field="tokens"), "line 1 of .* not a list of integers"),
        (file("a.jsonl", b'{"tokens": [true]}', field="tokens"), "line 1 of .* not a list of integers"),
        (file("a.jsonl", b'{"tokens": [1%s]}' % (b"0" * 30), field="tokens"), "line 1 of .* has token id 10000"),
        (lines(b"\n\n"), "all documents .* are empty"),
        (file("a.txt", b""), "all documents .* are empty"),
    ],
)
def test_bad_documents(tmp_path, make, message):
    def encode_or_fail(text):
        if text == "bad":
            raise ValueError("no such letters")
        return encode(text)

    rows = PackedRows(open_corpus(make(tmp_path), encode=encode_or_fail, shuffle=False))
    for _ in range(2):  # it does not pass by itself
        with pytest.raises(DataError, match=message):
            rows.next_batch(4, 4)
    assert rows.state()["following"] == 0


def test_damaged_records(tmp_path):
    write(tmp_path / "records.array_record", ["a"], "body")
    with pytest.raises(DataError, match=r"record 1 of .* has no field 'text'"):
        open_corpus(Source(str(tmp_path / "records.array_record"))).documents[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"bos_id": VOCAB}, "bos_id is 100000; legal ids are 0 to 99999"),
        ({"eos_id": -1}, "eos_id is -1"),
        ({"encode": None}, "holds text; expected a tokenizer, or the field 'tokens'"),
    ],
)
def test_bad_corpora(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        open_corpus(Source(write(tmp_path / "lines.jsonl", TEXTS)), **arguments)


def test_bad_numbers(numbered):
    corpus = open_corpus(numbered[0])
    with pytest.raises(DataError, match="no sources"):
        open_corpus()
    with pytest.raises(DataError, match="open_rows is 0; expected at least 1"):
        PackedRows(corpus, open_rows=0)
    with pytest.raises(DataError, match="threads is 0"):
        PackedRows(corpus, threads=0)
    with pytest.raises(DataError, match="rows is 0"):
        PackedRows(corpus).next_batch(0, 5)
    with pytest.raises(DataError, match="length is -1"):
        PackedRows(corpus).next_batch(1, -1)
