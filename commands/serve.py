"""`v4-jax serve`: OpenAI's API and Anthropic's over HTTP."""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
from typing import Any

import jax

from v4_jax.chat import Mode
from v4_jax.commands.shared.console import CommandError, bad_input, needs, read_text, say
from v4_jax.commands.shared.contexts import DEFAULT_MAX_TOKENS, check_mode, context_of
from v4_jax.commands.shared.devices import join
from v4_jax.commands.shared.engines import EngineOptions, PrefixOptions
from v4_jax.commands.shared.models import ModelDirectory
from v4_jax.commands.shared.options import (
    Count,
    Flag,
    Model,
    OptionalCount,
    OptionalFile,
    OptionalSize,
    OptionalText,
    Profile,
    Size,
)
from v4_jax.commands.shared.profiling import check_profile, profiled
from v4_jax.commands.shared.sampling import SamplingOptions
from v4_jax.infer.engine.grammar import Grammars
from v4_jax.infer.engine.lockstep import LeadingEngine, find_leader, follow, gather_followers
from v4_jax.infer.engine.scheduler import Engine

KEY = "V4_JAX_API_KEY"
MOST_SLOTS = 1 << 30  # that could be of use: clients are as many as come


def serve(
    model: Model,
    *,
    host: str = "127.0.0.1",
    port: Count = 8000,
    name: OptionalText = None,
    context: OptionalSize = None,
    max_tokens: Count = DEFAULT_MAX_TOKENS,
    mode: Mode = "non-think",
    effort_profile: Profile = "auto",
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
    keys: OptionalFile = None,
    requests: OptionalCount = None,
    max_body: Size = 32 << 20,
    timeout: Count = 3600,
    header_timeout: Count = 10,
    body_timeout: Count = 60,
    idle_timeout: Count = 60,
    connections: Count = 1024,
    keep_alive: Count = 15,
    origins: OptionalText = None,
    quiet: Flag = False,
    profile: OptionalFile = None,
    share_prefixes: Flag = False,
    engine: EngineOptions = EngineOptions(prefix=PrefixOptions(prefix_memory=1 << 30)),  # noqa: B008 (frozen)
    distributed: Flag = False,
) -> None:
    """Serves a model over HTTP by OpenAI's API (chat completions, completions, responses) and Anthropic's (messages).

    Answers come streamed or whole.

    Reasoning comes apart from the answer, as reasoning_content, and may be asked for by reasoning_effort ("none",
    "low", "high", "max") or by DeepSeek's "thinking". /metrics is for Prometheus, /health for load balancers,
    /openapi.json says what is understood.

    A line on stderr says of each request how much was read and generated and why it ended, never a prompt; another one
    says now and then how many tokens a second that is.

    On SIGTERM or Ctrl-C it drains, answering the requests that it has, and exits; a second one ends it at once.

    Examples:
      v4-jax serve DeepSeek-V4-Flash --mesh tensor=8 --memory 8G --context 128K
      V4_JAX_API_KEY=secret v4-jax serve DeepSeek-V4-Flash --host 0.0.0.0
      curl localhost:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "The sky is"}'

    Args:
      model: A directory with a released model, or one made by convert.
      host: Address to listen at; 0.0.0.0 is every one that the machine has.
      port: Port to listen at.
      name: What clients call the model. Default: the directory's name.
      context: Most tokens of a prompt and its answer. Default: 32K, or what the model has.
      max_tokens: Most tokens of an answer whose request does not say.
      mode: How a chat is answered whose request does not say: at once, or after reasoning with little, high or the most
        effort.
      effort_profile: What the model takes its reasoning efforts for: preview, official (Flash-0731, Pro-0813), or auto,
        which its own encoding says.
      sampling: How tokens are chosen, where the request does not say.
      keys: A file with the keys that let clients in, one a line; they send one as Authorization: Bearer KEY, or as
        x-api-key: KEY. Default: the one in V4_JAX_API_KEY, or else everybody is let in.
      requests: Requests that are served or wait at the same time; further ones are turned away with 429. Default: four
        times the slots.
      max_body: Bytes of a request's body.
      timeout: Seconds that a request may take.
      header_timeout: Seconds from a connection's start to the end of a request's header.
      body_timeout: Seconds from there to the end of its body.
      idle_timeout: Seconds that a client may leave its answer unread.
      connections: Connections at the same time. A further one takes the place of the one whose request has been missing
        longest; it is turned away with 503 if none is.
      keep_alive: Seconds of silence after which a stream says that it is there: in line, while its prompt is read.
      origins: Web pages whose scripts may ask (CORS), such as https://example.org, separated by commas; * is all.
      profile: A directory for a trace of the first 64 chunks and steps, for XProf or Perfetto.
      quiet: No lines on requests and throughput.
      share_prefixes: Keep the prompts of all keys in one cache. Otherwise no key learns, from counts of cached tokens
        or from time, what another one asked.
      engine: How requests are served.
      distributed: This is one of several processes, one per host, that serve one model together. The first one listens;
        the others work for it until it ends. Should one of them end, requests get 503 from then on.
    """
    with needs("serve"):
        import uvicorn

        from v4_jax.infer.http.connections import ConnectionLimits, http_protocol
        from v4_jax.infer.http.server import Limits, make_app
        from v4_jax.infer.http.service import Service
        from v4_jax.infer.openai.completions import Defaults
        from v4_jax.infer.openai.completions import Model as Served

    check_profile(profile)
    join(distributed)
    directory = ModelDirectory.open(model)
    engine.check(directory)
    config, tokenizer, release = directory.config, directory.tokenizer(), directory.generation_defaults()
    length = context_of(config, context)
    efforts = directory.effort_profile(effort_profile)
    check_mode(mode, length, efforts)
    with bad_input():
        chosen = sampling.over(release, seed=0)
    if distributed and jax.process_index():
        _follow(engine, directory, length)
        return
    legal = _keys(keys)
    listening = _listen(host, port)
    followers = gather_followers() if distributed and jax.process_count() > 1 else None
    kind = Engine if followers is None else functools.partial(LeadingEngine, followers)
    server = engine.build(directory, length, MOST_SLOTS, kind)
    defaults = Defaults(chosen, release.stop_ids, max_tokens, mode, efforts)
    served = Served(name or directory.path.name, config, tokenizer, defaults, length, server.slots)
    service = Service(server, requests or 4 * server.slots)
    if followers is not None:
        followers.watch(service.fail)
        _stay_until_the_end()
    app = make_app(
        service,
        served,
        keys=legal,
        limits=Limits(max_body, float(timeout), float(body_timeout), float(keep_alive)),
        share_prefixes=share_prefixes,
        origins=[origin.strip() for origin in (origins or "").split(",") if origin.strip()],
    )
    protocol = http_protocol(ConnectionLimits(float(header_timeout), float(idle_timeout), connections))
    settings = uvicorn.Config(app, http=protocol, log_level="warning", lifespan="on")
    address = f"{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    say(f"serving {served.name} at http://{address}/v1" + ("" if legal else ", without keys"))
    _log(quiet)

    class Runner(uvicorn.Server):
        """Says what ends it."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            say(f"{signal.Signals(sig).name}: no more requests are taken, {service.active} are answered yet")
            super().handle_exit(sig, frame)

    with profiled(server, profile):
        Runner(settings).run(sockets=[listening])
    if followers is not None and not followers.dismissed:
        # It was told twice, or the engine has failed, and a thread waits for devices that are gone: nothing is left to
        # wait for, and the others end with this process.
        logging.shutdown()
        os._exit(1)


def _follow(engine: EngineOptions, directory: ModelDirectory, context: int) -> None:
    """What every process but the first does."""
    _stay_until_the_end()
    leader = find_leader()
    follow(engine.build(directory, context, MOST_SLOTS), leader, lambda: Grammars(directory.tokenizer()))


def _stay_until_the_end() -> None:
    """Lets no signal end this process: all of a pod get them, the first one drains, and then all end together."""
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda number, frame: None)


def _log(quiet: bool) -> None:
    """Shows what the server says of its work: all of it, or what is serious alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("v4_jax.serve")
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    logger.propagate = False


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded for it."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"cannot listen at {host} port {port}: {reason}") from None


def _keys(path: Any) -> list[str]:
    """The keys of a file, or of the environment, as it may be read from one."""
    if path is None and not os.environ.get(KEY):
        return []
    where, text = (KEY, os.environ[KEY]) if path is None else (path, read_text(path))
    found = text.split()
    if not found:
        raise CommandError(f"{where} holds no keys; expected one a line")
    return found
