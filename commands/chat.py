"""`v4-jax chat`: a conversation at the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from v4_jax.chat import EOS, EffortProfile, Mode, ParseError, parse
from v4_jax.commands.shared.chat_files import read_chat, write_chat
from v4_jax.commands.shared.compilation_cache import user_directory
from v4_jax.commands.shared.console import CommandError, bad_input, read_json, read_text, say
from v4_jax.commands.shared.contexts import check_mode, context_of
from v4_jax.commands.shared.engines import EngineOptions, PrefixOptions
from v4_jax.commands.shared.models import ModelDirectory
from v4_jax.commands.shared.options import (
    ChatFile,
    Flag,
    Int,
    Model,
    OptionalFile,
    OptionalSize,
    OptionalText,
    Profile,
)
from v4_jax.commands.shared.reply import Writer
from v4_jax.commands.shared.sampling import SamplingOptions
from v4_jax.commands.shared.streaming import interruptible, stream
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.prompts import Prompt, chat_prompt
from v4_jax.infer.text import Reply
from v4_jax.tokenizer import Tokenizer

HISTORY, MOST_LINES = "chat_history", 1000

# How the release puts a file in front of a question about it.
_FILE = "[file name]: {name}\n[file content begin]\n{text}\n[file content end]\n"

COMMANDS = {
    "/system [TEXT]": "what the model is told before everything; without TEXT nothing",
    "/file PATH": "puts a text file in front of your next message",
    "/mode [MODE]": f"how it answers: {', '.join(get_args(Mode))}; without MODE says which",
    "/save PATH": "writes the conversation, which --chat PATH goes on with",
    "/reset": "forgets the conversation, but not what /system says",
    "/help": "this list",
    "/quit": "leaves, as Ctrl-D does",
}


def chat(
    model: Model,
    *,
    system: OptionalText = None,
    chat_file: ChatFile = None,
    tools: OptionalFile = None,
    mode: Mode = "non-think",
    effort_profile: Profile = "auto",
    max_tokens: OptionalSize = None,
    context: OptionalSize = None,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
    seed: Int = 0,
    no_history: Flag = False,
    quiet: Flag = False,
    engine: EngineOptions = EngineOptions(slots=1, prefix=PrefixOptions(prefix_memory=1 << 30)),  # noqa: B008 (frozen)
) -> None:
    """Talks with a model: what you write is answered as it comes, and what was said stays in mind.

    A line is a message, and one that ends in a backslash goes on with the next line. Ctrl-C stops an answer, of which
    the conversation keeps what was said; Ctrl-D leaves. /help lists what else a line may say. What is read once of a
    conversation is not read again in its next turn.

    Reasoning is dim on a terminal, and calls of tools are coloured; elsewhere both stand under headings. Reasoning
    before the last question is forgotten, as the release does, unless there are tools. Where the model calls tools, the
    next lines are their results. Answers go to stdout, everything else to stderr; messages may be piped in.

    Examples:
      v4-jax chat DeepSeek-V4-Flash --mode high
      v4-jax chat DeepSeek-V4-Flash --system "Be brief." --context 128K
      v4-jax chat DeepSeek-V4-Flash --chat saved.json
      printf 'Why is the sky blue?\\nAnd at dusk?\\n' | v4-jax chat DeepSeek-V4-Flash

    Args:
      model: A directory with a released model, or one made by convert.
      system: What the model is told before everything.
      chat_file: A conversation to go on with, as generate takes it and /save writes it.
      tools: A JSON file with a list of tools in OpenAI's form, which the model may call.
      mode: How it answers: at once, or after reasoning with little, high or the most effort.
      effort_profile: What the model takes its reasoning efforts for: preview, official (Flash-0731, Pro-0813), or auto,
        which its own encoding says.
      max_tokens: Most tokens of an answer. Default: what the context leaves.
      context: Most tokens of the whole conversation. Default: 32K, or what the model has.
      sampling: How tokens are chosen.
      seed: The same seed gives the same answers.
      no_history: Do not keep lines for the arrow keys of the next chat.
      quiet: No line on speed after an answer.
      engine: How answers are generated.
    """
    directory = ModelDirectory.open(model)
    engine.check(directory)
    config, tokenizer, release = directory.config, directory.tokenizer(), directory.generation_defaults()
    length = context_of(config, context)
    conversation = Conversation(tokenizer, directory.effort_profile(effort_profile), mode, length)
    if chat_file is not None:
        conversation.load(chat_file)
    if tools is not None:
        conversation.options["tools"] = read_json(tools)
    if system is not None:
        conversation.system(system)
    with bad_input():
        chosen = sampling.over(release, seed)
        conversation.prompt([] if conversation.asks else [{"role": "user", "content": "?"}])  # refused here, if at all
    check_mode(mode, length, conversation.profile)
    running = engine.build(directory, length, most=1)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        say("Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands.")
    with _history(terminal, kept=not no_history):
        Session(running, conversation, chosen, release.stop_ids, max_tokens, quiet, terminal).run()
    running.close()


@dataclasses.dataclass
class Conversation:
    """What was said, and how the model is to answer.

    Attributes:
      tokenizer: the model's.
      profile: what it takes its efforts for.
      mode: how it answers.
      context: most tokens of everything.
      messages: so far, as `generate --chat` takes them.
      options: of the encoding: "tools", "response_format".
      files: texts in front of the next message.
    """

    tokenizer: Tokenizer
    profile: EffortProfile
    mode: Mode
    context: int
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: list[str] = dataclasses.field(default_factory=list)

    def load(self, path: Path) -> None:
        """Goes on with a file's conversation."""
        self.messages, self.options = read_chat(path)

    def system(self, text: str) -> None:
        """Sets the first message; "" removes it."""
        if self.messages and self.messages[0].get("role") == "system":
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def reset(self) -> None:
        """Forgets everything but the system's message."""
        self.messages = [one for one in self.messages[:1] if one.get("role") == "system"]
        self.files.clear()

    @property
    def asks(self) -> bool:
        """Whether an answer comes next, as in a file that ends with a question."""
        return bool(self.messages) and self.messages[-1].get("role") in ("user", "tool") and not self.calls

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Calls of tools without a result yet, in order."""
        for results, message in enumerate(reversed(self.messages)):
            if message.get("role") != "tool":
                return (message.get("tool_calls") or [])[results:]
        return []

    def prompt(self, more: list[dict[str, Any]]) -> Prompt:
        """What the model reads to answer with `more` at the end.

        Raises:
          ValueError: the chat format cannot express it, or it leaves no room for an answer.
        """
        messages = [*self.messages, *more]
        prompt = chat_prompt(self.tokenizer, messages, self.mode, profile=self.profile, **self.options)
        if len(prompt.ids) >= self.context:
            raise ValueError(
                f"the conversation has {len(prompt.ids)} tokens, which leaves no room in a context of {self.context}; "
                "/reset forgets it, and --context makes room"
            )
        return prompt


@dataclasses.dataclass
class Session:
    """A conversation with a model that runs.

    Attributes:
      engine: runs it.
      conversation: so far.
      sampling: how tokens are chosen.
      stop_ids: tokens that end an answer.
      max_tokens: most tokens of one.
      quiet: whether nothing is said of speed.
      terminal: whether somebody types.
    """

    engine: Engine
    conversation: Conversation
    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_tokens: int | None
    quiet: bool
    terminal: bool

    def run(self) -> None:
        """Reads and answers until there is nothing more to read."""
        if self.conversation.asks:
            self._answer([])
        while (line := self._read()) is not None:
            if line.startswith("/") and not line.startswith("//"):
                if not self._command(line):
                    return
            elif calls := self.conversation.calls:
                result = {"role": "tool", "tool_call_id": calls[0].get("id"), "content": line}
                if len(calls) > 1:
                    self.conversation.messages.append(result)
                else:
                    self._answer([result])
            elif line.strip():
                text = "".join(self.conversation.files) + line.removeprefix("/" if line.startswith("//") else "")
                if self._answer([{"role": "user", "content": text}]):
                    self.conversation.files.clear()

    def _read(self) -> str | None:
        """A message or a command; None at the end."""
        calls = self.conversation.calls
        lines: list[str] = []
        prompt = f"result of {calls[0]['function']['name']}> " if calls else "> "
        while True:
            try:
                line = self._line(prompt if not lines else ". ")
            except KeyboardInterrupt:  # the line is not wanted, but the chat is
                if not self.terminal:
                    raise
                print()
                lines = []
                continue
            if line is None:
                return "\n".join(lines) if lines else None
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)

    def _line(self, prompt: str) -> str | None:
        if self.terminal:
            try:
                return input(prompt)
            except EOFError:
                print()
                return None
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise CommandError(f"stdin is not UTF-8 text (byte {error.start}); expected UTF-8") from None
        return line.removesuffix("\n") if line else None

    def _answer(self, more: list[dict[str, Any]]) -> bool:
        """Answers what was said; what cannot be answered is not kept. Returns whether it was."""
        conversation = self.conversation
        try:
            prompt = conversation.prompt(more)
        except ValueError as error:
            say(f"not sent: {error}")
            return False
        room = conversation.context - len(prompt.ids)
        most = room if self.max_tokens is None else min(room, self.max_tokens)
        reply = Reply(conversation.tokenizer, (), prompt.thinking_mode, str(prompt.ids).encode())
        kinds = prompt.thinking_mode == "thinking" or bool(conversation.options.get("tools"))
        writer = Writer(sys.stdout, show_reasoning=True, headings=kinds)
        request = Request(prompt.ids, most, self.sampling, self.stop_ids)
        with interruptible() as stopped:
            outcome = stream(self.engine, request, reply, writer, stopped)
        if not outcome.ids:
            say("stopped before it said anything; your message is not kept")
            return False
        conversation.messages += [*more, {"role": "assistant", **reply.message()}]
        if outcome.finish == "stop":
            text = conversation.tokenizer.decode(outcome.ids[:-1]) + EOS
            try:
                parse(text, prompt.thinking_mode or "chat")
            except ParseError as error:
                say(f"note: the answer is not well formed, and is kept as it was written: {error}")
        if not self.quiet:
            say(outcome.summary())
        return True

    def _command(self, line: str) -> bool:
        """Does what a line says that begins with a slash. Returns whether the chat goes on."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/file": self._file,
            "/mode": self._mode,
            "/save": self._save,
            "/reset": self._reset,
            "/help": self._help,
        }
        if name not in actions:
            legal = ", ".join((*actions, "/quit"))
            say(f"there is no {name}; expected one of {legal}, or // where a message begins with a slash")
            return True
        try:
            actions[name](rest.strip())
        except CommandError as error:
            say(str(error))
        return True

    def _system(self, text: str) -> None:
        self.conversation.system(text)
        say("the model is told so from now on" if text else "the model is told nothing before the conversation")

    def _file(self, name: str) -> None:
        if not name or name == "-":
            raise CommandError("/file wants the path of a text file")
        path = Path(name).expanduser()
        text = read_text(path)
        self.conversation.files.append(_FILE.format(name=path.name, text=text))
        say(f"{path}: {len(text):,} characters, in front of your next message")

    def _mode(self, word: str) -> None:
        if word and word not in get_args(Mode):
            raise CommandError(f"there is no mode {word!r}; expected one of {', '.join(get_args(Mode))}")
        if word:
            self.conversation.mode = word  # type: ignore[assignment]
            check_mode(self.conversation.mode, self.conversation.context, self.conversation.profile)
        say(f"mode {self.conversation.mode}")

    def _save(self, name: str) -> None:
        if not name:
            raise CommandError("/save wants the name of a file to write")
        path = Path(name).expanduser()
        write_chat(path, self.conversation.messages, self.conversation.options)
        say(f"{path}: {len(self.conversation.messages)} messages")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        say("the conversation is forgotten")

    def _help(self, rest: str) -> None:
        width = max(map(len, COMMANDS))
        say("\n".join(f"  {name:<{width}}  {meaning}" for name, meaning in COMMANDS.items()))


@contextlib.contextmanager
def _history(terminal: bool, *, kept: bool) -> Iterator[None]:
    """Arrow keys at a terminal, which find lines of earlier chats where they are kept and there is a place for them."""
    if not terminal:
        yield
        return
    try:
        import readline

        path = user_directory(os.environ) / HISTORY
    except (ImportError, RuntimeError):
        yield
        return
    if kept:
        with contextlib.suppress(OSError):
            readline.read_history_file(path)
    try:
        yield
    finally:
        if kept:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)
                readline.set_history_length(MOST_LINES)
                readline.write_history_file(path)
