"""`v4-jax chat`: what the model reads is the conversation as the encoding has it, whatever comes in between."""

import dataclasses
import json
import os
import signal

import pytest

from tests.infer.serving import Scripted
from v4_jax import Config, chat
from v4_jax.chat import EOS
from v4_jax.commands.shared.console import CommandError
from v4_jax.commands.shared.contexts import context_of
from v4_jax.commands.shared.engines import EngineOptions
from v4_jax.infer.openai.completions import Model
from v4_jax.tokenizer import load_tokenizer

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": "1"}'}}]


class Talks(Scripted):
    """An engine that says what it is told to; Ctrl-C comes before its token of some number, counted over all turns."""

    acceptance = ()

    def __init__(self, model, *says, interrupts=()):
        super().__init__(model, *says)
        self._interrupts, self._said = interrupts, 0

    def compile(self):
        pass

    def run(self, each_round=lambda: None):
        while not self.idle:
            each_round()
            for _ in range(self._interrupts.count(self._said)):
                os.kill(os.getpid(), signal.SIGINT)
            self._said += 1
            yield from self.round()


@pytest.fixture
def talk(run, model, monkeypatch, tmp_path):
    """Chats with an engine that says what it is told to: what came, and the prompts as text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = Config.from_hf(model)
    served = Model("x", config, load_tokenizer(model, config.vocab_size), None, 1024, 1)

    def call(lines, *says, options=(), **scripted):
        engine = Talks(served, *says, **scripted)
        monkeypatch.setattr(EngineOptions, "build", lambda *_, **__: engine)
        result = run("chat", model, *options, stdin="".join(f"{line}\n" for line in lines))
        assert "Traceback" not in result.err
        return result, [served.tokenizer.decode(request.prompt) for request in engine.asked]

    return call


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def test_turns(talk, tmp_path):
    """Reasoning stays within its turn, modes and the system's message change between turns."""
    lines = (
        "one",
        "/mode high",
        "two\\",
        "lines",
        "/system Be brief.",
        "",
        "three",
        f"/save {tmp_path}/c.json",
        "/quit",
        "no",
    )
    thought = f"why</think>because{EOS}"
    result, prompts = talk(lines, f"first{EOS}", thought, f"so</think>third{EOS}")
    assert result.code == 0 and result.err.count("prefill ") == 3, result.err
    assert result.out == "first\nReasoning:\nwhy\n\nAnswer:\nbecause\nReasoning:\nso\n\nAnswer:\nthird\n"
    before = [user("one"), said("first"), user("two\nlines")]
    assert prompts[0] == chat.encode(before[:1])
    assert prompts[1] == chat.encode(before, thinking_mode="thinking", reasoning_effort="high")
    system = {"role": "system", "content": "Be brief."}
    whole = [system, *before, said("because", reasoning_content="why"), user("three")]
    assert prompts[2] == chat.encode(whole, thinking_mode="thinking", reasoning_effort="high")
    assert "why" not in prompts[2]
    assert json.loads((tmp_path / "c.json").read_text()) == {
        "messages": [*whole, said("third", reasoning_content="so")]
    }
    more, prompts = talk(("four",), f"last{EOS}", options=("--chat", tmp_path / "c.json", "--quiet"))
    assert more.out == "last\n" and more.err == ""
    assert prompts == [chat.encode([*whole, said("third"), user("four")])]
    (tmp_path / "c.json").write_text(json.dumps([user("asked")]))
    more, prompts = talk((), f"at once{EOS}", options=("--chat", tmp_path / "c.json"))
    assert more.out == "at once\n" and prompts == [chat.encode([user("asked")])]


def test_tools(talk, tmp_path):
    """Calls are shown apart, and the lines that follow are their results; reasoning is kept where there are tools."""
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    how = {"thinking_mode": "thinking", "tools": TOOLS}
    call = chat.encode([said("", reasoning_content="hm", tool_calls=CALL)], context=[user("go")], **how)
    options = ("--tools", tmp_path / "tools.json", "--mode", "high")
    result, prompts = talk(
        ("go", "42", "thanks"), call, f"so</think>It is 42{EOS}", f"</think>Yes{EOS}", options=options
    )
    assert result.out.startswith("Reasoning:\nhm\n\nTool calls:\n<") and "\nAnswer:\nIt is 42\n" in result.out
    turn = [user("go"), said("", reasoning_content="hm", tool_calls=CALL), {"role": "tool", "content": "42"}]
    turn[2]["tool_call_id"] = "a"
    assert prompts[1] == chat.encode(turn, **how)
    assert prompts[2] == chat.encode([*turn, said("It is 42", reasoning_content="so"), user("thanks")], **how)


def test_an_answer_that_is_not_well_formed_is_said_to_be(talk):
    result, prompts = talk(("a", "b"), f"x</think>y{EOS}", f"z{EOS}")
    assert "note: the answer is not well formed" in result.err and result.err.count("well formed") == 1
    assert prompts[1] == chat.encode([user("a"), said("x</think>y"), user("b")])


def test_interrupt(talk):
    """Stops the answer, whose beginning is kept, and not the chat; before anything was said nothing is kept."""
    result, prompts = talk(("a", "b"), f"abcdef{EOS}", f"ok{EOS}", interrupts=(3,))
    assert result.code == 0 and result.out == "abcd\nok\n" and "ended by interrupt" in result.err
    assert prompts[1] == chat.encode([user("a"), said("abcd"), user("b")])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    result, _ = talk(("a",), f"abcdef{EOS}", interrupts=(2, 2))
    assert result.code == 130  # twice


def test_interrupt_while_the_prompt_is_read(talk, monkeypatch):
    def never_reads(self, each_round=lambda: None):
        if len(self.asked) == 1:
            while not self.idle:
                os.kill(os.getpid(), signal.SIGINT)
                each_round()
        while not self.idle:
            yield from self.round()

    monkeypatch.setattr(Talks, "run", never_reads)
    result, prompts = talk(("a", "b"), f"never{EOS}", f"ok{EOS}")
    assert result.out == "ok\n" and "your message is not kept" in result.err
    assert prompts[1] == chat.encode([user("b")])


def test_files_and_commands(talk, tmp_path):
    (tmp_path / "a b.txt").write_text("text of it\n")
    lines = (f"/file {tmp_path}/a b.txt", "What is it?", "//slash", "/reset", "/mode", "/mode deep", "/file nowhere")
    lines += ("/what", "/help", f"/save {tmp_path}/no/such", "/save", "last")
    result, prompts = talk(lines, *(f"{number}{EOS}" for number in range(3)), options=("--system", "Be."))
    assert result.out == "0\n1\n2\n"
    system = {"role": "system", "content": "Be."}
    file = "[file name]: a b.txt\n[file content begin]\ntext of it\n\n[file content end]\nWhat is it?"
    assert prompts[1] == chat.encode([system, user(file), said("0"), user("/slash")])
    assert prompts[2] == chat.encode([system, user("last")])
    for sentence in (
        "11 characters, in front of your next message",
        "mode non-think",
        "there is no mode 'deep'; expected one of non-think, low, high, max",
        "nowhere cannot be read: No such file",
        "there is no /what; expected one of /system, ",
        "  /reset          forgets the conversation",
        "No such file or directory",
        "/save wants the name",
    ):
        assert sentence in result.err, sentence


def test_a_conversation_that_has_no_room(talk):
    result, prompts = talk(("a", "x" * 100, "b"), f"1{EOS}", f"2{EOS}", options=("--context", "64"))
    assert result.out == "1\n2\n" and "not sent: the conversation has " in result.err and "/reset" in result.err
    assert prompts[1] == chat.encode([user("a"), said("1"), user("b")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"role": "wizard", "content": "x"}]', "role 'wizard'"),
        ("{", "is not JSON"),
        ('{"x": 1}', "has the keys ['x']"),
    ],
)
def test_bad_input(talk, tmp_path, content, message):
    file = tmp_path / "chat.json"
    file.write_text(content)
    result, _ = talk(("a",), options=("--chat", file))
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1) and message in result.err
    file.write_text('[{"function": 1}]')
    assert talk(("a",), options=("--tools", file))[0].code == 2


def test_the_same_as_generate(run, model, tmp_path):
    """With the model itself: the answers of generate, and what was read of the conversation is not read again."""
    options = ("--policy", "float32", "--greedy", "--max-tokens", "4")
    lines = f"{'long ' * 60}\n/save {tmp_path}/1\nmore\n/save {tmp_path}/2\n"
    result = run("chat", model, *options, "--context", "1K", "--slots", "2", "--prefix-windows", "256", stdin=lines)
    assert result.code == 0 and " after 256 cached ones" in result.err, result.err
    second = json.loads((tmp_path / "2").read_text())["messages"]
    answers = []
    for turn in (second[:1], second[:3]):
        (tmp_path / "asked").write_text(json.dumps(turn))
        answers.append(run("generate", model, *options, "--prefill-chunk", "16", "--chat", tmp_path / "asked").out)
    assert result.out == "".join(answers)


def test_the_context_of_a_short_model():
    short = dataclasses.replace(Config.tiny(), max_position_embeddings=4096)
    assert (context_of(short, None), context_of(Config.flash(), None)) == (4096, 32768)
    assert context_of(short, 2048) == 2048
    with pytest.raises(CommandError, match="--context 32K is more than the model's 4K tokens"):
        context_of(short, 32768)  # also where that is what others get by default
