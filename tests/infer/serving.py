"""A server in a thread, and engines to put behind it."""

import contextlib
import threading
import time

import uvicorn

from tests.models import two
from v4_jax.infer.engine.requests import Event
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.http.connections import ConnectionLimits, http_protocol
from v4_jax.infer.http.server import make_app
from v4_jax.infer.http.service import Service
from v4_jax.infer.openai.completions import Defaults, Model

HELLO = [{"role": "user", "content": "Hello"}]
SLOTS, LENGTH, MOST = 2, 1536, 4


def small_parts(tokenizer):
    """An engine, and what it serves."""
    tiny = two()
    engine = Engine(
        tiny.config,
        tiny.params,
        slots=SLOTS,
        max_length=LENGTH,
        prefill_chunk=32,
        policy="float32",
        cache_dtype="float32",
    )
    engine.compile()
    defaults = Defaults(Sampling(), (tiny.config.eos_token_id,), 8)
    return engine, Model("tiny", tiny.config, tokenizer, defaults, LENGTH, SLOTS)


@contextlib.contextmanager
def serving(parts, connections=None, **options):
    """A running server: its address and its service."""
    service = Service(parts[0], MOST)
    app = make_app(service, parts[1], **options)
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=http_protocol(connections or ConnectionLimits()), port=0, log_level="error", lifespan="on"
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Slow:
    """An engine that takes its time."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def round(self):
        time.sleep(0.02)
        return self._engine.round()


class Scripted:
    """An engine that says what it is told to, for what a model says only when it has learned to.

    Attributes:
      says: what comes next, request by request; what ends with EOS stops, other texts go on until they are cut.
      breaks_at: where its logits are no numbers: a place in what it says.
      asked: the requests so far.
    """

    slots, waiting, draft_depth, max_length, pages, pages_used, tokens_read = SLOTS, 0, 0, LENGTH, 24, 0, 0

    def __init__(self, model, *says):
        self._tokenizer, self._eos = model.tokenizer, model.config.eos_token_id
        self.says, self.asked, self._left = list(says), [], {}
        self.breaks_at = LENGTH

    @property
    def idle(self):
        return not self._left

    def submit(self, request):
        number = len(self.asked)
        self.asked.append(request)
        self._left[number] = self._tokenizer.encode(self.says.pop(0))[: min(request.max_tokens, self.breaks_at)]
        return number

    def round(self):
        events = []
        for number, left in list(self._left.items()):
            token = left.pop(0)
            end = "length" if self.breaks_at == LENGTH else "error"
            finish = "stop" if token == self._eos else None if left else end
            events.append(Event(number, 0, token, -0.5, finish))
            if finish:
                del self._left[number]
        return events

    def cancel(self, number, sample=None):
        self._left.pop(number, None)

    def close(self):
        pass
