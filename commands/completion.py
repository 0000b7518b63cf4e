"""`v4-jax completion`: what the Tab key adds to a command."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from v4_jax.commands import COMPILING, PROGRAM, VERBS, parsed
from v4_jax.commands.shared.console import CommandError, bad_input, say
from v4_jax.commands.shared.options import Flag
from v4_jax.files import complete

Shell = Literal["bash", "zsh"]


def completion(shell: Annotated[Shell, tyro.conf.Positional], *, install: Flag = False) -> None:
    """Prints a script that completes verbs, options and their values for a shell, or puts it where the shell finds it.

    Options come and go with versions: install it again after an update.

    Examples:
      v4-jax completion bash --install
      v4-jax completion zsh --install
      v4-jax completion bash

    Args:
      shell: The shell to complete for.
      install: Write the script into the user's directory for such scripts, and say what else the shell needs.
    """
    script = _script(shell)
    if not install:
        print(script, end="")
        return
    path, then = _place(shell)
    with bad_input():
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete(path) as working:
            working.write_text(script, encoding="utf-8")
    say(f"written: {path}; {then}")


def _script(shell: Shell) -> str:
    """tyro's script for the program with all of its verbs."""
    verbs = {
        name: parsed(getattr(importlib.import_module(f"v4_jax.commands.{name}"), name), keeps=name in COMPILING)
        for name in VERBS
    }
    with contextlib.redirect_stdout(io.StringIO()) as script, contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            verbs,
            prog=PROGRAM,
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.OmitArgPrefixes,),
        )
    return script.getvalue()


def _place(shell: Shell) -> tuple[Path, str]:
    """Where a shell looks for such scripts of a user, and what else it needs.

    Raises:
      CommandError: nothing says where the user's home is.
    """
    try:
        data = Path(os.environ.get("XDG_DATA_HOME", ""))
        data = data if data.is_absolute() else Path.home() / ".local" / "share"
    except RuntimeError as error:
        raise CommandError(f"{error} Without --install the script is printed") from None
    if shell == "bash":
        own = os.environ.get("BASH_COMPLETION_USER_DIR")
        folder = Path(own) if own else data / "bash-completion"
        return folder / "completions" / PROGRAM, "new shells have it, where the package bash-completion is installed"
    folder = data / "zsh" / "site-functions"
    return folder / f"_{PROGRAM}", f"new shells have it, with fpath=({folder} $fpath) before compinit in ~/.zshrc"
