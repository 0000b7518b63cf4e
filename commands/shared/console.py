"""What every verb says and how: errors in one sentence, progress on a terminal, silence elsewhere.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from v4_jax import json_text

Report = Callable[[str, int, int], None]

_REFRESH_SECONDS = 0.2

_reports = True


class CommandError(Exception):
    """Bad input. The message is one sentence for the user; the command ends with exit code 2."""


@contextlib.contextmanager
def bad_input(what: str = "", *, kinds: tuple[type[ValueError], ...] = (ValueError,)) -> Iterator[None]:
    """Turns a `ValueError` or `OSError` of the calls inside into a `CommandError`.

    It belongs around calls that judge what the user gave, not around computation, whose errors are ours. Where the two
    are one call, kinds tell them apart.

    Args:
      what: put in front of the message.
      kinds: those that are about what the user gave.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandError(f"{what}{error.filename}: {reason}" if error.filename else f"{what}{reason}") from None
    except kinds as error:
        raise CommandError(f"{what}{error}") from None


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Imports of libraries that only some verbs need.

    Args:
      extra: the optional dependencies of this package that bring them.

    Raises:
      CommandError: one is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is not installed; it comes with pip install 'v4-jax[{extra}]'") from None


def check_output(path: Path) -> None:
    """Checks that a file can be made, before hours of work for it.

    Raises:
      CommandError: it cannot.
    """
    directory = path.absolute().parent
    if not directory.is_dir():
        raise CommandError(f"there is no directory {directory} to write {path.name} in")
    if path.is_dir() or not os.access(directory, os.W_OK):
        reason = "is a directory" if path.is_dir() else "is in a directory that cannot be written"
        raise CommandError(f"output {path} {reason}; expected the name of a file to make")


def read_text(path: Path) -> str:
    """The text of a file, or of stdin for "-", without a byte-order mark.

    Raises:
      CommandError: it cannot be read or is not UTF-8.
    """
    name = "stdin" if str(path) == "-" else str(path)
    try:
        text = sys.stdin.read() if name == "stdin" else path.read_text(encoding="utf-8")
        return text.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CommandError(f"{name} is not UTF-8 text (byte {error.start}); expected UTF-8") from None
    except OSError as error:
        raise CommandError(f"{name} cannot be read: {error.strerror or error}") from None


def read_json(path: Path) -> Any:
    """The JSON of a file, or of stdin for "-".

    Raises:
      CommandError: it cannot be read or is not JSON.
    """
    text = read_text(path).encode(errors="surrogatepass")
    try:
        return json_text.read_json(text)
    except json_text.JsonError as problem:
        if isinstance(error := problem.error, json.JSONDecodeError):
            where = f"line {error.lineno}, column {error.colno}"
            raise CommandError(f"{path} is not JSON: {error.msg} at {where}") from None
        if problem.reason == "digits":
            raise CommandError(f"{path} cannot be read: {problem.error}") from None
        raise CommandError(f"{path} is {problem}") from None


def only_errors() -> None:
    """From now on nothing is said but errors: results and progress are those of another process of the same command."""
    global _reports
    _reports = False
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 open until the process ends


def say(message: str) -> None:
    """A line for the reader, next to the results: on stderr."""
    if _reports:
        print(message, file=sys.stderr, flush=True)


def show(*renderables: Any) -> None:
    """Prints tables: to the terminal in its width, elsewhere plainly and wide enough for everything."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=120, no_color=True)
    for renderable in renderables:
        console.print(renderable)


@contextlib.contextmanager
def progress_bar(label: str, unit: Literal["bytes", "tokens", "requests"] = "bytes") -> Iterator[Report]:
    """A bar on stderr, gone when it is done; nothing at all where stderr is not a terminal.

    Yields:
      A function `report(what, done, total)`, which may be called as often as one likes.
    """
    console = Console(stderr=True)
    if not (console.is_terminal and _reports):
        yield lambda what, done, total: None
        return
    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("[dim]{task.fields[what]}"), console=console, transient=True) as progress:
        task = progress.add_task(label, total=None, what="")
        yield lambda what, done, total: progress.update(task, completed=done, total=total, what=what)


@contextlib.contextmanager
def watched(label: str, done: Callable[[], int], total: int) -> Iterator[None]:
    """A bar for work that keeps count but does not call back: `done()` is asked now and then."""
    with progress_bar(label) as report:
        finished = threading.Event()

        def poll() -> None:
            while not finished.wait(_REFRESH_SECONDS):
                report("", done(), total)

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()


@contextlib.contextmanager
def working(label: str) -> Iterator[None]:
    """A spinner and the time for work whose length nobody knows, such as compilation."""
    console = Console(stderr=True)
    if not (console.is_terminal and _reports):
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(label, total=None)
        yield


def printable(text: str) -> str:
    """The text without what a terminal would obey: control characters but newline and tab become U+FFFD."""
    return "".join(c if c in "\n\t" or not _is_control(c) else "\ufffd" for c in text)


def _is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character < "\xa0"
