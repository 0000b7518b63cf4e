"""Connections that nobody can hold for nothing: time for a request's header, time without progress, and their number.

uvicorn closes connections that are idle after an answer. Those that send half a request, or do not read their answer,
it keeps for as long as they like, and enough of them shut everybody else out. Here they have a time, and where there
are as many as there may be, a new one takes the place of the one whose request has been missing longest.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@dataclasses.dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may take.

    Attributes:
      header_seconds: from its start, or from the first byte of a further request, to the end of the header.
      idle_seconds: that it may leave an answer unread.
      connections: at the same time; further ones are turned away if the requests of all are there.
    """

    header_seconds: float = 10.0
    idle_seconds: float = 60.0
    connections: int = 1024


def http_protocol(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """uvicorn's protocol with limits: what its configuration takes as `http`."""

    class Limited(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """One connection."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._timers: dict[str, asyncio.TimerHandle] = {}
            self._begun = 0.0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begun = self.loop.time()
            self._expect("header", limits.header_seconds)
            if len(self.connections) > limits.connections:
                waiting = [one for one in self.connections if one is not self and one.lacks_request]
                if waiting:
                    min(waiting, key=lambda one: one._begun).transport.abort()
                else:
                    transport.write(_FULL)
                    transport.close()

        @property
        def lacks_request(self) -> bool:
            """Whether it is open, and the request that it is for is not there yet."""
            partial = self.cycle is None or self.cycle.response_complete or self.cycle.more_body
            return bool(partial and not self.transport.is_closing())

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._expect("header", limits.header_seconds)
            else:
                self._got("header")

        def pause_writing(self) -> None:
            super().pause_writing()
            self._expect("reader", limits.idle_seconds)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._got("reader")

        def connection_lost(self, exc: Exception | None) -> None:
            for name in list(self._timers):
                self._got(name)
            super().connection_lost(exc)

        def _expect(self, name: str, seconds: float) -> None:
            """Ends the connection after some time, unless `_got` comes first."""
            if name not in self._timers and not self.transport.is_closing():
                self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

        def _got(self, name: str) -> None:
            if timer := self._timers.pop(name, None):
                timer.cancel()

    return Limited
