"""Text stops exactly before a stop string, however the tokens cut it."""

import itertools

import pytest

from v4_jax.infer.text import StoppingText
from v4_jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(320)


def run(text, stops):
    stopping = StoppingText(TOKENIZER, stops)
    pieces = [stopping.push(token) for token in TOKENIZER.encode(text)]
    return [*pieces, stopping.flush()], stopping.stopped


@pytest.mark.parametrize(
    ("text", "stops", "expected", "stopped"),
    [
        ("no stop at all", (), "no stop at all", False),
        ("one two three", ("two",), "one ", True),
        ("aabaabaac", ("aabaac",), "aab", True),
        ("one tw", ("two",), "one tw", False),
        ("x\n\ny", ("\n\n", "y"), "x", True),
        ("xyz", ("z", "yz"), "x", True),
        ("ends in 文字 here", ("字 ",), "ends in 文", True),
        ("two", ("two",), "", True),
    ],
)
def test_stops(text, stops, expected, stopped):
    pieces, found = run(text, stops)
    assert "".join(pieces) == expected and found == stopped


def test_no_piece_shows_part_of_a_stop_string():
    stops = ("abab", "bbb")
    for text in map("".join, itertools.product("ab", repeat=7)):
        pieces, stopped = run(text, stops)
        # The text ends where the first stop string to be complete begins.
        found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
        assert stopped == bool(found)
        assert "".join(pieces) == (text[: min(found)[1]] if found else text)


def test_text_comes_as_soon_as_it_is_certain():
    pieces, _ = run("hello", ("xyz",))
    assert pieces == [*"hello", ""]


def test_pushes_after_the_end_are_ignored():
    stopping = StoppingText(TOKENIZER, ("b",))
    assert [stopping.push(token) for token in TOKENIZER.encode("abcd")] == ["a", "", "", ""]
    assert stopping.flush() == ""


def test_an_empty_stop_string():
    with pytest.raises(ValueError, match="empty"):
        StoppingText(TOKENIZER, ("a", ""))
