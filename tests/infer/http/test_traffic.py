"""The server among many clients: those that stall, wait, leave or are too many; and what its log says of them."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time

import httpx
import openai
import pytest

from tests.infer.serving import LENGTH, MOST, SLOTS, Slow, serving, until
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.http.connections import ConnectionLimits
from v4_jax.infer.http.request_log import report
from v4_jax.infer.http.server import Limits
from v4_jax.infer.http.service import Service


def test_limits(parts):
    with serving(parts, limits=Limits(body_bytes=1000, seconds=0.0)) as (address, service):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIStatusError, match="more than the 1,000 bytes") as caught:
            client.completions.create(model="tiny", prompt="x" * 1000)
        assert caught.value.status_code == 413
        with pytest.raises(openai.APIStatusError, match="took longer than 0 s") as caught:
            client.completions.create(model="tiny", prompt="x")
        assert caught.value.status_code == 408 and caught.value.response.headers["x-should-retry"] == "false"
        until(lambda: service.active == 0 and parts[0].idle)


def test_half_sent_requests_shut_nobody_out(parts):
    """Whatever they leave out, they are ended."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    limits = ConnectionLimits(header_seconds=0.5, connections=8)
    with serving(parts, limits, limits=Limits(body_seconds=0.5)) as (address, _):
        url = httpx.URL(address)

        def opened(text):
            found = socket.create_connection((url.host, url.port), timeout=30)
            found.sendall(text)
            return found

        def answer(one):
            with one, contextlib.suppress(ConnectionResetError):
                return b"".join(iter(lambda: one.recv(4096), b""))
            return b""

        halves = [
            opened(text) for text in (b"", b"POST", head, head[:-5], head + b"X: y\r\n", b"GET /health HTTP/1.1\r\n")
        ]
        bodies = [opened(head + b"\r\n" + body) for body in (b"", b'{"prompt": ')]
        assert [answer(half) for half in halves] == [b""] * len(halves)
        for body in bodies:
            said = answer(body)
            assert said.startswith(b"HTTP/1.1 408 ") and b"the body took longer than 0.5 s" in said
        again = head + b"\r\n" + b'{"prompt": "x", "max_tokens": 1}'.ljust(100) + b"GET /hea"  # and half a second one
        assert answer(opened(again)).startswith(b"HTTP/1.1 200 OK")
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_silent_stream_says_that_it_is_there(parts):
    """Before its first token, and where what is generated cannot be shown yet; what goes wrong later is an event."""

    class Busy(Slow):
        def round(self):
            time.sleep(0.02)
            return []

    asked = {"prompt": "Hello", "max_tokens": 20, "stream": True}

    def lines(address, **fields):
        with httpx.stream("POST", f"{address}/v1/completions", json=asked | fields) as response:
            assert response.status_code == 200 and response.headers["cache-control"] == "no-cache"
            return [line for line in response.iter_lines() if line]

    with serving((Busy(parts[0]), parts[1]), limits=Limits(seconds=2.0, silent_seconds=0.1)) as (address, service):
        *silence, said = lines(address)
        assert len(silence) > 2 and set(silence) == {": keep-alive"}
        assert json.loads(said.removeprefix("data: "))["error"]["code"] == "timeout"
        until(lambda: service.active == 0)
    parts[0].round()
    with serving((Slow(parts[0]), parts[1]), limits=Limits(silent_seconds=0.1)) as (address, _):
        [z] = parts[1].tokenizer.encode("z")  # what may be a stop string is held back
        held = lines(address, logit_bias={z: 100}, stop="z" * 30)
        assert ": keep-alive" in held and held[-1] == "data: [DONE]" and "zzz" in "".join(held)
        message = httpx.post(f"{address}/v1/completions", json=asked | {"max_tokens": LENGTH}).json()  # a status yet
        assert message["error"]["code"] == "context_length_exceeded"
    assert parts[0].idle


def test_pages_of_some_origins_may_ask(parts):
    with serving(parts, keys=["one"], origins=["https://here.test"]) as (address, _):
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        for origin, status in (("https://here.test", 200), ("https://there.test", 400)):
            may = httpx.options(f"{address}/v1/completions", headers={"Origin": origin} | asks)
            assert may.status_code == status
            assert (may.headers.get("access-control-allow-origin") == origin) == (status == 200)
        refused = httpx.get(f"{address}/v1/models", headers={"Origin": "https://here.test"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://here.test"
    with serving(parts) as (address, _):
        assert "access-control-allow-origin" not in httpx.get(f"{address}/health", headers={"Origin": "x"}).headers


def test_each_request_has_a_line_without_its_prompt(parts, caplog):
    caplog.set_level("INFO", "v4_jax.serve")
    with serving(parts) as (address, service):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        asked = dict(model="tiny", max_tokens=3, logit_bias={1: -100})
        client.completions.create(prompt="secret", **asked)
        list(client.chat.completions.create(messages=[{"role": "user", "content": "secret"}], stream=True, **asked))
        for wrong in (
            dict(prompt="secret", temperature=9),
            dict(prompt="secret" * LENGTH),
            dict(prompt=["secret", ""]),
        ):
            with pytest.raises(openai.BadRequestError):
                client.completions.create(**asked | wrong)
        with client.completions.create(prompt="secret", stream=True, **asked | {"max_tokens": 1500}) as stream:
            next(iter(stream))
        httpx.get(f"{address}/no%0Apath")
        until(lambda: service.active == 0 and parts[0].idle)
    lines = [line for line in caplog.messages if not line.startswith("reads ")]
    assert "secret" not in " ".join(lines) and all("\n" not in line for line in lines)
    for line, expected in zip(
        lines,
        (
            r"POST /v1/completions 200, 7 prompt tokens, 3 new, first after \d.\d\d s, \d.\d\d s: length",
            r"POST /v1/chat/completions 200, \d+ prompt tokens, 3 new, first after .* s: length",
            r"POST /v1/completions 400, .* s: error in temperature",
            r"POST /v1/completions 400, 9,217 prompt tokens, 0 new, .* s: error context_length_exceeded",
            r"POST /v1/completions 400, .* s: error in prompt",
            r"POST /v1/completions 200, 7 prompt tokens, \d+ new, first after .* s: the client left",
            r"GET /no\\npath 404, .* s",
            r"ends; 0 requests are cut short",
        ),
        strict=True,
    ):
        assert re.fullmatch(expected, line), line


def test_throughput_is_said_while_there_is_some(parts, caplog):
    caplog.set_level("INFO", "v4_jax.serve")

    async def scenario():
        service = Service(parts[0], MOST)
        await service.start()
        reporting = asyncio.create_task(report(service, 0.05))
        await asyncio.sleep(0.12)
        assert not caplog.messages
        async for _ in service.tokens([Request([3] * 300, 200, stop_ids=())], lambda event: False):
            pass
        await asyncio.sleep(0.12)
        said = len(caplog.messages)
        await asyncio.sleep(0.12)
        assert said == len(caplog.messages) > 0
        reporting.cancel()
        await service.close()

    asyncio.run(scenario())
    for line in caplog.messages:
        found = re.fullmatch(
            r"reads ([\d,.]+) and generates ([\d,.]+) tokens/s; [01] requests, of which 0 wait; \d of 24 pages; "
            r"memory at most [\d.]+ GB",
            line,
        )
        assert found, line


def test_overload_is_turned_away_and_dropped_clients_leave(parts):
    """As many streams as there may be; one more is told to come back; all leave, and everything is free again."""
    with serving((Slow(parts[0]), parts[1])) as (address, service):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        long = dict(model="tiny", prompt="Hello", max_tokens=1500, seed=1)
        streams = [client.completions.create(**long, stream=True) for _ in range(SLOTS)]
        for stream in streams:
            next(stream)
        waiting = [threading.Thread(target=_give_up, args=(address, long)) for _ in range(MOST - SLOTS)]
        for thread in waiting:
            thread.start()
        until(lambda: service.active == MOST)
        with pytest.raises(openai.RateLimitError, match="4 requests are being served or wait") as caught:
            client.completions.create(model="tiny", prompt="x")
        assert caught.value.response.headers["Retry-After"] == "1"
        for thread in waiting:
            thread.join()
        until(lambda: service.active == SLOTS)
        for stream in streams:
            stream.close()
        until(lambda: service.active == 0 and parts[0].idle)
        assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices


def _give_up(address, body):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/completions", json=body, timeout=2)
