"""What an API over HTTP is made of: how its bodies are read, its answers written and its errors said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from starlette.responses import JSONResponse

from v4_jax.infer.openai.bodies import ChatBody, CompletionBody
from v4_jax.infer.openai.completions import Completion, Update

RETRY_SECONDS = 1  # when to come back that was turned away
RESTART_SECONDS = 30  # and when there was nobody to answer


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: of HTTP.
      kind: in OpenAI's words.
      param: the field at fault.
      code: which error it is, for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code


class Writer(Protocol):
    """One answer in an API's form. Parts of a stream are events as they are sent, made in the order of the methods."""

    def answer(self) -> dict[str, Any]:
        """The whole answer."""
        ...

    def begin(self) -> Iterable[bytes]:
        """How a stream begins."""
        ...

    def update(self, update: Update) -> Iterable[bytes]:
        """What a token adds to it."""
        ...

    def end(self) -> Iterable[bytes]:
        """How it ends."""
        ...


@dataclasses.dataclass(frozen=True)
class Question:
    """A body that was read.

    Attributes:
      body: what it asks, as the engine's side takes it.
      writer: writes the answer.
    """

    body: ChatBody | CompletionBody
    writer: Callable[[Completion], Writer]


@dataclasses.dataclass(frozen=True)
class Api:
    """One way to ask.

    Attributes:
      path: where.
      read: a parsed JSON body; raises `BodyError`.
      error: the JSON of an error.
      error_event: an error in a stream, whose status is on its way already.
      at_once: the answer, where it needs no token of the model's; None where it does.
    """

    path: str
    read: Callable[[Any], Question]
    error: Callable[[ApiError], dict[str, Any]]
    error_event: Callable[[ApiError], bytes]
    at_once: Callable[[Completion], dict[str, Any]] | None = None

    def refusal(self, error: ApiError) -> JSONResponse:
        """An answer that is an error."""
        seconds = {429: RETRY_SECONDS, 503: RESTART_SECONDS}.get(error.status)
        headers = {} if seconds is None else {"Retry-After": str(seconds)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if error.status == 408:
            headers |= {"x-should-retry": "false", "Connection": "close"}  # it would take as long again
        return JSONResponse(self.error(error), error.status, headers)


def server_sent(content: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def openai_error(error: ApiError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}}
