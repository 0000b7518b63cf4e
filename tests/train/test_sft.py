"""Fine-tuning learns what the assistant says, in the text in which it will be asked for it, and nothing else."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from tests.test_tokenizer import build_vocabulary
from v4_jax import chat
from v4_jax.chat import EOS, THINK_CLOSE
from v4_jax.tokenizer import ByteTokenizer, load_tokenizer
from v4_jax.train.corpus import Corpus
from v4_jax.train.documents import DataError, Source
from v4_jax.train.objectives.sft import Conversations
from v4_jax.train.packing import PackedRows

CASES = json.loads((Path(__file__).parents[1] / "data" / "encoding" / "cases.json").read_text())["encode"]
TOKENIZER = ByteTokenizer(300)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def user(content="question", **extra):
    return {"role": "user", "content": content, **extra}


def assistant(content="answer", reasoning="", **extra):
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **extra}


TWO = [user("one"), assistant("first", "why"), user("two"), assistant("second", "because")]


def texts(messages, default=None, *, profile="preview", **fields):
    return Conversations(default, profile).texts({"messages": messages, **fields})


def learnt(spans):
    return [span.text for span in spans if span.trained]


def joined(spans):
    return "".join(span.text for span in spans)


def trained(spans):
    """Where the spans that are learnt begin and end."""
    ends = np.cumsum([len(span.text) for span in spans])
    return [(int(end) - len(span.text), int(end)) for span, end in zip(spans, ends, strict=True) if span.trained]


@pytest.mark.parametrize("mode", chat.MODES)
@pytest.mark.parametrize("case", CASES)
def test_each_answer_is_learnt_once_where_it_is_asked_for(case, mode):
    """For every answer of the encoding's cases: what stands before it is what the model reads when it answers."""
    messages, (thinking_mode, effort) = case["messages"], chat.MODES[mode]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        with pytest.raises(ValueError, match="no assistant message; expected one to learn"):
            texts(messages, mode)
        return
    found, total = texts(messages, mode), 0
    for i in answers:
        pieces = chat.encode_pieces(messages[: i + 1], thinking_mode=thinking_mode, reasoning_effort=effort)
        last = max(n for n, piece in enumerate(pieces) if piece.role == "assistant")
        prompt, answer = "".join(piece.text for piece in pieces[:last]), pieces[last].text
        begin, end = len(prompt), len(prompt) + len(answer)
        if i and messages[i - 1]["role"] in ("user", "developer", "tool"):
            assert prompt == chat.encode(messages[:i], thinking_mode=thinking_mode, reasoning_effort=effort)
        learnt_in = [
            spans
            for spans in found
            if joined(spans).startswith(prompt + answer) and any(at <= begin and end <= to for at, to in trained(spans))
        ]
        assert len(learnt_in) == 1
        total += len(answer)
    assert total == sum(to - at for spans in found for at, to in trained(spans))


def test_reasoning_that_is_dropped_is_learnt_where_it_was_not():
    first, second = texts(TWO)
    assert joined(first) == chat.encode(TWO[:2], thinking_mode="thinking")
    assert joined(second) == chat.encode(TWO, thinking_mode="thinking")
    assert learnt(first) == [f"why{THINK_CLOSE}first{EOS}"] and learnt(second) == [f"because{THINK_CLOSE}second{EOS}"]
    assert "why" not in joined(second)


def test_reasoning_that_stays_is_one_text():
    """With tools, from where they are declared on; without thinking, there is none to drop."""
    (spans,) = texts(TWO, tools=[WEATHER])
    assert learnt(spans) == [f"why{THINK_CLOSE}first{EOS}", f"because{THINK_CLOSE}second{EOS}"]
    (spans,) = texts(TWO, "non-think")
    assert learnt(spans) == [f"first{EOS}", f"second{EOS}"]
    late = [*TWO, {"role": "developer", "content": "go", "tools": [WEATHER]}, assistant("third", "now")]
    reasons = [learnt(spans)[-1].partition(THINK_CLOSE)[0] for spans in texts(late)]
    assert reasons == ["why", "because", "now"]


def test_modes_and_weights():
    texts_of = {mode: joined(texts(TWO[:2], mode)[0]) for mode in chat.MODES}
    assert texts_of["low"] == texts_of["high"] != texts_of["max"]
    official = {mode: joined(texts(TWO[:2], mode, profile="official")[0]) for mode in chat.MODES}
    assert official["high"] == texts_of["max"] != official["max"]
    assert joined(texts(TWO[:2], "non-think", mode="max")[0]) == texts_of["max"]  # the line's own mode
    assert joined(texts([user(), assistant()])[0]) == chat.encode([user(), assistant()])  # no reasoning: non-think
    (spans,) = texts([user(), assistant(weight=0), user(), assistant("yes", weight=1)])
    assert learnt(spans) == [f"yes{EOS}"]
    # An answer to a task has no reasoning: the later text begins with it, and is enough for both.
    (spans,) = texts([user("q", task="domain"), assistant("law"), user("more"), assistant("done", "hm")])
    assert learnt(spans) == [f"law{EOS}", f"hm{THINK_CLOSE}done{EOS}"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": []}, "there is no assistant message; expected one to learn"),
        ({"messages": "hi"}, "messages is 'hi'; expected a list of messages"),
        ({"messages": [user()]}, "there is no assistant message; expected one"),
        ({"messages": [user(), assistant(weight=0)]}, "no assistant message with a weight other than 0; expected one"),
        ({"messages": [user(), assistant(weight=2)]}, "message 1 has weight 2; legal weights are 0 and 1"),
        ({"messages": [user(), assistant()], "mode": "hard"}, "mode is 'hard'; legal modes are 'non-think', 'low', "),
        ({"messages": [{"role": "bot"}, assistant()]}, "message 0 has role 'bot'; legal roles are"),
        ({"messages": [user(), assistant("x" * 200)]}, "has 21[0-9] tokens; expected at most a row's 128"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, line, said):
    """Named by file and line, or left out and counted."""
    path = write(tmp_path, {"messages": TWO}, line)
    with pytest.raises(DataError, match=rf"line 2 of '.*chats.jsonl' .*{said}"):
        opened(path).next_batch(8, 128)
    problems = []
    rows = opened(path, on_bad=problems.append)
    batch = rows.next_batch(8, 128)
    assert rows.state()["skipped"] > 1 and len(set(problems)) == 1
    found = {TOKENIZER.decode(row[mask].tolist()) for row, mask in zip(batch.tokens, batch.trained, strict=True)}
    first, second = (learnt(spans)[0] for spans in texts(TWO))
    assert {run.replace(first, "").replace(second, "") for run in found} == {""}


def write(folder, *lines):
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def opened(*paths, fields=("messages",), **options):
    sources = [Source(str(path), field=field) for path, field in zip(paths, fields, strict=True)]
    ids = {"vocab_size": TOKENIZER.vocab_size, "bos_id": TOKENIZER.bos_id, "eos_id": TOKENIZER.eos_id}
    return PackedRows(Corpus(sources, TOKENIZER.encode, seed=0, shuffle=False, **ids, **options), open_rows=2)


def test_rows(tmp_path):
    """Tokens are those of the whole text, each text is a segment, and the marks are on what is learnt."""
    batch = opened(write(tmp_path, {"messages": TWO})).next_batch(1, 256)
    tokens, segments, trained = (x[0] for x in batch[:3])
    for number, spans in enumerate(texts(TWO), 1):
        of = segments == number
        assert tokens[of].tolist() == TOKENIZER.encode(joined(spans))
        assert TOKENIZER.decode(tokens[of & trained].tolist()) == "".join(learnt(spans))
    assert trained.dtype == bool and not trained[segments == 0].any()


def test_spans_tokenised_apart_are_the_whole_text(tmp_path):
    """Also where letters merge into tokens: special tokens stand between what is read and what is written."""
    tokenizer = load_tokenizer(tmp_path, build_vocabulary(tmp_path))
    assert len(tokenizer.encode("the token")) < len("the token")
    for case in CASES:
        if any(message["role"] == "assistant" for message in case["messages"]):
            for spans in (spans for mode in chat.MODES for spans in texts(case["messages"], mode)):
                apart = [tokenizer.encode(span.text) for span in spans]
                assert [*itertools.chain.from_iterable(apart)] == tokenizer.encode(joined(spans))


def test_texts_and_conversations_mixed(tmp_path):
    (tmp_path / "plain.txt").write_text("a plain text")
    paths = write(tmp_path, {"messages": TWO}), tmp_path / "plain.txt"
    batch = opened(*paths, fields=("messages", "text")).next_batch(2, 512)
    runs = {TOKENIZER.decode(t[m].tolist()) for t, m in zip(batch.tokens, batch.trained, strict=True)}
    assert all("a plain text" in run and f"why{THINK_CLOSE}first" in run and "one" not in run for run in runs)
    with pytest.raises(DataError, match="is text and holds no conversations; legal with them are"):
        opened(paths[1])


def test_resumed_amid_a_conversation(tmp_path):
    """Also where one of its texts was handed out, and the others were not."""
    chats = [{"messages": [*TWO, user("3" * n), assistant("4" * n, "5")]} for n in range(1, 12)]
    path = write(tmp_path, *chats)
    rows, states, batches = opened(path), [], []
    for length in [128] * 6 + [160] * 3 + [128] * 3:
        states.append(json.dumps(rows.state()))
        batches.append((length, rows.next_batch(1, length)))
    assert any(begin for state in map(json.loads, states) for row in state["rows"] for _, begin, _ in row)
    for at in range(len(states)):
        rows = opened(path)
        rows.restore(json.loads(states[at]))
        for length, batch in batches[at : at + 3]:
            for found, wanted in zip(rows.next_batch(1, length), batch, strict=True):
                np.testing.assert_array_equal(found, wanted)

    def weigh(*weights):
        """The same texts, of which answers with a weight of 0 are not learnt."""
        for line in chats:
            for message, weight in zip(line["messages"][1::2], weights, strict=True):
                message["weight"] = weight
        write(tmp_path, *chats)

    weigh(1, 1, 1)
    opened(path).restore(json.loads(states[3]))
    weigh(0, 0, 1)
    with pytest.raises(DataError, match="which has other text"):
        opened(path).restore(json.loads(states[3]))
