"""One prompt's answer, shown as it comes, with its counts and times."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any

from v4_jax.commands.shared.console import CommandError, progress_bar
from v4_jax.commands.shared.engines import compile_engine, describe_drafts
from v4_jax.commands.shared.reply import Writer
from v4_jax.commands.shared.speed import memory_text, rate_text
from v4_jax.infer.engine.requests import NOT_FINITE, Event, Request
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.engine.speculative import Acceptance
from v4_jax.infer.generate import Generation
from v4_jax.infer.memory import peak_memory
from v4_jax.infer.text import Reply

_ENDS = {"stop": "end of text", "length": "token limit"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished generation.

    Attributes:
      generation: its counts and times.
      compile_seconds: time spent compiling.
      ids: the tokens generated, a final stop token included.
      logprobs: their log-probabilities.
      finish: "stop" (a stop token), "stop string", "length" or "interrupt".
      acceptance: how many drafts were right, by depth.
      cached: tokens of the prompt that were not read, as they were in the prefix cache.
    """

    generation: Generation
    compile_seconds: float
    ids: list[int]
    logprobs: list[float]
    finish: str
    acceptance: list[Acceptance]
    cached: int

    def speed(self) -> dict[str, Any]:
        """Counts and times, prefill and decoding apart; the first token counts as prefill."""
        run = self.generation
        peak, of_device = peak_memory()
        return {
            "prompt_tokens": run.prompt_tokens,
            "cached_tokens": self.cached,
            "prefill_seconds": round(run.prefill_seconds, 4),
            "first_token_seconds": round(run.prefill_seconds, 4),
            "new_tokens": run.new_tokens,
            "decode_seconds": round(run.decode_seconds, 4),
            "compile_seconds": round(self.compile_seconds, 4),
            "drafts": [one._asdict() for one in self.acceptance],
            "peak_bytes": peak,
            "peak_bytes_of": "device" if of_device else "process",
        }

    def summary(self) -> str:
        """One line for the reader."""
        run = self.generation
        compiled = f"compiled in {self.compile_seconds:.1f} s, " if self.compile_seconds >= 0.05 else ""
        return (
            f"prefill {rate_text(run.prompt_tokens - self.cached, run.prefill_seconds)}"
            + (f" after {self.cached} cached ones" if self.cached else "")
            + f", first token after {run.prefill_seconds:.2f} s, "
            f"decode {rate_text(run.new_tokens - run.first_tokens, run.decode_seconds)}, "
            f"{compiled}{memory_text()}, ended by {_ENDS.get(self.finish, self.finish)}"
            + (f", {drafts}" if (drafts := describe_drafts(self.acceptance)) else "")
        )


class _Stopped(Exception):
    """Somebody wants no more of it."""


def stream(
    engine: Engine,
    request: Request,
    reply: Reply,
    writer: Writer | None,
    stopped: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Generates from one prompt, feeding the reply and writing its pieces as they become certain.

    The engine is idle again when it returns.

    Args:
      engine: runs the model.
      request: what to continue; the text of a token that stops it is not part of the reply.
      reply: collects the text.
      writer: shows it; None to show nothing.
      stopped: asked between chunks and tokens whether somebody wants no more of it.
    """
    compile_seconds = compile_engine(engine)
    made: list[int] = []
    logprobs: list[float] = []
    finish, cached, ended = "length", 0, False
    with progress_bar("reading the prompt", "tokens") as report:

        def progress(done: int, total: int) -> None:
            if stopped():
                raise _Stopped
            report("", done, total)

        generation = Generation(engine, [request], progress)
        running = iter(generation)
        first: list[Event] = []
        with contextlib.suppress(_Stopped):
            first = [next(running)]
    try:
        for event in itertools.chain(first, running):
            if event.finish == "error":
                raise CommandError(f"{NOT_FINITE} (after {len(made)} tokens)")
            made.append(event.id)
            logprobs.append(event.logprob)
            finish, cached, ended = event.finish or finish, event.cached, event.finish is not None
            pieces = reply.push(event.id) if event.finish != "stop" else []
            if writer:
                writer.write(pieces)
            if reply.stopped:
                finish, ended = "stop string", True
            if ended or stopped():
                break
        if not ended:
            finish = "interrupt"
        last = reply.finish()
        if writer:
            writer.write(last)
    finally:
        if writer:
            writer.finish()
    generation.stop(0)
    for _ in engine.run():
        pass
    return Outcome(generation, compile_seconds, made, logprobs, finish, engine.acceptance, cached)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Notes Ctrl-C in place of an exception, which would leave the engine in the middle of something; a second one ends
    the program.

    Yields:
      Whether it came.
    """
    came = False

    def note(*_: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)
