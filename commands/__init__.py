"""The command line: one module per verb, imported when the verb is called.

Exit codes: 0 done, 1 `verify` found a difference, 2 bad input (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from v4_jax import __version__

PROGRAM = "v4-jax"

INTERRUPTED = 130
_BAD_INPUT, _BROKEN_PIPE = 2, 141


# Each is a function of that name in the module of that name.
VERBS = {
    "demo": "the two-minute tour on an embedded tiny model",
    "info": "parameters, FLOPs and cache of a model, against DeepSeek-V3.2",
    "generate": "continue a prompt or answer a chat, streaming",
    "chat": "a conversation at the terminal",
    "score": "log-probabilities of given texts, JSON lines in and out",
    "batch": "answer a file of requests, many at a time, resumable",
    "serve": "OpenAI's API and Anthropic's over HTTP, many requests at a time",
    "eval": "does it stay useful at length: needles, MRCR, questions about documents",
    "convert": "released checkpoint -> Orbax, in the released number formats",
    "export": "Orbax, a training run (or released) -> released layout",
    "plan": "compile for a TPU topology: fit, cost, and the mesh to use",
    "bench": "run a program on the devices there are: measured time, by part, against the plan's estimate",
    "train": "pretraining and post-training with Muon, from released weights or from nothing",
    "plot": "a training run's metrics, or several runs', as curves in a PNG",
    "completion": "what the Tab key adds to a command, for bash and zsh",
    "verify": "compare two checkpoints, tensor by tensor, or check one alone",
}

# Those that compile programs for the devices that are there, and keep them. `bench` measures that, too.
COMPILING = ("demo", "generate", "chat", "score", "batch", "serve", "eval", "train")


def entry() -> None:
    """The `v4-jax` program: runs one command and ends the process with its exit code.

    One that was interrupted or failed ends at once, without waiting for the threads that compile or write: what they
    were making has a working name, letting the interpreter shut down under them can crash it, and a checkpoint that
    could not be written would be waited for a long time.
    """
    code = main()
    if code in (INTERRUPTED, _BAD_INPUT):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: its arguments; those of the process when None.

    Returns:
      The exit code.

    Raises:
      SystemExit: the arguments do not parse (code 2), or only help was asked for (code 0).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end the program
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a broken pipe is still ours to handle
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough. The interpreter flushes stdout once more when it ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _run(arguments: list[str]) -> int:
    from v4_jax.commands.shared.console import CommandError

    try:
        return _dispatch(arguments)
    except CommandError as error:
        return _refuse(str(error))


def _refuse(sentence: str, verb: str = "") -> int:
    print(f"{' '.join((PROGRAM, verb)).rstrip()}: {sentence}", file=sys.stderr)
    return _BAD_INPUT


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if name not in VERBS:
        if not name:
            print(_overview(), file=sys.stderr)
            return _BAD_INPUT
        return _refuse(f"unknown verb {name!r}; expected one of {', '.join(VERBS)}")

    from v4_jax.commands.shared.absent_tpus import leave_out_absent_tpus

    leave_out_absent_tpus()  # before anything imports JAX

    import tyro

    from v4_jax.commands.shared.hints import of_options

    function: Callable[..., Any] = getattr(importlib.import_module(f"v4_jax.commands.{name}"), name)
    # tyro takes the arguments' help from the docstring, line breaks included, and drops the examples, which are what
    # help is read for.
    function.__doc__ = re.sub(r"\n {4}(?=\S)", " ", inspect.cleandoc(function.__doc__ or ""))
    description = function.__doc__.split("\n\nArgs:\n")[0]

    def parse(words: list[str]) -> Any:
        return tyro.cli(
            parsed(function, keeps=name in COMPILING),
            prog=f"{PROGRAM} {name}",
            description=description,
            args=words,
            config=(tyro.conf.OmitArgPrefixes,),
        )

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            call = parse(arguments[1:])
    except SystemExit as end:
        if end.code != _BAD_INPUT:
            raise
        with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit):
            parse(["--help"])
        hints = of_options(arguments[1:], re.findall(r"--[a-z][\w-]*", told.getvalue()), f"{PROGRAM} {name}")
        return _refuse(f"{_sentence(box.getvalue())}{hints} (see {PROGRAM} {name} --help)", name)
    return call() or 0


def parsed(function: Callable[..., Any], *, keeps: bool) -> Callable[..., Callable[[], Any]]:
    """The function with its arguments bound and not yet called, so that parsing and running can be told apart.

    Args:
      function: the verb.
      keeps: whether it keeps what it compiles, and has the option that says where.
    """

    @functools.wraps(function)
    def bind(*positional: Any, **named: Any) -> Callable[[], Any]:
        return functools.partial(function, *positional, **named)

    if not keeps:
        return bind

    from v4_jax.commands.shared.compilation_cache import HELP, CompilationCache, keep_programs

    def bind_and_keep(*positional: Any, compilation_cache: Path | None, **named: Any) -> Callable[[], Any]:
        def call() -> Any:
            keep_programs(compilation_cache)
            return function(*positional, **named)

        return call

    option = inspect.Parameter("compilation_cache", inspect.Parameter.KEYWORD_ONLY, default=None)
    signature = inspect.signature(function)
    signature = signature.replace(parameters=[*signature.parameters.values(), option])
    hints = typing.get_type_hints(function, include_extras=True)
    bind_and_keep.__signature__ = signature  # type: ignore[attr-defined]
    bind_and_keep.__annotations__ = hints | {"compilation_cache": CompilationCache}
    bind_and_keep.__doc__ = f"{function.__doc__}\n  {option.name}: {HELP}"
    return bind_and_keep


def _sentence(box: str) -> str:
    """What tyro says in a box of several lines, as one sentence."""
    lines = [line.strip("│ \n") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    return " ".join(" ".join(lines[:rule]).split()).rstrip(".")


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in VERBS.items())
    return f"""usage: {PROGRAM} VERB ...

DeepSeek-V4 in JAX: from the released weights to tokens.

{verbs}

{PROGRAM} VERB --help explains a verb with examples. Begin with:

  {PROGRAM} demo
  {PROGRAM} info flash --context 1M
  {PROGRAM} generate DeepSeek-V4-Flash --prompt "Why is the sky blue?" --mode high"""
