"""A reply's kinds are told apart, on a terminal by style, elsewhere by headings, and never harm the terminal."""

import io

import pytest

from v4_jax import chat
from v4_jax.chat import protocol
from v4_jax.commands.shared.console import printable
from v4_jax.commands.shared.reply import Writer
from v4_jax.infer.text import Reply
from v4_jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(320)
TEXT = f"thinking{protocol.THINK_CLOSE}said 文字"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def write(text, file, *, mode="thinking", stops=(), **options):
    reply, writer = Reply(TOKENIZER, stops, mode), Writer(file, **options)
    for token in TOKENIZER.encode(text):
        writer.write(reply.push(token))
    writer.write(reply.finish())
    writer.finish()
    return file.getvalue(), reply


def test_only_the_answer():
    shown, reply = write(TEXT, io.StringIO(), show_reasoning=False, headings=False)
    assert shown == "said 文字\n"
    assert reply.text == {"reasoning": "thinking", "content": "said 文字"}


def test_headings():
    shown, _ = write(TEXT, io.StringIO(), show_reasoning=True, headings=True)
    assert shown == "Reasoning:\nthinking\n\nAnswer:\nsaid 文字\n"


def test_styles_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown, _ = write(TEXT, Terminal(), show_reasoning=True, headings=False)
    dim, plain = shown.split("\n\n")
    assert dim.count("\x1b[2m") == len("thinking") and dim.endswith("\x1b[0m")
    assert plain == "said 文字\n"


def test_tool_calls_are_a_kind_of_their_own():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [call]}]
    text = chat.encode(messages).split(protocol.THINK_CLOSE)[1]
    shown, reply = write(text, io.StringIO(), mode="chat", show_reasoning=False, headings=True)
    assert reply.text["content"] == "a"
    assert chat.parse_tool_calls(reply.text["tool_calls"]) == [call]
    assert shown.startswith("Answer:\na\n\nTool calls:\n")


def test_plain_text_is_not_split():
    _, reply = write(TEXT, io.StringIO(), mode=None, show_reasoning=False, headings=False)
    assert reply.text == {"content": TEXT}


def test_stop_strings_count_in_the_answer_alone():
    _, reply = write(TEXT, io.StringIO(), stops=("ink", "id"), show_reasoning=False, headings=False)
    assert reply.stopped and reply.text == {"reasoning": "thinking", "content": "sa"}


@pytest.mark.parametrize(("file", "safe"), [(Terminal(), False), (io.StringIO(), True)])
def test_control_characters_do_not_reach_a_terminal(file, safe):
    shown, _ = write("a\x1b[2Jb\x07\nc\n", file, mode=None, show_reasoning=False, headings=False, safe=safe)
    assert shown == "a\ufffd[2Jb\ufffd\nc\n"


def test_they_do_reach_a_file():
    shown, _ = write("a\x1bb", io.StringIO(), mode=None, show_reasoning=False, headings=False)
    assert shown == "a\x1bb\n"


def test_printable():
    every = "".join(map(chr, range(256)))
    shown = printable(every)
    assert len(shown) == 256
    assert [i for i, c in enumerate(shown) if c == "\ufffd"] == [*range(9), *range(11, 32), *range(127, 160)]
