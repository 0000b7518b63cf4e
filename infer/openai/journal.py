"""The journal of a batch: answers kept on disk as they come, resumed after any end, and joined into the output.

Records are appended to a journal next to the output as requests finish, a line each, so that whoever is killed loses
only what was being generated. The output appears under its name when every line is answered. Several processes may
share a file, each with a share of its lines and a journal of its own; the last to finish writes the output.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from v4_jax.files import complete, try_lock

Record = dict[str, Any]


class Share(NamedTuple):
    """The lines of a file that are one process's: every `of`-th, from line `number` on.

    Attributes:
      number: of the share, 1 to `of`.
      of: shares.
    """

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """From "2/4".

        Raises:
          ValueError: anything else.
        """
        number, slash, of = text.partition("/")
        if slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
            return cls(int(number), int(of))
        raise ValueError(f"part {text!r} is not understood: expected a part and how many there are, such as 2/4")

    def holds(self, line: int) -> bool:
        """Whether a line (from 1) belongs to it."""
        return (line - self.number) % self.of == 0


class JournalError(Exception):
    """A journal that cannot be resumed; the sentence says why."""


class Journal:
    """The records of one share of a batch, appended as they come.

    The first line says what they are answers to: a journal is resumed by the same batch alone.

    Args:
      output: the batch's output file.
      share: whose records these are.
      header: what tells batches apart: the input's digest, the settings.

    Attributes:
      lines: numbers of the lines that have a record.

    Raises:
      JournalError: another process writes it, or it belongs to another batch.
      OSError: it cannot be written.
    """

    def __init__(self, output: Path, share: Share, header: Record) -> None:
        path = journal_path(output, share)
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(_locked(path))
            records = _Records(path)
            if records.header not in (None, header):
                was, now = _flat(records.header), _flat(header)
                different = [key for key in sorted(was | now) if was.get(key) != now.get(key)]
                said = "; ".join(f"{key} was {_shown(was.get(key))}, is {_shown(now.get(key))}" for key in different)
                raise JournalError(
                    f"{path} holds answers of another job: {said}; expected the same model, input and options, or "
                    "that file removed"
                )
            self._file.truncate(records.end)  # a line that was cut short by a full disk or a crash is not a record
            if records.header is None:
                self._append(header)
            stack.pop_all()  # it stays open
        self.lines = set(records.places)

    def add(self, record: Record) -> None:
        """Appends a record. It is kept whatever happens to this process afterwards.

        Raises:
          OSError: it cannot be written; the journal can be resumed later.
        """
        self._append(record)
        self.lines.add(record["line"])

    def close(self) -> None:
        """Puts everything onto the disk, and lets others have the journal."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _append(self, record: Record) -> None:
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        while line:  # a nearly full disk takes a part of it
            line = line[self._file.write(line) :]


def journal_path(output: Path, share: Share) -> Path:
    """Where a share's journal is."""
    suffix = f".{share.number}-of-{share.of}" if share.of > 1 else ""
    return output.with_name(f".{output.name}{suffix}.journal")


def join_shares(output: Path, shares: int, header: Record, numbers: list[int], *, as_finished: bool) -> bool:
    """Writes the output if the journals of all shares hold all lines, and removes them.

    Args:
      output: the file to make.
      shares: how many there are.
      header: of the batch.
      numbers: the lines that need a record.
      as_finished: keep the order in which they finished, share by share, rather than the input's.

    Returns:
      Whether the output is complete now.
    """
    paths = [journal_path(output, Share(number, shares)) for number in range(1, shares + 1)]
    try:
        journals = [_Records(path) for path in paths]
        if any(journal.header != header for journal in journals):
            return False
        found = {line: index for index, journal in enumerate(journals) for line in journal.places}
        if any(number not in found for number in numbers):
            return False
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in paths]
            with complete(output) as working, working.open("wb") as target:
                for line in found if as_finished else numbers:
                    file = files[found[line]]
                    begin, end = journals[found[line]].places[line]
                    file.seek(begin)
                    target.write(file.read(end - begin))
    except FileNotFoundError:
        return output.exists()  # a share has not begun; or another process that finished now was quicker
    for path in paths:
        path.unlink(missing_ok=True)
    return True


def _flat(header: Record, prefix: str = "") -> Record:
    """A header's values by their whole names, such as "options.policy"."""
    found: Record = {}
    for key, value in header.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


class _Records:
    """What a journal holds.

    Args:
      path: the journal.

    Attributes:
      header: its first line; None if there is none.
      places: the bytes, from the first to the one after the last, of each line's record.
      end: where the last whole record ends.

    Raises:
      JournalError: it holds something else.
      OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.header: Record | None = None
        self.places: dict[int, tuple[int, int]] = {}
        self.end = 0
        with path.open("rb") as file:
            for text in file:
                if not text.endswith(b"\n"):
                    break
                content = self._read(text)
                if self.header is None:
                    self.header = content
                elif type(content.get("line")) is int:
                    self.places[content["line"]] = self.end, self.end + len(text)
                else:
                    raise self._foreign
                self.end += len(text)

    def _read(self, text: bytes) -> Record:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(content := json.loads(text), dict):
                return content
        raise self._foreign

    @property
    def _foreign(self) -> JournalError:
        return JournalError(
            f"{self._path} holds something at byte {self.end} that is no record of a journal; expected a journal of "
            "this job, or that file removed"
        )


def _locked(path: Path) -> io.FileIO:
    """Opens a file to append to, for this process alone."""
    while True:
        file = path.open("a+b", buffering=0)  # what could not be written must not come later
        if not try_lock(file.fileno()):
            file.close()
            raise JournalError(f"{path} is being written by another process; expected one process a part")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # whoever had the lock has finished meanwhile and removed the file
