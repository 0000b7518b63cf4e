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


def streamed(text, **options):
    """What a stream says of a reply's calls: joined, and how many pieces came before the end; and the reply."""
    made, calls, early = Reply(TOKENIZER, (), "chat", b"", **options), {}, 0

    def take(final):
        pieces = made.take_calls(final=final)
        for piece in pieces:
            name, arguments, id = calls.get(piece.number, (piece.name, "", piece.id))
            assert (piece.name is None) == (piece.number in calls) and id == piece.id
            calls[piece.number] = name, arguments + piece.arguments, id
        return len(pieces)

    for token in TOKENIZER.encode(text):
        made.push(token)
        early += take(final=False)
    made.finish()
    take(final=True)
    return [calls[number] for number in sorted(calls)], early, made


def parameter(name, value):
    return f'<｜DSML｜parameter name="{name}" string="true">{value}</｜DSML｜parameter>\n'


def another(name):
    """How a call begins that is not the first one."""
    return chat.begin_tool_call(name).strip().split("\n")[-1] + "\n"


ENDS = "</｜DSML｜invoke>\n", "</｜DSML｜tool_calls>"


@pytest.mark.parametrize(
    ("text", "early"),
    [
        (chat.begin_tool_call("f") + parameter("x", "a long text") + ENDS[0] + ENDS[1], True),
        (chat.begin_tool_call("f") + parameter("x", "a") + ENDS[0], True),  # without its outer end
        (chat.begin_tool_call("f") + parameter("x", "a").strip() + parameter("y", "b") + ENDS[0] + ENDS[1], True),
        (chat.begin_tool_call("f").replace('"f"', "'f'") + parameter("x", "a") + ENDS[0] + ENDS[1], False),
        (CALLS.replace("tool_calls", "function_calls"), False),
        (CALLS + CALLS, True),
    ],
)
def test_a_stream_says_of_calls_what_the_message_has(text, early):
    """Early where a call is written as the format has it, and at the end where it was read leniently."""
    said, pieces, made = streamed("Look." + text)
    calls = made.message()["tool_calls"]
    assert said == [(call["function"]["name"], call["function"]["arguments"], call["id"]) for call in calls]
    assert bool(pieces) == early


def test_a_call_that_cannot_be_read_after_all_leaves_the_others_their_places():
    twice = parameter("x", "a") * 2
    said, _, made = streamed(
        chat.begin_tool_call("f")
        + twice
        + ENDS[0]
        + chat.begin_tool_call("g").split("\n")[-2]
        + "\n"
        + ENDS[0]
        + ENDS[1]
    )
    assert [call[:2] for call in said] == [("f", '{"x": "a"'), ("g", "{}")] and len({id for *_, id in said}) == 2
    assert [call["function"]["name"] for call in made.message()["tool_calls"]] == ["g"]
    assert "parameter" in made.message()["unparsed_tool_calls"]


def test_one_call_may_be_all():
    invoke = another("f") + parameter("x", "a") + ENDS[0]
    two = chat.begin_tool_call("f") + parameter("x", "a") + ENDS[0] + invoke + ENDS[1]
    assert len(streamed("Look." + two)[2].message()["tool_calls"]) == 2
    said, _, made = streamed("Look." + two, one_call=True)
    assert made.stopped and len(said) == 1 and made.message().keys() == {"content", "tool_calls"}
    assert made.message()["content"] == "Look." and len(made.message()["tool_calls"]) == 1
    lenient = two.replace("tool_calls", "function_calls")  # which is not followed, and read to its end
    said, _, made = streamed(lenient, one_call=True)
    assert not made.stopped and len(said) == len(made.message()["tool_calls"]) == 1
