"""What an engine is asked crosses to the other processes as it is, in order; and who ends is noticed."""

import dataclasses
import json
import multiprocessing
import os
import queue
import threading

import numpy as np
import pytest

from v4_jax.infer.engine.grammar import Grammars
from v4_jax.infer.engine.lockstep import Followers, LeadingEngine, ProcessLost, as_json, follow, from_json
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.tokenizer import ByteTokenizer

EVERYTHING = Request(
    prompt=np.asarray([5, 6, 7]),
    max_tokens=9,
    sampling=Sampling(0.7, 0.9, 40, 0.01, 2**32 - 1, {3: -100.0, 250: 1.5}, 1.1, 0.2, -0.3),
    stop_ids=(1, 2),
    n=2,
    top_logprobs=3,
    reasoning_end=(8, 9),
    reasoning_budget=0,
    opening=(4,),
    salt=b"\0\xff",
    echo=True,
)


def crossing(request, compiled=None):
    """A request after it went to another process."""
    return from_json(json.loads(json.dumps(as_json(request))), compiled)


@pytest.mark.parametrize("asked", [EVERYTHING, Request([3], 1), Request([3], 1, stop_ids=())])
def test_a_request_crosses_whole(asked):
    assert crossing(asked) == dataclasses.replace(asked, prompt=[int(token) for token in asked.prompt])


def test_every_field_is_tried():
    usual = Request([3], 1)
    same = [
        field.name
        for field in dataclasses.fields(Request)
        if getattr(EVERYTHING, field.name) is getattr(usual, field.name)
    ]
    assert same == ["constraint"]  # which the next test tries


def test_a_constraint_is_compiled_again():
    tokenizer = ByteTokenizer(320)
    grammars, others = Grammars(tokenizer), Grammars(tokenizer)
    for grammar in (grammars.json_schema({"type": "integer"}), grammars.regex("a+b"), grammars.choice(["x", "yz"])):
        request = Request([3], 9, stop_ids=(1,), constraint=grammar)
        crossed = crossing(request, others.compile)
        assert crossed.constraint is not grammar and crossed.constraint.source == grammar.source
        np.testing.assert_array_equal(crossed.constraint.start((1,)).mask(), grammar.start((1,)).mask())


class Recorded:
    """An engine's stand-in that writes down what is asked of it."""

    def __init__(self):
        self.calls, self.ended = [], threading.Event()

    def submit(self, request):
        self.calls.append(("submit", request.prompt))

    def cancel(self, *arguments):
        self.calls.append(("cancel", *arguments))

    def round(self):
        self.calls.append(("round",))

    def close(self):
        self.calls.append(("close",))


@pytest.fixture
def led(monkeypatch):
    """A leading engine whose own work is left out, its followers, and the engine of the one follower, in a thread."""
    for name in ("__init__", "submit", "cancel", "round", "close"):
        monkeypatch.setattr(Engine, name, lambda self, *arguments: None)
    ours, theirs = multiprocessing.Pipe()
    followers, other = Followers({1: ours}), Recorded()
    thread = threading.Thread(target=follow, args=(other, theirs, None))
    thread.start()
    yield LeadingEngine(followers), followers, other, thread
    followers.dismiss()
    thread.join()


def test_calls_are_made_before_the_round_that_they_were_made_before(led):
    engine, followers, other, thread = led
    lost = []
    followers.watch(lost.append)
    engine.submit(Request([3, 4], 5))
    engine.cancel(0, 1)
    engine.round()
    engine.round()
    engine.cancel(0)
    engine.close()
    thread.join()
    assert other.calls == [("submit", [3, 4]), ("cancel", 0, 1), ("round",), ("round",), ("close",)]
    assert not lost and followers.dismissed  # what ends because it was told to is not lost


def test_what_the_engine_refuses_is_not_told(led, monkeypatch):
    engine, _, other, thread = led

    def refuses(self, request):
        raise ValueError("too long")

    monkeypatch.setattr(Engine, "submit", refuses)
    with pytest.raises(ValueError, match="too long"):
        engine.submit(Request([3], 5))
    engine.round()
    engine.close()
    thread.join()
    assert other.calls == [("round",), ("close",)]


def test_a_follower_that_ends_is_noticed_and_the_others_are_let_go(monkeypatch):
    exits = queue.SimpleQueue()
    monkeypatch.setattr(os, "_exit", exits.put)
    pipes = [multiprocessing.Pipe() for _ in range(2)]
    followers, lost = Followers({1: pipes[0][0], 2: pipes[1][0]}), queue.SimpleQueue()
    followers.watch(lost.put)
    threading.Thread(target=follow, args=(Recorded(), pipes[1][1], None), daemon=True).start()
    pipes[0][1].close()
    sentence = "process 1 of 3, counted from 0, has ended"
    assert str(lost.get(timeout=60)) == sentence
    assert exits.get(timeout=60) == 1  # process 2 ends with the leader's connection
    with pytest.raises(ProcessLost, match="has ended"):
        followers.tell([])
