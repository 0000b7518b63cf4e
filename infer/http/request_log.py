"""What the server says of its work: a line for each request, its throughput now and then, why it ends. No prompts.

Lines go to the logger "v4_jax.serve"; `v4-jax serve` shows them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time

from v4_jax.infer.http.running import Running
from v4_jax.infer.http.service import LOG, Service
from v4_jax.infer.memory import peak_memory
from v4_jax.infer.openai.api import ApiError

REPORT_SECONDS = 10.0  # between two lines on throughput

_QUIET = ("/health", "/metrics")  # asked by machines all the time


@dataclasses.dataclass
class Record:
    """One request, as far as its line says.

    Attributes:
      method: of HTTP.
      path: asked for.
      status: of the answer; None as long as there is none.
      running: what was served.
      error: what went wrong.
      left: whether the client went away.
    """

    method: str
    path: str
    status: int | None = None
    running: Running | None = None
    error: ApiError | None = None
    left: bool = False

    def __post_init__(self) -> None:
        self._begun = time.monotonic()

    def close(self) -> None:
        """Writes the line."""
        level = logging.DEBUG if self.path in _QUIET else logging.INFO
        LOG.log(level, "%s", self.line())

    def line(self) -> str:
        """What was asked and what became of it."""
        said = [f"{self.method} {_plain(self.path)} {self.status or 500}"]
        if self.running is not None:
            completion, first = self.running.completion, self.running.first
            cached = f" ({completion.cached:,} cached)" if completion.cached else ""
            said.append(f"{completion.prompt_tokens:,} prompt tokens{cached}, {completion.new_tokens:,} new")
            if first is not None:
                said.append(f"first after {first:.2f} s")
        said.append(f"{time.monotonic() - self._begun:.2f} s")
        return ", ".join(said) + (f": {why}" if (why := self._why()) else "")

    def _why(self) -> str:
        """Why it ended. An error's own words may hold what was asked."""
        if self.error is not None:
            return " ".join(
                ["error", *filter(None, (self.error.code, self.error.param and f"in {_plain(self.error.param)}"))]
            )
        if self.running is None:
            return "the client left" if self.left else ""
        completion = self.running.completion
        if not completion.done:
            return "the client left"
        return ", ".join(dict.fromkeys(completion.finish_reason(choice) or "" for choice in completion.choices))


def _plain(text: str) -> str:
    """A client's word, as a part of a line."""
    return text[:80].encode("unicode_escape").decode()


async def report(service: Service, seconds: float = REPORT_SECONDS) -> None:
    """Writes a line on throughput every some seconds in which something was done, forever."""
    engine = service.engine
    read, made, then = engine.tokens_read, service.generated, time.monotonic()
    while True:
        await asyncio.sleep(seconds)
        now = time.monotonic()
        new = engine.tokens_read - read, service.generated - made
        if any(new):
            reading, making = (count / (now - then) for count in new)
            LOG.info(
                f"reads {reading:,.1f} and generates {making:,.1f} tokens/s; {service.active} requests, of which "
                f"{engine.waiting} wait; {engine.pages_used:,} of {engine.pages:,} pages; memory at most "
                f"{peak_memory()[0] / 1e9:,.2f} GB"
            )
        read, made, then = engine.tokens_read, service.generated, now
