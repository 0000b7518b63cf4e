"""Batch files: a line of request in, a line of answer out.

Lines come in OpenAI's form, as a body alone, or as a string. All are read before any is served, so that those that
cannot be served are known, and how much room the others need. Where answers go is `journal`'s business.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.openai.answers import Answer
from v4_jax.infer.openai.bodies import BodyError, ChatBody, CompletionBody, read_body
from v4_jax.infer.openai.completions import Completion
from v4_jax.infer.openai.journal import Record
from v4_jax.json_text import JsonError, read_json

URLS = {"/v1/chat/completions": True, "/v1/completions": False}  # whether it is a chat
LEGAL_LINE = (
    'expected a batch line with "custom_id", "method", "url" and "body"; an object with "messages" or "prompt"; or a '
    "string"
)
_SCAN = 1 << 20  # bytes read at once


class BatchRequest(NamedTuple):
    """One line's request.

    Attributes:
      id: the line's "custom_id" or "id"; None without one.
      body: what it asks.
    """

    id: Any
    body: ChatBody | CompletionBody


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
                begun = begun or bool((block if at else block.removeprefix(codecs.BOM_UTF8)).strip())
                at += len(block)
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


def read_request(text: bytes, *, raw: bool = False) -> BatchRequest:
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
        return BatchRequest(None, read_body(plain))
    if not isinstance(content, dict):
        raise BodyError(f"the line is a {type(content).__name__}; {LEGAL_LINE}")
    if "body" not in content and "url" not in content:
        return BatchRequest(_check_id(content.pop("id", None)), _unstreamed(read_body(content)))
    if unknown := sorted(set(content) - {"custom_id", "method", "url", "body"}):
        raise BodyError(f'{", ".join(unknown)} in a batch line; expected "custom_id", "method", "url" and "body"')
    for name, legal in (("method", ["POST"]), ("url", list(URLS))):
        if content.get(name, legal[0]) not in legal or (name == "url" and name not in content):
            raise BodyError(f"{name} is {content.get(name)!r}; expected {' or '.join(legal)}", name)
    return BatchRequest(
        _check_id(content.get("custom_id")), _unstreamed(read_body(content.get("body"), chat=URLS[content["url"]]))
    )


def line_id(text: bytes) -> Any:
    """The "custom_id" or "id" of a line, whatever else is wrong with it."""
    with contextlib.suppress(ValueError, RecursionError):  # more may be wrong than the line can be served with
        content = json.loads(text.removeprefix(codecs.BOM_UTF8))
        id = content.get("custom_id", content.get("id")) if isinstance(content, dict) else None
        if isinstance(id, str):
            return id.encode(errors="replace").decode()
        return id if isinstance(id, int) else None
    return None


def _parse(text: bytes) -> Any:
    try:
        return read_json(text)
    except JsonError as error:
        raise BodyError(f"the line is {error}; {LEGAL_LINE}") from None


def _check_id(id: Any) -> Any:
    if id is not None and not isinstance(id, str | int):
        raise BodyError(f"custom_id or id is of type {type(id).__name__}; expected a text or a whole number")
    return id


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


class PreparedLine(NamedTuple):
    """A line that can be served.

    Attributes:
      number: of the line, from 1.
      id: its "custom_id" or "id"; None without one.
      completion: what it asks, and its answer as it grows.
    """

    number: int
    id: Any
    completion: Completion


Prepare = Callable[[int], PreparedLine]


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
      prepare: makes a line ready to be served by its number, or raises a `ValueError`.
      lines: the file.
      record: takes a record.
    """
    legal, length, samples = [], 0, 0
    for number in numbers:
        try:
            requests = prepare(number).completion.requests
        except ValueError as error:
            record(refusal(number, line_id(lines[number]), error))
            continue
        legal.append(number)
        length = max(length, *(len(request.prompt) + request.max_tokens for request in requests))
        samples += sum(request.n for request in requests)
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
      prepare: makes a line ready to be served by its number.
      record: takes each line's record, in the order in which they finish.
      progress: called after every token.
    """
    running: dict[int, tuple[PreparedLine, int]] = {}  # by the request's number: a line, and which of its requests
    unsubmitted = iter(numbers)

    def forget(line: PreparedLine, *, cancel: bool = False) -> None:
        for number in [number for number, (one, _) in running.items() if one is line]:
            if cancel:
                engine.cancel(number)
            del running[number]

    def fill() -> None:
        while engine.waiting < engine.slots and (number := next(unsubmitted, None)) is not None:
            line = prepare(number)
            try:
                for place, request in enumerate(line.completion.requests):
                    running[engine.submit(request)] = line, place
            except ValueError as error:  # longer than a slot, or more samples than slots
                forget(line, cancel=True)
                record(refusal(number, line.id, error))

    fill()
    for event in engine.run():
        line, place = running[event.request]
        if line.completion.push(event._replace(request=place)).choice.cut:
            engine.cancel(event.request, event.sample)
        if failure := line.completion.failure:
            forget(line, cancel=True)
            said = {"code": "not_finite", "message": failure, "param": None}
            record(_record(line.number, line.id, response=None, error=said))
        elif line.completion.done:
            forget(line)
            name = f"batch_req_{line.number}"
            response = {"status_code": 200, "request_id": name, "body": Answer(line.completion, name).answer()}
            record(_record(line.number, line.id, response=response, error=None))
        fill()
        progress()
