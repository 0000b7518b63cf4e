"""Jobs in files: lines of requests in, a line of answer each out, kept as they come and continued after any end.

Answers are appended to a journal next to the output as requests finish, a line each, so that whoever is killed loses
only what was being generated. The output appears under its name when every line is answered. Several processes may
share a file, each with a part of its lines and a journal of its own; the last to finish writes the output.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from v4_jax.files import complete
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.openai.bodies import BodyError, ChatBody, CompletionBody, read_body
from v4_jax.infer.openai.completions import Completion

URLS = {"/v1/chat/completions": True, "/v1/completions": False}  # whether it is a chat
LEGAL_LINE = (
    'expected a batch line with "custom_id", "method", "url" and "body"; an object with "messages" or "prompt"; or a '
    "string"
)
_SCAN = 1 << 20  # bytes read at once

Record = dict[str, Any]


class Job(NamedTuple):
    """One line's request.

    Attributes:
      id: the line's "custom_id" or "id"; None without one.
      body: what it asks.
    """

    id: Any
    body: ChatBody | CompletionBody


class Part(NamedTuple):
    """Which lines of a file are one process's: every `of`-th, from number `number` (1 to `of`) on."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """From "2/4".

        Raises:
          ValueError: anything else.
        """
        number, slash, of = text.partition("/")
        if slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
            return cls(int(number), int(of))
        raise ValueError(f"part {text!r} is not understood: expected a part and how many there are, such as 2/4")

    def holds(self, line: int) -> bool:
        """Whether a line (from 1) is in it."""
        return (line - self.number) % self.of == 0


class Lines:
    """A file's lines, read one by one wherever they stand.

    Args:
      path: the file.

    Attributes:
      digest: SHA-256 of the file.
      numbers: those of lines that are not blank, from 1.

    Raises:
      OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        digest, starts, blank, at, begun = hashlib.sha256(), [0], [], 0, False
        with path.open("rb") as file:
            while block := file.readline(_SCAN):
                digest.update(block)
                at += len(block)
                begun = begun or bool(block.strip())
                if block.endswith(b"\n"):
                    blank.append(not begun)
                    starts.append(at)
                    begun = False
        blank.append(not begun)
        self.digest = digest.hexdigest()
        self.numbers = [number for number, empty in enumerate(blank, 1) if not empty]
        self._path, self._ends = path, np.asarray([*starts, at], np.int64)

    def __getitem__(self, number: int) -> bytes:
        begin, end = self._ends[number - 1 : number + 1].tolist()
        with self._path.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)


def read_job(text: bytes, *, raw: bool = False) -> Job:
    """Reads a line.

    Args:
      text: JSON: a line of OpenAI's batch files; a body alone, perhaps with an "id"; or a string, which is a question.
      raw: whether a string is a text to continue instead.

    Raises:
      BodyError: it is none of them.
    """
    content = _parse(text)
    if isinstance(content, str):
        plain = {"prompt": content} if raw else {"messages": [{"role": "user", "content": content}]}
        return Job(None, read_body(plain))
    if not isinstance(content, dict):
        raise BodyError(f"the line is a {type(content).__name__}; {LEGAL_LINE}")
    if "body" not in content and "url" not in content:
        return Job(content.pop("id", None), _unstreamed(read_body(content)))
    if unknown := sorted(set(content) - {"custom_id", "method", "url", "body"}):
        raise BodyError(f'{", ".join(unknown)} in a batch line; expected "custom_id", "method", "url" and "body"')
    for name, legal in (("method", ["POST"]), ("url", list(URLS))):
        if content.get(name, legal[0]) not in legal or (name == "url" and name not in content):
            raise BodyError(f"{name} is {content.get(name)!r}; expected {' or '.join(legal)}", name)
    return Job(content.get("custom_id"), _unstreamed(read_body(content.get("body"), chat=URLS[content["url"]])))


def line_id(text: bytes) -> Any:
    """The "custom_id" or "id" of a line, whatever else is wrong with it."""
    with contextlib.suppress(BodyError):
        content = _parse(text)
        if isinstance(content, dict):
            return content.get("custom_id", content.get("id"))
    return None


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BodyError(f"the line is not JSON: {error.msg} at column {error.colno}; {LEGAL_LINE}") from None
    except UnicodeDecodeError as error:
        raise BodyError(f"the line is not UTF-8 text (byte {error.start}); expected UTF-8") from None
    except RecursionError:
        raise BodyError("the line is nested too deeply to be read") from None


def _unstreamed(body: ChatBody | CompletionBody) -> ChatBody | CompletionBody:
    if body.stream:
        raise BodyError("stream is true; answers in a file are whole, expected false or nothing", "stream")
    return body


def refusal(line: int, id: Any, error: ValueError) -> Record:
    """The record of a line that cannot be served."""
    param = error.param if isinstance(error, BodyError) else None
    said = {"code": "invalid_request", "message": str(error), "param": param}
    return _record(line, id, response=None, error=said)


def _record(line: int, id: Any, *, response: Any, error: Any) -> Record:
    return {"id": f"batch_req_{line}", "line": line, "custom_id": id, "response": response, "error": error}


# ---- serving -------------------------------------------------------------------------------------------------------


Prepare = Callable[[int], tuple[Any, Completion]]


class Survey(NamedTuple):
    """What lines need.

    Attributes:
      numbers: the lines that can be served.
      length: tokens of the longest prompt together with its answer.
      samples: answers, all together.
    """

    numbers: list[int]
    length: int
    samples: int


def survey(numbers: Iterable[int], prepare: Prepare, lines: Lines, record: Callable[[Record], None]) -> Survey:
    """Reads lines before any is served; those that cannot be get their records now.

    Args:
      numbers: which.
      prepare: a line's id and completion, or a `ValueError`.
      lines: the file.
      record: takes a record.
    """
    legal, length, samples = [], 0, 0
    for number in numbers:
        try:
            request = prepare(number)[1].request
        except ValueError as error:
            record(refusal(number, line_id(lines[number]), error))
            continue
        legal.append(number)
        length = max(length, len(request.prompt) + request.max_tokens)
        samples += request.n
    return Survey(legal, length, samples)


def answer_lines(
    engine: Engine,
    numbers: Iterable[int],
    prepare: Prepare,
    record: Callable[[Record], None],
    progress: Callable[[], None],
) -> None:
    """Serves lines with an engine, a few ahead of its slots so that none stays empty.

    Args:
      engine: idle.
      numbers: legal lines, in the order in which they begin.
      prepare: a line's id and completion.
      record: takes each line's record, in the order in which they finish.
      progress: called after every token.
    """
    running: dict[int, tuple[int, Any, Completion]] = {}
    ahead = iter(numbers)

    def fill() -> None:
        while engine.waiting < engine.slots and (line := next(ahead, None)) is not None:
            id, completion = prepare(line)
            try:
                running[engine.submit(completion.request)] = line, id, completion
            except ValueError as error:  # longer than a slot, or more samples than slots
                record(refusal(line, id, error))

    fill()
    for event in engine.run():
        number, id, completion = running[event.request]
        choice, _ = completion.push(event)
        if choice.cut:
            engine.cancel(event.request, event.sample)
        if completion.done:
            del running[event.request]
            name = f"batch_req_{number}"
            response = {"status_code": 200, "request_id": name, "body": completion.answer(name)}
            record(_record(number, id, response=response, error=None))
        fill()
        progress()


# ---- the journal ---------------------------------------------------------------------------------------------------


class JournalError(Exception):
    """A journal that cannot be continued; the sentence says why."""


class Journal:
    """The records of one part of a job, appended as they come.

    The first line says what they are answers to: a journal is only ever continued by the same job.

    Args:
      output: the job's output file.
      part: whose records these are.
      header: what tells jobs apart: the input's digest, the settings.

    Attributes:
      lines: numbers of the lines that have a record.

    Raises:
      JournalError: another process writes it, or it belongs to another job.
      OSError: it cannot be written.
    """

    def __init__(self, output: Path, part: Part, header: Record) -> None:
        path = journal_path(output, part)
        self._file = _locked(path)
        records = _Records(path)
        self._file.truncate(records.end)  # a line that was cut short by a full disk or a crash is not a record
        if records.header is None:
            self._append(header)
        elif records.header != header:
            different = sorted(key for key in records.header | header if records.header.get(key) != header.get(key))
            was, now = ({key: value.get(key) for key in different} for value in (records.header, header))
            raise JournalError(
                f"{path} holds answers of a job with {was}, this one has {now}; expected the same input and options, "
                "or that file removed"
            )
        self.lines = set(records.places)

    def add(self, record: Record) -> None:
        """Appends a record. It is kept whatever happens to this process afterwards.

        Raises:
          OSError: it cannot be written; the journal can be continued later.
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


def journal_path(output: Path, part: Part) -> Path:
    """Where a part's journal is."""
    suffix = f".{part.number}-of-{part.of}" if part.of > 1 else ""
    return output.with_name(f".{output.name}{suffix}.journal")


def merge(output: Path, parts: int, header: Record, numbers: list[int], *, as_finished: bool) -> bool:
    """Writes the output if the journals of all parts hold all lines, and removes them.

    Args:
      output: the file to make.
      parts: how many there are.
      header: of the job.
      numbers: the lines that need a record.
      as_finished: keep the order in which they finished, part by part, rather than the input's.

    Returns:
      Whether the output is complete now.
    """
    paths = [journal_path(output, Part(number, parts)) for number in range(1, parts + 1)]
    try:
        journals = [_Records(path) for path in paths]
        places = {line: (at, *place) for at, one in enumerate(journals) for line, place in one.places.items()}
        if any(one.header != header for one in journals) or any(number not in places for number in numbers):
            return False
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in paths]
            with complete(output) as working, working.open("wb") as target:
                for line in places if as_finished else numbers:
                    at, begin, end = places[line]
                    files[at].seek(begin)
                    target.write(files[at].read(end - begin))
    except FileNotFoundError:
        return output.exists()  # a part has not begun; or another process that finished now was quicker
    for path in paths:
        path.unlink(missing_ok=True)
    return True


class _Records:
    """What a journal holds: its header, where each line's record stands, where the last whole one ends."""

    def __init__(self, path: Path) -> None:
        self.header: Record | None = None
        self.places: dict[int, tuple[int, int]] = {}
        self.end = 0
        with path.open("rb") as file:
            for text in file:
                if not text.endswith(b"\n"):
                    break
                content = json.loads(text)
                if self.header is None:
                    self.header = content
                else:
                    self.places[content["line"]] = self.end, self.end + len(text)
                self.end += len(text)


def _locked(path: Path) -> io.FileIO:
    """Opens a file to append to, for this process alone."""
    while True:
        file = path.open("a+b", buffering=0)  # what could not be written must not come later
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise JournalError(f"{path} is being written by another process; expected one process a part") from None
        except OSError:
            pass  # some network file systems have no locks: there, nobody checks that one part runs once
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # whoever had the lock has finished meanwhile and removed the file
