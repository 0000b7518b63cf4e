"""OpenAI's API over HTTP, and Anthropic's: answers, streamed or whole, and models.

POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/messages/count_tokens

GET /v1/models, /health, /metrics, /openapi.json

Paths may do without their /v1.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from importlib import metadata
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from v4_jax.infer.anthropic.answer import COUNT_TOKENS, MESSAGES
from v4_jax.infer.http.gate import RECORD, SALT, Gate
from v4_jax.infer.http.metrics import Metrics
from v4_jax.infer.http.openapi import openapi
from v4_jax.infer.http.request_log import LOG, Record, report
from v4_jax.infer.http.running import Running, open_stream, overloaded, too_slow, unless_gone
from v4_jax.infer.http.service import Service
from v4_jax.infer.openai.answers import CHAT, TEXT
from v4_jax.infer.openai.api import Api, ApiError, Question
from v4_jax.infer.openai.bodies import BodyError
from v4_jax.infer.openai.completions import Completion, Model
from v4_jax.infer.openai.responses_answer import RESPONSES
from v4_jax.json_text import JsonError, read_json

APIS = {api.path: api for api in (CHAT, TEXT, RESPONSES, MESSAGES, COUNT_TOKENS)}
_READ = ("/v1/models", "/health", "/metrics", "/openapi.json")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may ask for, and what it may wait for.

    Attributes:
      body_bytes: of a request's body.
      seconds: that a request may take.
      body_seconds: from the end of its header to the end of its body.
      silent_seconds: after which a stream that has nothing to say says that it is there.
    """

    body_bytes: int = 32 << 20
    seconds: float = 3600.0
    body_seconds: float = 60.0
    silent_seconds: float = 15.0


def make_app(
    service: Service,
    model: Model,
    *,
    keys: Sequence[str] = (),
    limits: Limits = Limits(),
    share_prefixes: bool = False,
    origins: Sequence[str] = (),
) -> Starlette:
    """The application: starts the service, and stops it when it ends.

    Args:
      service: not started yet.
      model: what it serves.
      keys: bearer tokens that clients need; none lets everybody in.
      limits: what a client may ask for.
      share_prefixes: whether a key may learn, from counts of cached tokens and from time, what others asked: prompts of
        all keys then share the prefix cache.
      origins: of web pages whose scripts may ask, such as "https://example.org"; "*" is all of them (CORS).
    """
    server = _Server(service, model, limits)
    page = openapi(metadata.version("v4-jax"), keys=bool(keys))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.start()
        reporting = asyncio.create_task(report(service))
        yield
        reporting.cancel()
        LOG.info("ends; %d requests are cut short", service.active)
        await service.close()

    async def described(request: Request) -> Response:
        return JSONResponse(page)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path} is not served; expected POST {', '.join(APIS)} or "
        response = _refusal(request.url.path, ApiError(error.status_code, f"{message}GET {', '.join(_READ)}"))
        response.headers.update(error.headers or {})
        return response

    async def failed(request: Request, error: Exception) -> Response:
        return _refusal(request.url.path, ApiError(500, "the server has failed; its log says how", kind="server_error"))

    app = Starlette(
        routes=[
            *(Route(api.path, server.answers(api), methods=["POST"]) for api in APIS.values()),
            Route("/v1/models", server.models),
            Route("/v1/models/{model:path}", server.model),
            Route("/health", server.health),
            Route("/metrics", server.metrics),
            Route("/openapi.json", described),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: refused, Exception: failed},
    )
    app.add_middleware(Gate, keys=tuple(keys), share_prefixes=share_prefixes, refusal=_refusal, count=server.count)
    if origins:  # outside of the gate: browsers ask without a key whether they may ask
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return app


def _refusal(path: str, error: ApiError) -> Response:
    """An error in the form of the API at a path."""
    return APIS.get(path, CHAT).refusal(error)


class _Server:
    """The handlers."""

    def __init__(self, service: Service, model: Model, limits: Limits) -> None:
        self._service, self._model, self._limits = service, model, limits
        self._metrics, self._started = Metrics(service), int(time.time())
        self._preparing = 0  # requests whose bodies are being read

    def count(self, path: str, status: int) -> None:
        """Counts an answer."""
        self._metrics.requests.labels(path if path in (*APIS, *_READ) else "other", status).inc()

    async def health(self, request: Request) -> Response:
        """Whether requests can be served."""
        if self._service.alive:
            return JSONResponse({"status": "ok"})
        return CHAT.refusal(ApiError(503, self._service.down, kind="server_error"))

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
            return CHAT.refusal(error)
        return JSONResponse(self._card())

    def answers(self, api: Api) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of an API's path."""

        async def handler(request: Request) -> Response:
            record: Record = request.scope[RECORD]
            try:
                return await self._answer(request, api, record)
            except ApiError as error:
                record.error = error
            except BodyError as error:
                record.error = ApiError(400, str(error), param=error.param)
            except ClientDisconnect:
                record.left = True
                return Response(status_code=499)  # nobody reads it; it is what counters and logs show
            return api.refusal(record.error)

        return handler

    def _card(self) -> dict[str, Any]:
        card = {"id": self._model.name, "object": "model", "created": self._started, "owned_by": "v4-jax"}
        return card | {"max_model_len": self._service.engine.max_length}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._model.name):
            message = f"there is no model {name!r}; this server has {self._model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _answer(self, request: Request, api: Api, record: Record) -> Response:
        content = await self._content(request)
        # Reading a million tokens takes seconds, in which others' tokens must flow.
        question, completion = await self._prepared(content, api, request.scope[SALT])
        if api.at_once is not None:
            return JSONResponse(api.at_once(completion))
        running = record.running = Running(self._service, completion, self._metrics, self._limits.seconds)
        writer = question.writer(completion)
        if not question.body.stream:
            await unless_gone(request, running.finish())
            return JSONResponse(writer.answer())

        def error_event(error: ApiError) -> bytes:
            record.error = error
            return api.error_event(error)

        events = await open_stream(request, running.stream(writer), self._limits.silent_seconds, error_event)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass on what comes when it comes
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _prepared(self, content: bytes, api: Api, salt: bytes) -> tuple[Question, Completion]:
        """Reads a body in a thread; as many at the same time as requests may be served or wait."""
        if self._service.active + self._preparing >= self._service.most:
            raise overloaded(f"{self._service.most} requests are being served or wait, and no more are taken")

        def over(task: asyncio.Task[Any]) -> None:
            self._preparing -= 1
            if not task.cancelled():
                task.exception()  # which somebody has seen, or nobody waits for

        self._preparing += 1
        reading = asyncio.create_task(asyncio.to_thread(self._prepare, content, api, salt))
        reading.add_done_callback(over)
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await asyncio.shield(reading)  # a thread cannot be stopped, and counts until it ends
        except TimeoutError:
            raise too_slow(self._limits.seconds) from None

    def _prepare(self, content: bytes, api: Api, salt: bytes) -> tuple[Question, Completion]:
        try:
            question = api.read(read_json(content))
            self._check_model(question.body.model)
            return question, Completion(question.body, self._model, secrets.randbits(32), salt)
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
