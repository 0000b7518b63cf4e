"""Of more connections than there may be, those that are only held give way to those that ask something."""

import asyncio
import contextlib
import socket
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from v4_jax.infer.http.connections import ConnectionLimits, http_protocol

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
SLOW = GET.replace(b"/ ", b"/slow ")
HALVES = (b"", GET, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12")


async def echo(request):
    return PlainTextResponse(await request.body() or b"hello")


async def late(request):
    await asyncio.sleep(1.5)
    return PlainTextResponse("late")


@contextlib.contextmanager
def serving(**limits):
    app = Starlette(routes=[Route("/", echo, methods=["GET", "POST"]), Route("/slow", late)])
    protocol = http_protocol(ConnectionLimits(**limits))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", http=protocol))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join()


def rest(client):
    """What still comes, until the server ends the connection."""
    client.settimeout(20)
    with contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: client.recv(4096), b""))
    return b""


def test_connections_that_are_only_held_keep_nobody_out():
    """Neither silent ones nor half requests, many more of them than there may be."""
    with serving(connections=4) as address, contextlib.ExitStack() as stack:
        for number in range(15):
            held = stack.enter_context(socket.create_connection(address))
            with contextlib.suppress(OSError):
                held.sendall(HALVES[number % 3])
        for _ in range(6):
            with socket.create_connection(address) as client:
                client.sendall(GET + b"Connection: close\r\n\r\n")
                assert rest(client).endswith(b"hello")


def test_those_that_are_answered_stay():
    with serving(connections=2) as address, contextlib.ExitStack() as stack:
        answered = [stack.enter_context(socket.create_connection(address)) for _ in range(2)]
        for one in answered:
            one.sendall(SLOW + b"Connection: close\r\n\r\n")
        time.sleep(0.4)
        with socket.create_connection(address) as client:
            assert rest(client).startswith(b"HTTP/1.1 503 Service Unavailable")
        assert all(rest(one).endswith(b"late") for one in answered)
    with serving(connections=2) as address:  # and there is room again
        for _ in range(5):
            with socket.create_connection(address) as client:
                client.sendall(GET + b"Connection: close\r\n\r\n")
                assert rest(client).endswith(b"hello")
