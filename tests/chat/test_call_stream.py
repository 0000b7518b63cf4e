"""Calls followed while they are written: joined, they are what the parser reads of the whole."""

import json
import random

import pytest

from tests.chat.test_recovery import BAD, NOT_TEXT, F, block, invoke, parameter
from v4_jax import chat
from v4_jax.chat.protocol import DSML, EOS

VALUES = ["", "plain", 'quotes " and \\', "lines\n\ttabs\r", "é 中文 🎉", f"</{DSML[:2]} <", "</", "\x00\u2028"]
WRITTEN = ["1", "-2.5e3", "true", "null", '[1, {"a": [2]}]', '{"x": "</y>"}', '"text"', "1.0000000000000000001"]
BLOCKS = [
    block(F),
    block(invoke("f"), invoke("g", parameter("a", "b"))),
    block(invoke("many", *(parameter(f"p{n}", value) for n, value in enumerate(VALUES)))),
    block(invoke("many", *(parameter(f"p{n}", value, NOT_TEXT) for n, value in enumerate(WRITTEN))), F),
]


def followed(block, cuts):
    """The calls of a block fed in pieces: (name, arguments), and what was said piece by piece."""
    stream, calls, said = chat.CallStream(), [], []
    for begin, end in zip([0, *cuts], [*cuts, len(block)], strict=True):
        deltas = stream.feed(block[begin:end])
        said.append(deltas)
        for delta in deltas:
            if delta.name is not None:
                assert delta.number == len(calls)
                calls.append([delta.name, ""])
            calls[delta.number][1] += delta.arguments
    return calls, said, stream


def whole(block):
    return [[call["function"]["name"], call["function"]["arguments"]] for call in chat.parse_tool_calls(block)]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_joined_it_is_what_the_parser_reads(block):
    expected, dice = whole(block), random.Random(0)
    for cuts in ([], list(range(1, len(block))), *(sorted(dice.sample(range(1, len(block)), 5)) for _ in range(50))):
        calls, _, stream = followed(block, cuts)
        assert calls == expected and stream.complete == len(expected) and not stream.unread
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


def test_text_comes_as_it_is_written():
    """A character late where it may be the beginning of a tag, and no later."""
    text = block(invoke("f", parameter("x", "a<b</c" * 20)))
    _, said, _ = followed(text, list(range(1, len(text))))
    name = text.index('">') + 2
    assert [delta.name for deltas in said[:name] for delta in deltas] == ["f"]
    begun = text.index("a<b")
    for at in range(begun, begun + 100):
        written = "".join(delta.arguments for deltas in said[: at + 1] for delta in deltas)
        assert len(json.dumps({"x": text[begun : at + 1]})) - 2 - len(written) <= len("</")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (BAD, ""),
        (invoke("f", parameter("x", "a"), parameter("x", "b")), '{"x": "a"'),
        (invoke("f", parameter("x", "a")).replace("\n", ""), ""),
        (invoke("f", parameter("x", f"a{EOS}b")), '{"x": "a'),
        (invoke("f", parameter("x", "a", "")), ""),
        (invoke("f", parameter("x", f"a <{DSML}parameter")), '{"x": "a <'),
    ],
)
def test_where_a_block_departs_nothing_more_is_said(call, said):
    text = block(call, F)
    [[_, last]], _, _ = followed(text, list(range(1, len(text))))
    [[_, at_once]], _, _ = followed(text, [])
    assert last == said and said.startswith(at_once.removesuffix('"x": "'))
