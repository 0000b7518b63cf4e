"""The engine as a service: one thread runs it, coroutines wait for their tokens.

The engine belongs to its thread alone. What others want of it, they put in a line that the thread takes up between two
rounds; what comes out of a round is handed to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from v4_jax.infer.engine.lockstep import ProcessLost
from v4_jax.infer.engine.requests import Event, Request
from v4_jax.infer.engine.scheduler import Engine

LOG = logging.getLogger("v4_jax.serve")


class Overloaded(Exception):
    """More requests than the service takes at once; those that are there go on."""


class ServiceDown(Exception):
    """The engine has failed, or the service is closed."""


class Service:
    """Serves requests of many coroutines with one engine.

    Args:
      engine: compiled and idle; the service's own from here on.
      most: requests that are served or wait at the same time.

    Attributes:
      engine: as given.
      most: as given.
      generated: tokens so far, of all requests.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        self.engine, self.most, self.generated = engine, most, 0
        self._wanted: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, asyncio.Queue[Event | Exception]] = {}
        self._submitting: set[asyncio.Future[list[int]]] = set()
        self._active = 0
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def active(self) -> int:
        """Requests that are served or wait."""
        return self._active

    @property
    def alive(self) -> bool:
        """Whether requests can be served."""
        return self._thread is not None and self._thread.is_alive() and self._failure is None

    @property
    def down(self) -> str:
        """Why requests cannot be served, where they cannot: a sentence for clients."""
        why = f": {self._failure}" if isinstance(self._failure, ProcessLost) else ""
        return f"the engine does not run{why}"

    def fail(self, error: Exception) -> None:
        """Ends the service from any thread: requests fail, those to come, too."""
        if self._failure is None:
            self._failure = error
            what = error if isinstance(error, ProcessLost) else type(error).__name__
            LOG.critical("the engine has failed (%s): requests get 503 from now on", what)
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._fail, error)

    async def start(self) -> None:
        """Starts the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Stops the thread after its round; requests that are still there fail."""
        self._wanted.put(None)
        if self._failure is None:  # else it may be waiting for devices that are gone
            if self._thread is not None:
                await asyncio.to_thread(self._thread.join)
            await asyncio.to_thread(self.engine.close)
        for number in self._listeners:
            self.engine.cancel(number)
        self._fail(ServiceDown("the service is closed"))

    async def tokens(self, requests: Sequence[Request], ended_early: Callable[[Event], bool]) -> AsyncIterator[Event]:
        """Serves requests that belong together; leaving the iteration early frees their slots.

        Its events number the requests in the order given.

        Args:
          requests: legal for the engine.
          ended_early: whether a sample is to end after an event that does not end it.

        Raises:
          Overloaded: too many are there already; these would be one more, however many they are.
          ServiceDown: the engine has failed.
          ValueError: the engine refuses one of the requests.
        """
        if not self.alive:
            raise ServiceDown(self.down)
        if self._active >= self.most:
            raise Overloaded(f"{self._active} requests are being served or wait, and no more are taken")
        self._active += 1
        numbers: list[int] = []
        left = {(place, sample) for place, request in enumerate(requests) for sample in range(request.n)}
        try:
            numbers, events = await self._submit(requests)
            places = {number: place for place, number in enumerate(numbers)}
            while left:
                event = await events.get()
                if isinstance(event, Exception):
                    raise ServiceDown(self.down) from event
                number, event = event.request, event._replace(request=places[event.request])
                which = event.request, event.sample
                if which not in left:
                    continue  # it was ended by a token of the same round
                early = ended_early(event)
                if early and not event.finish:
                    self._ask(lambda number=number, sample=event.sample: self.engine.cancel(number, sample))
                if early or event.finish:
                    left.remove(which)
                yield event
        finally:
            self._active -= 1
            for place, number in enumerate(numbers):
                self._listeners.pop(number, None)
                if any(one == place for one, _ in left):
                    self._ask(lambda number=number: self.engine.cancel(number))

    async def _submit(self, requests: Sequence[Request]) -> tuple[list[int], asyncio.Queue[Event | Exception]]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[int]] = loop.create_future()
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()

        def cancel(numbers: Sequence[int]) -> None:
            for number in numbers:
                self.engine.cancel(number)

        def resolve(numbers: list[int], error: Exception | None) -> None:
            if answer.done():  # nobody waits for it any more
                self._ask(lambda: cancel(numbers))
            elif error is not None:
                answer.set_exception(error)
            else:
                self._listeners.update(dict.fromkeys(numbers, events))
                answer.set_result(numbers)

        def submit() -> None:
            numbers: list[int] = []
            try:
                for request in requests:
                    numbers.append(self.engine.submit(request))
            except ValueError as error:
                cancel(numbers)
                loop.call_soon_threadsafe(resolve, [], error)
            else:
                loop.call_soon_threadsafe(resolve, numbers, None)

        self._submitting.add(answer)
        self._ask(submit)
        try:
            return await answer, events
        finally:
            self._submitting.discard(answer)

    def _ask(self, action: Callable[[], None]) -> None:
        self._wanted.put(action)

    # ---- the engine's thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        assert self._loop is not None
        try:
            while True:
                actions = [self._wanted.get()] if self.engine.idle else []
                while not self._wanted.empty():
                    actions.append(self._wanted.get())
                for action in actions:
                    if action is None:
                        return
                    action()
                if events := self.engine.round():
                    self._loop.call_soon_threadsafe(self._deliver, events)
        except ProcessLost as error:
            self.fail(error)
        except Exception as error:
            self.fail(error)
            raise

    def _deliver(self, events: list[Event]) -> None:
        self.generated += len(events)
        for event in events:
            if listener := self._listeners.get(event.request):
                listener.put_nowait(event)

    def _fail(self, error: Exception) -> None:
        for listener in set(self._listeners.values()):
            listener.put_nowait(error)
        for answer in self._submitting:
            if not answer.done():
                answer.set_exception(ServiceDown(self.down))
