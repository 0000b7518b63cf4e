"""OpenAI's API over HTTP: chat completions, completions and models, streamed or whole.

POST /v1/chat/completions, /v1/completions      GET /v1/models, /health, /metrics, /openapi.json

Paths may do without their /v1.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import json
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from importlib import metadata
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from v4_jax.infer.engine.requests import Event
from v4_jax.infer.openai.bodies import BodyError, ChatBody, read_body
from v4_jax.infer.openai.completions import Completion, Model, Update
from v4_jax.infer.openai.json_text import JsonError, read_json
from v4_jax.infer.openai.metrics import Metrics
from v4_jax.infer.openai.openapi import openapi
from v4_jax.infer.openai.service import Overloaded, Service, ServiceDown

_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/openapi.json")

_SHORT = re.compile(r"/(chat/completions|completions|models)(/|$)")  # what clients ask that know no /v1

_SALT = "v4_jax.prefix_salt"  # in a request's scope: what its key's prompts are kept apart by

RETRY_SECONDS = 1  # when to come back that was turned away


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
      body_bytes: of a request's body.
      seconds: that a request may take.
      body_seconds: from the end of its header to the end of its body.
    """

    body_bytes: int = 32 << 20
    seconds: float = 3600.0
    body_seconds: float = 60.0


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

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

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status == 429 else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 408:
            headers |= {"x-should-retry": "false", "Connection": "close"}  # it would take as long again
        return JSONResponse(self.body(), self.status, headers)


def _too_slow(seconds: float) -> ApiError:
    return ApiError(408, f"the answer took longer than {seconds:g} s", code="timeout")


def _overloaded(what: str) -> ApiError:
    return ApiError(429, f"{what}; try again in {RETRY_SECONDS} s", kind="rate_limit_error")


def make_app(
    service: Service,
    model: Model,
    *,
    keys: Sequence[str] = (),
    limits: Limits = Limits(),
    share_prefixes: bool = False,
) -> Starlette:
    """The application: starts the service, and stops it when it ends.

    Args:
      service: not started yet.
      model: what it serves.
      keys: bearer tokens that clients need; none lets everybody in.
      limits: what a client may ask for.
      share_prefixes: whether a key may learn, from counts of cached tokens and from time, what others asked: prompts of
        all keys then share the prefix cache.
    """
    server = _Server(service, model, limits)
    page = openapi(metadata.version("v4-jax"), keys=bool(keys))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    async def described(request: Request) -> Response:
        return JSONResponse(page)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path} is not served; expected POST {', '.join(_PATHS[:2])} or "
        response = ApiError(error.status_code, f"{message}GET {', '.join(_PATHS[2:])}").response()
        response.headers.update(error.headers or {})
        return response

    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server has failed; its log says how", kind="server_error").response()

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.complete, methods=["POST"]),
            Route("/v1/models", server.models),
            Route("/v1/models/{model:path}", server.model),
            Route("/health", server.health),
            Route("/metrics", server.metrics),
            Route("/openapi.json", described),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: refused, Exception: failed},
    )
    app.add_middleware(_Gate, keys=tuple(keys), share_prefixes=share_prefixes, count=server.count)
    return app


class _Gate:
    """Lets in who has a key, where keys are asked for, and counts answers by path and status."""

    def __init__(
        self, app: ASGIApp, keys: tuple[str, ...], share_prefixes: bool, count: Callable[[str, int], None]
    ) -> None:
        self._app, self._keys, self._share, self._count = app, keys, share_prefixes, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _SHORT.match(scope["path"]):
            scope = {**scope, "path": "/v1" + scope["path"], "raw_path": b"/v1" + scope["raw_path"]}

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in _PATHS else "other"
                self._count(path, message["status"])
            await send(message)

        key = self._key(scope)
        if self._keys and scope["path"].startswith("/v1/") and key is None:
            await ApiError(401, "the key is missing or unknown; expected Authorization: Bearer KEY").response()(
                scope, receive, counting
            )
            return
        scope[_SALT] = b"" if key is None or self._share else hashlib.sha256(key.encode()).digest()
        await self._app(scope, receive, counting)

    def _key(self, scope: Scope) -> str | None:
        """The key that a request has; None without one that is known."""
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        # All are compared: no early exit.
        found = [legal for legal in self._keys if hmac.compare_digest(key.strip(), legal.encode())]
        return found[0] if found and scheme.lower() == b"bearer" else None


class _Server:
    """The handlers."""

    def __init__(self, service: Service, model: Model, limits: Limits) -> None:
        self._service, self._model, self._limits = service, model, limits
        self._metrics, self._started = Metrics(service), int(time.time())
        self._preparing = 0  # requests whose bodies are being read

    def count(self, path: str, status: int) -> None:
        """Counts an answer."""
        self._metrics.requests.labels(path, status).inc()

    async def health(self, request: Request) -> Response:
        """Whether requests can be served."""
        if self._service.alive:
            return JSONResponse({"status": "ok"})
        return ApiError(503, "the engine does not run", kind="server_error").response()

    async def metrics(self, request: Request) -> Response:
        """Counters."""
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The list of the one model."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """The one model."""
        try:
            self._check_model(request.path_params["model"])
        except ApiError as error:
            return error.response()
        return JSONResponse(self._card())

    async def chat(self, request: Request) -> Response:
        """Answers a conversation."""
        return await self._answer(request, chat=True)

    async def complete(self, request: Request) -> Response:
        """Continues a text."""
        return await self._answer(request, chat=False)

    def _card(self) -> dict[str, Any]:
        card = {"id": self._model.name, "object": "model", "created": self._started, "owned_by": "v4-jax"}
        return card | {"max_model_len": self._service.engine.max_length}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._model.name):
            message = f"there is no model {name!r}; this server has {self._model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        try:
            content = await self._content(request)
            # Reading a million tokens takes seconds, in which others' tokens must flow.
            completion = await self._prepared(content, chat, request.scope[_SALT])
            body = completion.body
            name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
            running = _Running(self._service, completion, self._metrics, self._limits.seconds)
            await _unless_gone(request, running.begin())
            if body.stream:
                return StreamingResponse(self._stream(running, name), media_type="text/event-stream")
            await _unless_gone(request, running.finish())
            return JSONResponse(completion.answer(name))
        except ApiError as error:
            return error.response()
        except BodyError as error:
            return ApiError(400, str(error), param=error.param).response()
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; it is what counters and logs show

    async def _prepared(self, content: bytes, chat: bool, salt: bytes) -> Completion:
        """Reads a body in a thread; as many at the same time as requests may be served or wait."""
        if self._service.active + self._preparing >= self._service.most:
            raise _overloaded(f"{self._service.most} requests are being served or wait, and no more are taken")

        def over(task: asyncio.Task[Completion]) -> None:
            self._preparing -= 1
            if not task.cancelled():
                task.exception()  # which somebody has seen, or nobody waits for

        self._preparing += 1
        reading = asyncio.create_task(asyncio.to_thread(self._prepare, content, chat, salt))
        reading.add_done_callback(over)
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await asyncio.shield(reading)  # a thread cannot be stopped, and counts until it ends
        except TimeoutError:
            raise _too_slow(self._limits.seconds) from None

    def _prepare(self, content: bytes, chat: bool, salt: bytes) -> Completion:
        try:
            body = read_body(read_json(content), chat=chat)
            self._check_model(body.model)
            return Completion(body, self._model, secrets.randbits(32), salt)
        except BodyError:
            raise
        except JsonError as error:
            raise BodyError(f"the body is {error}") from None
        except ValueError as error:
            raise BodyError(str(error)) from None

    async def _content(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the body is of type {kind or 'none'!r}; expected application/json")
        content, most, seconds = bytearray(), self._limits.body_bytes, self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                async for block in request.stream():
                    content += block
                    if len(content) > most:
                        raise ApiError(413, f"the body has more than the {most:,} bytes that a body may have")
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {seconds:g} s", code="timeout") from None
        return bytes(content)

    async def _stream(self, running: _Running, name: str) -> AsyncIterator[bytes]:
        """Server-sent events: a chunk for each piece of text, then perhaps the usage, then the end."""
        completion = running.completion
        chat = isinstance(completion.body, ChatBody)
        envelope = completion.envelope(name, "chat.completion.chunk" if chat else "text_completion")
        counted = completion.body.stream_options is not None and completion.body.stream_options.include_usage
        no_usage_yet = {"usage": None} if counted else {}

        def event(content: Any) -> bytes:
            return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()

        try:
            if chat:
                said = {"role": "assistant", "content": ""}
                for index in range(len(completion.choices)):
                    choice = {"index": index, "delta": said, "finish_reason": None, "logprobs": None}
                    yield event(envelope | {"choices": [choice]} | no_usage_yet)
            async for choice in running.choices():
                yield event(envelope | {"choices": [choice]} | no_usage_yet)
            if counted:
                yield event(envelope | {"choices": [], "usage": completion.usage()})
            yield b"data: [DONE]\n\n"
        except ApiError as error:  # the status is on its way already
            yield event(error.body())
        finally:
            await running.aclose()


class _Running:
    """A completion that is being served."""

    def __init__(self, service: Service, completion: Completion, metrics: Metrics, seconds: float) -> None:
        self.completion, self._metrics = completion, metrics
        self._begun = self._last = time.monotonic()
        self._until, self._seconds = self._begun + seconds, seconds
        self._tokens = service.tokens(completion.requests, self._ended_early)

    def _ended_early(self, event: Event) -> bool:
        """Takes a token; whether it met a stop string."""
        self._newest = self.completion.push(event)
        return self._newest.choice.cut

    async def begin(self) -> None:
        """Waits for the first token: until then, what goes wrong is an answer's status.

        Raises:
          ApiError: the request is not served.
        """
        self._first = await self._next()
        self._metrics.prompt_tokens.inc(self.completion.prompt_tokens)
        self._metrics.cached_tokens.inc(self.completion.cached)
        self._metrics.first_token.observe(self._last - self._begun)

    async def choices(self) -> AsyncIterator[dict[str, Any]]:
        """What each token adds, as a stream's choices."""
        update = self._first
        while update is not None:
            if choice := self.completion.chunk(update):
                yield choice
            update = await self._next()
        made, samples = self.completion.new_tokens, len(self.completion.choices)
        self._metrics.duration.observe(self._last - self._begun)
        if made > samples:
            self._metrics.between_tokens.observe((self._last - self._begun) * samples / made)

    async def finish(self) -> None:
        """Waits for all tokens."""
        async with contextlib.aclosing(self):
            async for _ in self.choices():
                pass

    async def aclose(self) -> None:
        """Gives the slots back, if they are not free yet."""
        await self._tokens.aclose()  # type: ignore[attr-defined]

    async def _next(self) -> Update | None:
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                await anext(self._tokens)
        except StopAsyncIteration:
            return None
        except TimeoutError:
            raise _too_slow(self._seconds) from None
        except Overloaded as error:
            raise _overloaded(str(error)) from None
        except ServiceDown as error:
            raise ApiError(503, str(error), kind="server_error") from None
        except ValueError as error:
            code = "context_length_exceeded" if "exceed" in str(error) else None
            raise ApiError(400, str(error), code=code) from None
        if failure := self.completion.failure:
            await self.aclose()
            raise ApiError(500, failure, kind="server_error", code="not_finite")
        self._last = time.monotonic()
        self._metrics.generated_tokens.inc()
        return self._newest


async def _unless_gone(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Does some work, unless the client goes away.

    Raises:
      ClientDisconnect: it has.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect()
        await task
    finally:
        for one in (task, watch):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await one
