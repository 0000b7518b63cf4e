"""A few prompts continued at once, by an engine that does nothing else meanwhile; with counts and times."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from v4_jax.infer.chunks import Progress
from v4_jax.infer.engine.requests import Event, Request
from v4_jax.infer.engine.scheduler import Engine


class Generation:
    """Requests that are in line: iterate to get their tokens, as `Event`s that number requests in the order given.

    Args:
      engine: an idle engine.
      requests: what to continue.
      progress: called with (prompt tokens read, prompt tokens in all) while prompts are read.

    Attributes:
      prompt_tokens: prompt tokens, all requests together.
      new_tokens: tokens yielded so far.
      prefill_seconds: time from the start of the iteration to the first token, compilation excluded.
      decode_seconds: time from the first token to the last one yielded.
      first_tokens: tokens that came together with the first one, and belong to the prefill's time.

    Raises:
      ValueError: the engine is at work, or a request that it cannot serve.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], progress: Progress | None = None) -> None:
        if not engine.idle:
            raise ValueError("the engine is at work for others; expected an idle one")
        self._engine, self._progress = engine, progress
        self._numbers: list[int] = []
        try:
            for request in requests:
                self._numbers.append(engine.submit(request))
        except ValueError:
            for row in range(len(self._numbers)):
                self.stop(row)
            raise
        self.prompt_tokens = sum(len(request.prompt) for request in requests)
        self.new_tokens = self.first_tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0

    def stop(self, row: int) -> None:
        """Ends a request after the tokens that it has already yielded."""
        self._engine.cancel(self._numbers[row])

    def __iter__(self) -> Iterator[Event]:
        engine = self._engine
        engine.compile()
        started, before = time.perf_counter(), engine.tokens_read
        first: float | None = None
        together = False  # whether what comes now came with the first token

        def new_round() -> None:
            nonlocal together
            together = False
            if self._progress is not None and engine.tokens_read - before < self.prompt_tokens:
                self._progress(engine.tokens_read - before, self.prompt_tokens)

        for event in engine.run(new_round):
            now = time.perf_counter()
            if first is None:
                first, together, self.prefill_seconds = now, True, now - started
            self.first_tokens += together
            self.new_tokens += 1
            self.decode_seconds = now - first
            yield event._replace(request=event.request - self._numbers[0])
