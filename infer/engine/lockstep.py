"""One engine in several processes: the first one leads, the others follow it call by call.

Each process has an engine over its share of the devices, and their programs wait for each other. An engine decides by
what is asked of it alone. So the leader, which clients talk to, tells the followers before each round what it was asked
since the last one, as JSON over TCP; with the same calls in the same order they start the same programs. A batch file
needs none of this: all processes read it.

A connection that closes means that a process has ended. A thread that does nothing else notices at once: the others may
by then be waiting for its devices, and would wait for long.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from v4_jax.infer.engine.grammar import Grammars, Source
from v4_jax.infer.engine.requests import Event, Request
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.engine.scheduler import Engine

_SUBMIT, _CANCEL, _CLOSE = "submit", "cancel", "close"  # calls, as they are told
_LARGEST_ADDRESS = 1024  # bytes of what the leader tells of itself
# Seconds: a host that is gone without a word is asked after 5, and given up after 3 questions of 2 each.
_KEEP_ALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))


class ProcessLost(RuntimeError):
    """One of the processes that run an engine together has ended."""


class LeadingEngine(Engine):
    """The first process's engine, whose calls those of the others repeat.

    Args:
      followers: the others.
      arguments: of `Engine`, and likewise `options`.
    """

    def __init__(self, followers: Followers, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._followers = followers
        self._calls: list[list[Any]] = []  # since the last round

    def submit(self, request: Request) -> int:
        """As `Engine.submit`."""
        number = super().submit(request)
        self._calls.append([_SUBMIT, as_json(request)])
        return number

    def cancel(self, request: int, sample: int | None = None) -> None:
        """As `Engine.cancel`."""
        super().cancel(request, sample)
        self._calls.append([_CANCEL, request, sample])

    def round(self) -> list[Event]:
        """As `Engine.round`, in all processes.

        Raises:
          ProcessLost: one of them has ended.
        """
        self._followers.tell(self._calls)
        self._calls = []
        return super().round()

    def close(self) -> None:
        """As `Engine.close`; the followers' engines are closed, too."""
        self._followers.dismiss()
        super().close()


class Followers:
    """The other processes, as the leader sees them.

    Args:
      connections: to each of them, by number.

    Attributes:
      dismissed: whether they were told to end.
    """

    def __init__(self, connections: dict[int, Connection]) -> None:
        self._connections = connections
        self.dismissed = False

    def watch(self, lost: Callable[[ProcessLost], None]) -> None:
        """Calls `lost`, in a thread of its own, when one of them ends before it is dismissed; the others then end."""

        def watching() -> None:
            # A follower says nothing: it can be read from when it has ended.
            ended = wait(list(self._connections.values()))
            if not self.dismissed:
                lost(self._error(next(number for number, one in self._connections.items() if one in ended)))
                self.let_go()

        threading.Thread(target=watching, name="followers", daemon=True).start()

    def tell(self, calls: list[list[Any]]) -> None:
        """Tells all of them to make some calls, and a round.

        Raises:
          ProcessLost: one of them has ended.
        """
        message = json.dumps(calls).encode()
        for number, connection in self._connections.items():
            try:
                connection.send_bytes(message)
            except OSError:
                raise self._error(number) from None

    def dismiss(self) -> None:
        """Tells all of them to close their engines."""
        self.dismissed = True
        with contextlib.suppress(ProcessLost):
            self.tell([[_CLOSE]])

    def let_go(self) -> None:
        """Closes the connections, at which followers end."""
        for connection in self._connections.values():
            connection.close()

    def _error(self, number: int) -> ProcessLost:
        return ProcessLost(f"process {number} of {1 + len(self._connections)}, counted from 0, has ended")


def gather_followers() -> Followers:
    """Called by the first process, while the others call `find_leader`: waits until all of them are there."""
    key = secrets.token_bytes(32)
    with Listener(("0.0.0.0", 0), backlog=jax.process_count(), authkey=key) as listener:
        addresses = _own_addresses()
        _announce([addresses, listener.address[1], key.hex()])
        connections: dict[int, Connection] = {}
        while len(connections) < jax.process_count() - 1:
            with contextlib.suppress(AuthenticationError, EOFError, OSError):  # somebody else
                connection = listener.accept()
                connections[int(connection.recv_bytes(16))] = _kept_alive(connection)
    return Followers(dict(sorted(connections.items())))


def find_leader() -> Connection:
    """Called by all processes but the first, which calls `gather_followers`.

    Raises:
      ProcessLost: it cannot be reached.
    """
    addresses, port, key = _announce(None)
    for address in addresses:
        with contextlib.suppress(AuthenticationError, EOFError, OSError):
            connection = Client((address, port), authkey=bytes.fromhex(key))
            connection.send_bytes(str(jax.process_index()).encode())
            return _kept_alive(connection)
    raise ProcessLost(f"the first process is not reached at port {port} of {' or '.join(addresses)}")


def follow(engine: Engine, leader: Connection, grammars: Callable[[], Grammars]) -> None:
    """Makes the calls that the leader tells of, until it closes its engine.

    Args:
      engine: as the leader's.
      leader: what `find_leader` returned.
      grammars: makes what compiles constraints; called when the first one comes.

    Should the leader end before, this process ends at once, with exit status 1: it may be waiting for devices.
    """
    found: list[Grammars] = []

    def compiled(source: Source) -> Any:
        if not found:
            found.append(grammars())
        return found[0].compile(source)

    for calls in _messages(leader):
        for name, *arguments in calls:
            if name == _SUBMIT:
                engine.submit(from_json(arguments[0], compiled))
            elif name == _CANCEL:
                engine.cancel(*arguments)
            else:
                engine.close()
                return
        engine.round()


def _messages(leader: Connection) -> Iterator[list[list[Any]]]:
    """What the leader says, read ahead by a thread, which ends the process with the leader."""
    told: queue.SimpleQueue[list[list[Any]]] = queue.SimpleQueue()

    def reading() -> None:
        calls: list[list[Any]] = []
        try:
            while [_CLOSE] not in calls:
                calls = json.loads(leader.recv_bytes())
                told.put(calls)
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=reading, name="leader", daemon=True).start()
    while True:
        yield told.get()


def as_json(request: Request) -> dict[str, Any]:
    """A request as JSON's values."""
    values = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    for name in ("prompt", "stop_ids", "reasoning_end", "opening"):
        values[name] = None if values[name] is None else [int(token) for token in values[name]]
    values["sampling"] = dataclasses.asdict(request.sampling)
    values["sampling"]["logit_bias"] = list(request.sampling.logit_bias.items())
    values["constraint"] = None if request.constraint is None else request.constraint.source
    values["salt"] = request.salt.hex()
    return values


def from_json(values: dict[str, Any], compiled: Callable[[Source], Any]) -> Request:
    """Inverse of `as_json`.

    Args:
      values: what it returned, perhaps as text and back.
      compiled: compiles a grammar.
    """
    sampling = values["sampling"] | {"logit_bias": dict(values["sampling"]["logit_bias"])}
    constraint = values["constraint"] and compiled(Source(*values["constraint"]))
    changed = {"sampling": Sampling(**sampling), "constraint": constraint, "salt": bytes.fromhex(values["salt"])}
    for name in ("stop_ids", "reasoning_end", "opening"):
        changed[name] = None if values[name] is None else tuple(values[name])
    return Request(**values | changed)


def _announce(what: Any) -> Any:
    """What the first process has to say, in all of them."""
    text = np.zeros(_LARGEST_ADDRESS, np.uint8)
    encoded = np.frombuffer(json.dumps(what).encode(), np.uint8)
    text[: len(encoded)] = encoded
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes().rstrip(b"\0"))


def _own_addresses() -> list[str]:
    """Where other hosts may reach this one, the likeliest first; and where processes of this host do."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it says which of the host's addresses leads out
        found.append(probe.getsockname()[0])
    return [*found, socket.gethostname(), "localhost"]


def _kept_alive(connection: Connection) -> Connection:
    """A connection that notices when the other host is gone."""
    with socket.socket(fileno=os.dup(connection.fileno())) as shared:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE:
            if hasattr(socket, name):
                shared.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
