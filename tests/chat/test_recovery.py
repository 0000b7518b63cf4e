"""Tool calls that are slightly off: recovered where they can mean one thing only, and never as markup in the answer."""

import json

import pytest

from v4_jax import chat
from v4_jax.chat.protocol import DSML, EOS

OPEN, CLOSE = f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"


def parameter(name, value, mark=' string="true"'):
    return f'<{DSML}parameter name="{name}"{mark}>{value}</{DSML}parameter>'


def invoke(name, *parameters):
    return f'<{DSML}invoke name="{name}">\n' + "\n".join(parameters) + f"\n</{DSML}invoke>"


def block(*calls, end=CLOSE):
    return f"{OPEN}\n" + "\n".join(calls) + f"\n{end}"


F, G = invoke("f", parameter("x", "hi")), invoke("g", parameter("x", "ho"))
HI, HO = ("f", {"x": "hi"}), ("g", {"x": "ho"})
NOT_TEXT = ' string="false"'
BAD = invoke("h", parameter("x", "NaN", NOT_TEXT))  # a number or a word


def read(text):
    """Splits a reply and reads its calls: (content, calls, what was not read)."""
    splitter = chat.StreamSplitter("chat")
    pieces = [piece for character in text for piece in splitter.feed(character)] + splitter.finish()
    parts = {kind: "".join(piece for one, piece in pieces if one == kind) for kind, _ in pieces}
    found = chat.read_tool_calls(parts.get("tool_calls", ""))
    calls = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in found.calls]
    return parts.get("content", "") + found.text, calls, found.unparsed


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"\n\n{block(F)}", "", [HI]),
        (f"Look.{block(F)}", "Look.", [HI]),
        (f"Look.\n{block(F)}", "Look.", [HI]),
        (block(F), "", [HI]),
        (f"Look.\n\n{block(F)} \n", "Look.", [HI]),
        (f"\n\n{block(F)}\n\nDone.", "Done.", [HI]),
        (f"\n\n{block(F)}\n\n{block(G)}", "", [HI, HO]),
        (f"\n\n{block(F + chr(10), G)}", "", [HI, HO]),
        (f"\n\n{OPEN}\n{F}{G}\n{CLOSE}", "", [HI, HO]),
        (block(F).replace("\n", ""), "", [HI]),
        (block(F.replace("\n<", "\n  <")), "", [HI]),
        (block(F.replace('"f"', "'f'")), "", [HI]),
        (block(f'<{DSML}invoke name="f"></{DSML}invoke>'), "", [("f", {})]),
        (block(F, G, end=""), "", [HI, HO]),
        (block(F).replace("tool_calls", "toolcalls"), "", [HI]),
        (block(F).replace("tool_calls", "function_calls"), "", [HI]),
        (f"\n\n{F}\n{CLOSE}", "", [HI]),
        (f"Look.\n\n{F}", "Look.", [HI]),
        (block(invoke("f", parameter("x", "Paris", NOT_TEXT))), "", [("f", {"x": "Paris"})]),
        (block(invoke("f", parameter("x", "True", NOT_TEXT))), "", [("f", {"x": True})]),
        (block(invoke("f", parameter("x", "None", NOT_TEXT))), "", [("f", {"x": None})]),
        (block(invoke("f", parameter("x", "hi", ""))), "", [HI]),
        (block(invoke("f", parameter("x", "cat <<EOF\n<a></a>\n</parameter>"))), "", None),
    ],
)
def test_what_can_mean_one_thing_only_is_taken_for_it(text, content, calls):
    for end in ("", EOS):
        found = read(text + end)
        assert found[0] == content and found[2] == ""
        assert found[1] == calls if calls else found[1][0][1]["x"].endswith("</parameter>")


@pytest.mark.parametrize(
    "bad",
    [
        BAD,
        invoke("h", parameter("x", "[1,", NOT_TEXT)),
        invoke("h", parameter("x", "3", "")),
        invoke("h", parameter("x", "1"), parameter("x", "2")),
        invoke("h", parameter("x", "1", ' string="maybe"')),
        invoke("h", "what"),
        invoke("h", parameter("x", "1").replace(f"</{DSML}parameter>", "")),
        invoke("h", parameter("x", "1")).replace(f"</{DSML}invoke>", ""),
    ],
)
def test_one_bad_call_does_not_lose_its_neighbours(bad):
    content, calls, unparsed = read(f"Look.\n\n{block(F, bad, G)}")
    assert (content, calls) == ("Look.", [HI, HO]) and unparsed == bad.strip()
    assert read(block(bad)) == ("", [], block(bad))  # alone, it stays as it was


def test_what_was_cut_short_is_not_guessed():
    whole = block(F, G)
    for end in range(len(OPEN), len(whole)):
        content, calls, unparsed = read(f"Look.\n\n{whole[:end]}")
        assert content == "Look." and calls == [HI, HO][: len(calls)]
        assert len(calls) == (F in whole[:end]) + (G in whole[:end])
        assert F not in unparsed if calls else unparsed == whole[:end]
