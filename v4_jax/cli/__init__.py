"""The command line: one module per group of verbs, imported when its verb is called.

Exit codes: 0 done, 1 `verify` found a difference, 2 bad input (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

PROGRAM = "v4-jax"

_BAD_INPUT, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141


class Verb(NamedTuple):
    """A command: the module (in `v4_jax.cli`) that has a function of the verb's name, and what it does."""

    module: str
    summary: str


VERBS = {
    "demo": Verb("demo", "the two-minute tour on an embedded tiny model"),
    "info": Verb("inspection", "parameters, FLOPs and cache of a model, against DeepSeek-V3.2"),
    "generate": Verb("generation", "continue a prompt or answer a chat, streaming"),
    "score": Verb("scoring", "log-probabilities of given texts, JSON lines in and out"),
    "convert": Verb("checkpoints", "released checkpoint -> Orbax, in the released number formats"),
    "export": Verb("checkpoints", "Orbax (or released) -> released layout"),
    "verify": Verb("checkpoints", "compare two checkpoints, tensor by tensor"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: its arguments; those of the process when None.

    Returns:
      The exit code.

    Raises:
      SystemExit: the arguments do not parse (code 2), or only help was asked for (code 0).
    """
    from v4_jax.cli.console import CommandError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end the program
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a broken pipe is still ours to handle
        return code
    except CommandError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough. The interpreter flushes stdout once more when it ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _run(arguments: list[str]) -> int:
    from v4_jax.cli.console import CommandError

    name = arguments[0] if arguments else ""
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"{PROGRAM} {importlib.import_module('importlib.metadata').version(PROGRAM)}")
        return 0
    if name not in VERBS:
        if not name:
            print(_overview(), file=sys.stderr)
            return _BAD_INPUT
        raise CommandError(f"unknown verb {name!r}; expected one of {', '.join(VERBS)}")

    import tyro

    function: Callable[..., Any] = getattr(importlib.import_module(f"v4_jax.cli.{VERBS[name].module}"), name)
    # tyro takes the arguments' help from the docstring, line breaks included, and drops the examples, which are what
    # help is read for.
    function.__doc__ = re.sub(r"\n {4}(?=\S)", " ", inspect.cleandoc(function.__doc__ or ""))
    description = function.__doc__.split("\n\nArgs:\n")[0]
    return (
        tyro.cli(
            function,
            prog=f"{PROGRAM} {name}",
            description=description,
            args=arguments[1:],
            config=(tyro.conf.OmitArgPrefixes,),
        )
        or 0
    )


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return f"""usage: {PROGRAM} VERB ...

DeepSeek-V4 in JAX: from the released weights to tokens.

{verbs}

{PROGRAM} VERB --help explains a verb with examples. Begin with:

  {PROGRAM} demo
  {PROGRAM} info flash --context 1M
  {PROGRAM} generate DeepSeek-V4-Flash --prompt "Why is the sky blue?" --mode high"""
