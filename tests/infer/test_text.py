"""Text stops exactly before a stop string, however the tokens cut it."""

import itertools

import pytest

from v4_jax import chat
from v4_jax.chat.protocol import SEPARATOR, THINK_CLOSE
from v4_jax.infer.text import Reply, StopStrings
from v4_jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(320)
CALLS = chat.begin_tool_call("f") + "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"


def run(text, stops):
    stopping = StopStrings(stops)
    pieces = [stopping.feed(piece) for piece in text]
    return [*pieces, stopping.flush()], stopping.stopped


def reply(text, stops=(), mode="chat", **options):
    """A reply to the end, whose pieces are its text."""
    made = Reply(TOKENIZER, stops, mode, **options)
    pieces = [piece for token in TOKENIZER.encode(text) for piece in made.push(token)] + made.finish()
    assert all(piece for _, piece in pieces)
    for kind in {kind for kind, _ in pieces}:
        assert "".join(piece for one, piece in pieces if one == kind) == made.text[kind]
    return made


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
    stopping = StopStrings(("b",))
    assert [stopping.feed(piece) for piece in "abcd"] == ["a", "", "", ""]
    assert stopping.flush() == ""


def test_an_empty_stop_string():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(("a", ""))


def test_stop_strings_look_at_the_answer_alone():
    """Not at reasoning, not at the blank line before a call, not at what a call says."""
    thought = reply(f"to stop or not{THINK_CLOSE}go on, stop here", ("stop",), "thinking")
    assert thought.stopped and thought.message() == {"content": "go on, ", "reasoning_content": "to stop or not"}
    for stop in (SEPARATOR, "\n", "f", "tool", "invoke"):
        called = reply("Look." + CALLS, (stop,))
        assert not called.stopped and called.message()["content"] == "Look."
        assert [call["function"]["name"] for call in called.message()["tool_calls"]] == ["f"]
    assert reply("a\n\nb" + CALLS, (SEPARATOR,)).message() == {"content": "a"}
    held = reply("one tw" + CALLS, ("two",))  # what might have begun a stop string is content after all
    assert held.message()["content"] == "one tw" and "tool_calls" in held.message()
    assert reply("half a character é and stop", ("stop",), None).message() == {"content": "half a character é and "}


def test_ids_of_calls_follow_from_where_they_are():
    two = CALLS + CALLS
    ids = [call["id"] for origin in (b"a", b"b") for call in reply(two, origin=origin).message()["tool_calls"]]
    assert len(set(ids)) == 4 and ids[:2] == [call["id"] for call in reply(two, origin=b"a").message()["tool_calls"]]


def test_what_is_said_after_calls_is_content():
    made = reply("Look." + CALLS + "\n\nDone.")
    assert made.message()["content"] == "Look.\n\nDone." and len(made.message()["tool_calls"]) == 1
    assert reply(CALLS + " Done.", ("one",)).message()["content"] == "D"
