"""A request that is being served: its tokens from the engine as parts of an answer, in time or as an error."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from v4_jax.infer.engine.requests import Event, TooLong
from v4_jax.infer.http.metrics import Metrics
from v4_jax.infer.http.service import Overloaded, Service, ServiceDown
from v4_jax.infer.openai.api import RETRY_SECONDS, ApiError, Writer
from v4_jax.infer.openai.completions import Completion, Update

KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients leave unread

T = TypeVar("T")


def too_slow(seconds: float) -> ApiError:
    """A request took longer than it may."""
    return ApiError(408, f"the answer took longer than {seconds:g} s", code="timeout")


def overloaded(what: str) -> ApiError:
    """There are as many requests as there may be."""
    return ApiError(429, f"{what}; try again in {RETRY_SECONDS} s", kind="rate_limit_error")


class Running:
    """A completion that is being served.

    Args:
      service: serves it.
      completion: what is asked, and its answer as it grows.
      metrics: count it.
      seconds: that it may take.

    Attributes:
      completion: as given.
      first: seconds until its first token; None before.
      duration: seconds until its newest one.
    """

    def __init__(self, service: Service, completion: Completion, metrics: Metrics, seconds: float) -> None:
        self.completion, self._metrics = completion, metrics
        self._begun = time.monotonic()
        self._until, self._seconds = self._begun + seconds, seconds
        self._tokens = service.tokens(completion.requests, self._ended_early)
        self.first: float | None = None
        self.duration = 0.0

    async def stream(self, writer: Writer) -> AsyncIterator[bytes]:
        """A stream's events; until the first one, what goes wrong may still be an answer's status.

        Raises:
          ApiError: it is not served, or no further.
        """
        async with contextlib.aclosing(self):
            begun = False
            async for update in self._updates():
                if not begun:
                    begun = True
                    for event in writer.begin():
                        yield event
                for event in writer.update(update):
                    yield event
            for event in writer.end():
                yield event

    async def finish(self) -> None:
        """Waits for all tokens.

        Raises:
          ApiError: it is not served, or no further.
        """
        async with contextlib.aclosing(self):
            async for _ in self._updates():
                pass

    async def aclose(self) -> None:
        """Gives the slots back, if they are not free yet."""
        await self._tokens.aclose()  # type: ignore[attr-defined]

    async def _updates(self) -> AsyncIterator[Update]:
        """What each token adds."""
        completion, metrics = self.completion, self._metrics
        while (update := await self._next()) is not None:
            if self.first is None:
                self.first = self.duration
                metrics.prompt_tokens.inc(completion.prompt_tokens)
                metrics.cached_tokens.inc(completion.cached)
                metrics.first_token.observe(self.first)
            yield update
        made, samples = completion.new_tokens, len(completion.choices)
        metrics.duration.observe(self.duration)
        if made > samples and self.first is not None:  # one token of each is no distance from another
            metrics.between_tokens.observe((self.duration - self.first) * samples / (made - samples))

    def _ended_early(self, event: Event) -> bool:
        """Takes a token; whether it met a stop string."""
        self._newest = self.completion.push(event)
        return self._newest.choice.cut

    async def _next(self) -> Update | None:
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                await anext(self._tokens)
        except StopAsyncIteration:
            return None
        except TimeoutError:
            raise too_slow(self._seconds) from None
        except Overloaded as error:
            raise overloaded(str(error)) from None
        except ServiceDown as error:
            raise ApiError(503, str(error), kind="server_error") from None
        except ValueError as error:
            code = "context_length_exceeded" if isinstance(error, TooLong) else None
            raise ApiError(400, str(error), code=code) from None
        if failure := self.completion.failure:
            await self.aclose()
            raise ApiError(500, failure, kind="server_error", code="not_finite")
        self.duration = time.monotonic() - self._begun
        if self._newest.choice.new_tokens:
            self._metrics.generated_tokens.inc()
        return self._newest


async def open_stream(
    request: Request, events: AsyncIterator[bytes], seconds: float, error_event: Callable[[ApiError], bytes]
) -> AsyncIterator[bytes]:
    """Waits a while for a stream's first event, so that what goes wrong until then is the answer's status.

    Args:
      request: that it answers.
      events: of the stream.
      seconds: to wait, and after which silence is broken by a comment: proxies and clients end connections that say
        nothing, as a stream does in line, while a long prompt is read and while nothing that is generated can be shown.
      error_event: how what goes wrong later is said.

    Returns:
      the stream's events, with comments.

    Raises:
      ApiError: it is not served.
      ClientDisconnect: nobody waits for it any more.
    """
    line = _Line(events, seconds)
    try:
        first = await unless_gone(request, line.get())
        if isinstance(first, Exception):
            raise first
    except BaseException:
        await line.aclose()
        raise
    return _with_comments(first, line, error_event)


class _Line:
    """Events on their way to a client, each as soon as it is there.

    Args:
      events: to hand on, until they end or fail.
      seconds: after which silence is broken.
    """

    def __init__(self, events: AsyncIterator[bytes], seconds: float) -> None:
        self._waiting: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self._seconds = seconds
        self._task = asyncio.create_task(self._hand_on(events))

    async def get(self) -> bytes | Exception | None:
        """The next event, or a comment if there is none for some time; what went wrong; None at the end."""
        try:
            async with asyncio.timeout(self._seconds):
                return await self._waiting.get()
        except TimeoutError:
            return KEEP_ALIVE

    def get_nowait(self) -> bytes | Exception | None:
        """The next event, if there is one already, else no text."""
        return b"" if self._waiting.empty() else self._waiting.get_nowait()

    async def aclose(self) -> None:
        """Ends it, wherever it is."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _hand_on(self, events: AsyncIterator[bytes]) -> None:
        try:
            async with contextlib.aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    self._waiting.put_nowait(event)
        except Exception as error:
            self._waiting.put_nowait(error)
        else:
            self._waiting.put_nowait(None)


async def _with_comments(
    item: bytes | Exception | None, line: _Line, error_event: Callable[[ApiError], bytes]
) -> AsyncIterator[bytes]:
    """Events from the first one on; those that are there at the same time go together."""
    async with contextlib.aclosing(line):
        while item is not None:
            if isinstance(item, ApiError):
                yield error_event(item)
                return
            if isinstance(item, Exception):
                raise item
            together = [item]
            while isinstance(item := line.get_nowait(), bytes) and item:
                together.append(item)
            yield b"".join(together)
            if item == b"":
                item = await line.get()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
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
        return await task
    finally:
        for one in (task, watch):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await one
