"""A few prompts continued at once say what the published continuations say, with the model's probabilities."""

import itertools

import jax
import numpy as np
import pytest

from tests.conftest import DATA
from tests.models import golden, three
from v4_jax.checkpoint import load
from v4_jax.infer.chunks import chunk_size
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import GREEDY, Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.generate import Generation

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [2], list(range(5, 50))]


def make_engine(config, params, **arguments):
    arguments = dict(slots=3, policy="float32", cache_dtype="float32") | arguments
    return Engine(config, params, **arguments)


@pytest.fixture(scope="module")
def small():
    """One layer of each role."""
    return three()


@pytest.fixture(scope="module")
def engine(small):
    return make_engine(small.config, small.params, max_length=160, prefill_chunk=20)


def requests(max_tokens, sampling=GREEDY, stop_ids=()):
    return [Request(prompt, max_tokens, sampling, stop_ids) for prompt in PROMPTS]


def texts(generation, rows=3):
    """Each row's token ids, and why it ended."""
    ids, finish = [[] for _ in range(rows)], [None] * rows
    for event in generation:
        assert finish[event.request] is None
        ids[event.request].append(event.id)
        finish[event.request] = event.finish
    return ids, finish


@pytest.mark.parametrize(("name", "chunk"), [("flash-tiny", 37), ("pro-tiny", 129)])
def test_published_continuations(name, chunk):
    """All prompts of a checkpoint, of which three are served at a time."""
    config, params = load(DATA / name)
    expected = golden(DATA / name)
    tokens = expected["tokens"]
    lengths = sorted(int(tensor.removeprefix("greedy_")) for tensor in expected if tensor.startswith("greedy_"))
    engine = make_engine(config, params, max_length=max(lengths) + 40, prefill_chunk=chunk)
    given = [Request(tokens[0, :length].tolist(), 40, GREEDY, stop_ids=()) for length in lengths]
    ids, finish = texts(Generation(engine, given), len(given))
    for length, row in zip(lengths, ids, strict=True):
        assert row == expected[f"greedy_{length}"].tolist(), length
    assert len(lengths) >= 3 and set(finish) == {"length"}


def test_alone_in_other_chunks(small, engine):
    """Sampled, so that every row's random numbers are its own as well."""
    samplings = [Sampling(seed=1), Sampling(temperature=2.0, seed=1), Sampling(top_p=0.9, seed=2)]
    given = [Request(prompt, 30, sampling, ()) for prompt, sampling in zip(PROMPTS, samplings, strict=True)]
    together, _ = texts(Generation(engine, given))
    alone = make_engine(small.config, small.params, slots=1, max_length=96, prefill_chunk=7)
    for request, expected in zip(given, together, strict=True):
        assert texts(Generation(alone, [request]), 1)[0][0] == expected
    assert len(set(map(tuple, together))) == 3 and alone.programs == 2  # nothing to copy


def test_log_probabilities(small, engine):
    made = list(Generation(engine, requests(10, Sampling(temperature=3.0, top_k=40))))
    rows = [prompt + [event.id for event in made if event.request == row] for row, prompt in enumerate(PROMPTS)]
    padded = np.stack([np.pad(row, (0, 60 - len(row))) for row in rows])
    logits = small(padded, lengths=np.asarray([len(row) for row in rows])).logits
    expected, places = jax.nn.log_softmax(logits), [itertools.count(len(prompt)) for prompt in PROMPTS]
    for event in made:
        before = next(places[event.request]) - 1
        assert event.logprob == pytest.approx(float(expected[event.request, before, event.id]), abs=1e-4)


def test_stop_ids(engine):
    free, _ = texts(Generation(engine, requests(30, Sampling())))
    stop = free[0][11]
    assert stop not in free[0][:11]
    other = next(token for token in free[1] if token not in free[0][:12])
    ids, finish = texts(Generation(engine, requests(30, Sampling(), (stop, other))))
    for row, expected in zip(ids, free, strict=True):
        ends = [i for i, token in enumerate(expected) if token in (stop, other)]
        assert row == expected[: ends[0] + 1 if ends else 30]
    assert ids[0] == free[0][:12] and finish[0] == "stop"


def test_the_models_own_end_of_text_by_default(small, engine):
    end = small.config.eos_token_id

    def made(seed, stop_ids):
        given = [Request([i] * 40, 30, Sampling(seed=seed), stop_ids) for i in range(3)]
        return texts(Generation(engine, given))

    for seed in range(20):
        free, _ = made(seed, ())
        if any(end in row for row in free):
            break
    ids, finish = made(seed, None)
    for row, expected, why in zip(ids, free, finish, strict=True):
        assert row == (expected[: expected.index(end) + 1] if end in expected else expected)
        assert why == ("stop" if end in expected else "length")
    assert "stop" in finish


def test_counts_and_times(engine):
    generation = Generation(engine, requests(1))
    assert {(event.request, event.finish) for event in generation} == {(row, "length") for row in range(3)}
    assert (generation.new_tokens, generation.prompt_tokens) == (3, 53) and 1 <= generation.first_tokens <= 3
    assert generation.prefill_seconds > 0
    full, finish = texts(Generation(engine, [Request([row], 10, stop_ids=()) for row in (1, 2)]), 2)
    assert [len(row) for row in full] == [10, 10] and set(finish) == {"length"}


def test_a_reader_may_end_a_row(engine):
    free, _ = texts(Generation(engine, requests(20)))
    generation = Generation(engine, requests(20))
    ids = [[], [], []]
    for event in generation:
        ids[event.request].append(event.id)
        if event.request == 1 and len(ids[1]) == 4:
            generation.stop(1)
            generation.stop(2)
    assert ids[:2] == [free[0], free[1][:4]] and ids[2] == free[2][: len(ids[2])] and len(ids[2]) < 5


def test_the_reader_sees_the_first_token_before_the_last_is_made(engine):
    generation = Generation(engine, requests(100))
    assert len(list(itertools.islice(generation, 3))) == 3
    assert generation.new_tokens == 3 and not engine.idle
    with pytest.raises(ValueError, match="the engine is at work for others"):
        Generation(engine, requests(1))
    for row in range(3):
        generation.stop(row)
    assert list(engine.run()) == []


def test_progress(engine):
    seen = []
    list(Generation(engine, requests(1)[2:] + requests(1)[:1], lambda done, total: seen.append((done, total))))
    assert seen == [(0, 52), (20, 52), (40, 52), (45, 52)]


def test_a_request_that_cannot_be_served(engine):
    """Then none of them is."""
    with pytest.raises(ValueError, match="151 tokens and a continuation of 10 exceed the 160 tokens"):
        Generation(engine, [*requests(10), Request([1] * 151, 10)])
    assert engine.idle


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 2**21}, "1 to 1048576 tokens"),
        ({"max_length": 0}, "expected at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"policy": "float64"}, "unknown precision policy"),
        ({"policy": "released"}, "24 and 16 channels; expected 'bfloat16' or 'float32'"),
        ({"cache_dtype": "released"}, "needs the policy 'released'"),
        ({"cache_dtype": "float16"}, "unknown cache dtype"),
    ],
)
def test_bad_engines(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        Engine(small.config, small.params, **({"slots": 1, "max_length": 100} | arguments))


def test_chunks_are_few():
    assert [chunk_size(n, 512) for n in (1, 16, 17, 64, 65, 511, 512, 10**6)] == [16, 16, 32, 64, 128, 512, 512, 512]
    assert len({chunk_size(n, 512) for n in range(1, 5000)}) == 6
    assert chunk_size(100, 7) == 7
