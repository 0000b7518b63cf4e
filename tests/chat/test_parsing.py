"""Reading replies: the strict parser against its cases, and the streaming splitter against the parser."""

import json
import random
from pathlib import Path

import pytest

from v4_jax import chat
from v4_jax.chat import protocol
from v4_jax.chat.protocol import BOS, DSML, EOS, THINK_CLOSE, THINK_OPEN

DATA = Path(__file__).parents[1] / "data" / "encoding"
FIXTURES = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))
CASES = FIXTURES["parse"]
GOOD = [case for case in CASES if not case["is_error"]]

QUESTION = {"role": "user", "content": "question"}


def written_calls(*calls):
    """A tool-call block as the encoder writes it, from (name, arguments) pairs."""
    tool_calls = [{"type": "function", "function": {"name": name, "arguments": args}} for name, args in calls]
    message = {"role": "assistant", "content": "", "tool_calls": tool_calls}
    return chat.encode([message], context=[QUESTION]).removesuffix(EOS)


CALLS = written_calls(("f", {"t": "a b", "n": 3}), ("g", {}))
BLOCK = CALLS.removeprefix(protocol.SEPARATOR)


@pytest.mark.parametrize("case", CASES)
def test_cases(case):
    if case["is_error"]:
        with pytest.raises(chat.ParseError):
            chat.parse(case["text"], case["thinking_mode"])
    else:
        assert chat.parse(case["text"], case["thinking_mode"]) == case["expected"]


@pytest.mark.parametrize("case", FIXTURES["encode"])
def test_every_assistant_turn_comes_back(case):
    mode = case["thinking_mode"]
    for i, message in enumerate(case["messages"]):
        if message["role"] != "assistant":
            continue
        reply = chat.encode([message], context=case["messages"][:i], thinking_mode=mode)
        parsed = chat.parse(reply, mode)
        assert parsed["content"] == message["content"]
        assert parsed["reasoning_content"] == (message["reasoning_content"] if mode == "thinking" else "")
        calls = message.get("tool_calls", [])
        assert [c["function"]["name"] for c in parsed["tool_calls"]] == [c["function"]["name"] for c in calls]
        for ours, given in zip(parsed["tool_calls"], calls, strict=True):
            arguments = given["function"]["arguments"]
            wanted = {"arguments": arguments} if arguments == "not json" else json.loads(arguments)
            assert json.loads(ours["function"]["arguments"]) == wanted
        # And what was parsed is written again as it was.
        assert chat.encode([parsed], context=case["messages"][:i], thinking_mode=mode) == reply


def test_json_values_keep_the_models_spelling():
    text = CALLS.replace(">3<", ">1.50e+400<") + EOS
    assert '"n": 1.50e+400}' in chat.parse(text, "chat")["tool_calls"][0]["function"]["arguments"]


def test_a_call_without_parameters_needs_no_empty_line():
    text = written_calls(("g", {})).replace("\n\n<", "\n<").removeprefix("\n")
    assert text.count("\n\n") == 0
    calls = chat.parse_tool_calls(text)
    assert calls == [{"type": "function", "function": {"name": "g", "arguments": "{}"}}]


def test_think_tags_are_plain_text_inside_an_argument():
    text = written_calls(("f", {"file": THINK_OPEN + "x" + THINK_CLOSE})) + EOS
    arguments = chat.parse(text, "chat")["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {"file": THINK_OPEN + "x" + THINK_CLOSE}


def without(text, piece):
    assert piece in text
    return text.replace(piece, "", 1)


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("", "chat"),
        ("no end", "chat"),
        ("reasoning never closed" + EOS, "thinking"),
        ("reasoning" + THINK_CLOSE + "no end", "thinking"),
        ("reasoning" + CALLS + EOS, "thinking"),
        ("answer" + EOS + "more", "chat"),
        ("answer" + EOS + EOS, "chat"),
        *((f"an{token}swer" + EOS, "chat") for token in protocol.SPECIAL_TOKENS if token != EOS),
        ("rea" + THINK_OPEN + "soning" + THINK_CLOSE + "answer" + EOS, "thinking"),
        ("reasoning" + THINK_CLOSE + "ans" + THINK_CLOSE + "wer" + EOS, "thinking"),
        (BOS + "answer" + EOS, "chat"),
        (BLOCK + EOS, "chat"),  # no blank line before it
        (CALLS + "more" + EOS, "chat"),
        (CALLS + CALLS + EOS, "chat"),
        (CALLS.replace(">3<", ">three<") + EOS, "chat"),
        (CALLS.replace(">3<", ">NaN<") + EOS, "chat"),
        (CALLS.replace(">3<", ">" + "[" * 100_000 + "<") + EOS, "chat"),
        (CALLS.replace('"true"', '"maybe"') + EOS, "chat"),
        (CALLS.replace('name="n"', 'name="t"') + EOS, "chat"),
        (CALLS.replace('name="n"', "n") + EOS, "chat"),
        (CALLS.replace('name="f"', "f") + EOS, "chat"),
        *((without(CALLS, f"</{DSML}{tag}>") + EOS, "chat") for tag in ("parameter", "invoke", "tool_calls")),
        (written_calls(("f", {"t": f"</{DSML}other>"})) + EOS, "chat"),
    ],
)
def test_malformed_replies_raise(text, mode):
    with pytest.raises(chat.ParseError) as caught:
        chat.parse(text, mode)
    assert str(caught.value).count("\n") == 0


def test_every_cut_of_a_reply_raises():
    text = "why" + THINK_CLOSE + "answer" + CALLS + EOS
    chat.parse(text, "thinking")
    for end in range(len(text)):
        if text[:end] + EOS == text:  # a complete block, of which EOS was stripped
            assert chat.parse(text[:end], "thinking") == chat.parse(text, "thinking")
            continue
        with pytest.raises(chat.ParseError):
            chat.parse(text[:end], "thinking")


def test_unknown_mode():
    for make in (chat.StreamSplitter, lambda mode: chat.parse(EOS, mode)):
        with pytest.raises(ValueError, match="unknown thinking_mode 'fast'; legal modes are 'chat', 'thinking'"):
            make("fast")


def test_parse_tool_calls_wants_the_whole_block_alone():
    assert [c["function"]["name"] for c in chat.parse_tool_calls(BLOCK)] == ["f", "g"]
    for text in ("", CALLS, BLOCK[:-1], BLOCK + EOS):
        with pytest.raises(chat.ParseError):
            chat.parse_tool_calls(text)


# Streaming


def chunked(text, rng):
    """Cuts `text` in pieces of random length, some of them empty."""
    at = 0
    while at < len(text):
        length = rng.choice((0, 1, 1, 2, 3, 5, 8, 40))
        yield text[at : at + length]
        at += length


def split(pieces, mode):
    """Feeds all pieces; returns the text by kind, and checks that kinds come in order and never empty."""
    splitter = chat.StreamSplitter(mode)
    out = [pair for piece in pieces for pair in splitter.feed(piece)] + splitter.finish()
    kinds = ["reasoning", "content", "tool_calls"]
    order = [kinds.index(kind) for kind, _ in out]
    assert order == sorted(order)
    assert all(text for _, text in out)
    return {kind: "".join(text for k, text in out if k == kind) for kind in kinds}


def as_message(parts):
    calls = chat.parse_tool_calls(parts["tool_calls"]) if parts["tool_calls"] else []
    message = {"role": "assistant", "content": parts["content"], "reasoning_content": parts["reasoning"]}
    return {**message, "tool_calls": calls}


# Texts that come close to the markers without being them, besides the fixtures.
TRICKY = [
    ("a < b </ c" + EOS, "chat"),
    ("a\n\n\n\n" + EOS, "chat"),
    ("a\n\n<" + EOS, "chat"),
    ("a\n" + CALLS + EOS, "chat"),
    (CALLS + EOS, "chat"),
    ("x" + EOS[:-1] + EOS, "chat"),
    (EOS, "chat"),
    (THINK_CLOSE[:-1] + THINK_CLOSE + THINK_CLOSE[:-1] + EOS, "thinking"),
    ("r\n\n" + THINK_CLOSE + CALLS + EOS, "thinking"),
    (THINK_CLOSE + EOS, "thinking"),
]
STREAMS = [(case["text"], case["thinking_mode"]) for case in GOOD] + TRICKY


@pytest.mark.parametrize("with_eos", [True, False])
@pytest.mark.parametrize(("text", "mode"), STREAMS)
def test_splitter_agrees_with_parse(text, mode, with_eos):
    expected = chat.parse(text, mode)
    text = text if with_eos else text.removesuffix(EOS)
    assert as_message(split([text], mode)) == expected
    assert as_message(split(text, mode)) == expected
    for seed in range(30):
        assert as_message(split(chunked(text, random.Random(seed)), mode)) == expected


@pytest.mark.parametrize(("text", "mode"), STREAMS)
def test_nothing_is_ever_taken_back(text, mode):
    """At any moment, what was shown is the beginning of what is shown in the end: no half marker slips out."""
    final = split([text], mode)
    splitter, shown = chat.StreamSplitter(mode), dict.fromkeys(final, "")
    for character in text:
        for kind, piece in splitter.feed(character):
            shown[kind] += piece
            assert final[kind].startswith(shown[kind])
    assert splitter.ended
    assert splitter.finish() == []


def test_only_a_possible_marker_waits():
    splitter = chat.StreamSplitter("chat")
    assert splitter.feed("hello") == [("content", "hello")]
    assert splitter.feed(" <") == [("content", " ")]
    assert splitter.feed("b>\n") == [("content", "<b>")]
    assert splitter.feed("\n") == []
    assert splitter.feed("x") == [("content", "\n\nx")]


def test_one_piece_may_hold_everything():
    text = "why" + THINK_CLOSE + "answer" + CALLS + EOS + "ignored"
    splitter = chat.StreamSplitter("thinking")
    assert splitter.feed(text) == [("reasoning", "why"), ("content", "answer"), ("tool_calls", BLOCK)]
    assert splitter.ended
    assert splitter.feed("ignored") == []


def test_cut_and_malformed_replies_are_shown():
    assert split("thinking still", "thinking")["reasoning"] == "thinking still"
    assert split("thinking" + EOS, "thinking") == {"reasoning": "thinking", "content": "", "tool_calls": ""}
    assert split("a" + THINK_CLOSE + "b", "chat")["content"] == "a" + THINK_CLOSE + "b"
    for length in range(1, len(BLOCK)):
        parts = split("answer" + protocol.SEPARATOR + BLOCK[:length], "chat")
        if DSML in BLOCK[:length]:
            assert parts["content"] == "answer"
            assert parts["tool_calls"] == BLOCK[:length]
            with pytest.raises(chat.ParseError):
                chat.parse_tool_calls(parts["tool_calls"])
        else:
            assert parts["content"] + parts["tool_calls"] == "answer" + protocol.SEPARATOR + BLOCK[:length]
