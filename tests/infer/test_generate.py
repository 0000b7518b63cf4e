"""Generation through chunks, cache and ragged batches says what the published continuations say."""

import itertools

import jax
import numpy as np
import pytest

from infer.generate import Generator, chunk_size
from infer.sampling import GREEDY, Sampling
from tests.conftest import DATA
from tests.equivalence.tiny import make
from v4_jax.checkpoint import load
from v4_jax.checkpoint.safetensors import SafetensorsFile

# Compiles in a third of the time; how fast the programs are does not matter here.

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [2], list(range(5, 50))]


def make_generator(config, params, **arguments):
    return Generator(config, params, policy="float32", cache_dtype="float32", **arguments)


@pytest.fixture(scope="module")
def small():
    """One layer of each role."""
    return make(num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1)


@pytest.fixture(scope="module")
def generator(small):
    return make_generator(small.config, small.params, max_length=160, prefill_chunk=20)


def texts(generation, rows):
    """Each row's token ids, and why it ended."""
    ids, finish = [[] for _ in range(rows)], [None] * rows
    for token in generation:
        assert finish[token.row] is None
        ids[token.row].append(token.id)
        finish[token.row] = token.finish
    return ids, finish


@pytest.mark.parametrize(("name", "chunk"), [("flash-tiny", 37), ("pro-tiny", 129)])
def test_published_continuations(name, chunk):
    """All prompts of a checkpoint as one ragged batch: each row's text is the one that it has alone."""
    config, params = load(DATA / name)
    golden = SafetensorsFile(DATA / name / "golden.safetensors")
    tokens = golden.read("tokens")
    lengths = sorted(int(tensor.removeprefix("greedy_")) for tensor in golden.tensors if tensor.startswith("greedy_"))
    generator = make_generator(config, params, max_length=max(lengths) + 40, prefill_chunk=chunk)
    prompts = [tokens[0, :length].tolist() for length in lengths]
    ids, finish = texts(generator.generate(prompts, max_tokens=40, sampling=GREEDY, stop_ids=()), len(prompts))
    for length, row in zip(lengths, ids, strict=True):
        assert row == golden.read(f"greedy_{length}").tolist(), length
    assert len(lengths) >= 3 and set(finish) == {"length"}


def test_bias_but_no_penalties(generator):
    samplings = [Sampling(logit_bias={9: 100}), GREEDY, GREEDY]
    ids, _ = texts(generator.generate(PROMPTS, max_tokens=3, sampling=samplings, stop_ids=()), 3)
    plain, _ = texts(generator.generate(PROMPTS, max_tokens=3, sampling=GREEDY, stop_ids=()), 3)
    assert ids == [[9] * 3, *plain[1:]] and ids != plain
    with pytest.raises(ValueError, match="penalties need counts of the tokens before"):
        generator.generate(PROMPTS, max_tokens=3, sampling=Sampling(presence_penalty=1))
    with pytest.raises(ValueError, match="token id 64 is outside of the vocabulary"):
        generator.generate(PROMPTS, max_tokens=3, sampling=Sampling(logit_bias={64: 1}))


def test_rows_alone_in_other_chunks(small, generator):
    """Sampled, so that every row's random numbers are its own as well."""
    samplings = [Sampling(seed=1), Sampling(temperature=2.0, seed=1), Sampling(top_p=0.9, seed=2)]
    together, _ = texts(generator.generate(PROMPTS, max_tokens=30, sampling=samplings, stop_ids=()), 3)
    alone = make_generator(small.config, small.params, max_length=96, prefill_chunk=7)
    for prompt, sampling, expected in zip(PROMPTS, samplings, together, strict=True):
        assert texts(alone.generate([prompt], max_tokens=30, sampling=sampling, stop_ids=()), 1)[0][0] == expected
    assert len(set(map(tuple, together))) == 3


def test_log_probabilities(small, generator):
    generation = generator.generate(PROMPTS, max_tokens=10, sampling=Sampling(temperature=3.0, top_k=40), stop_ids=())
    made = list(generation)
    rows = [prompt + [token.id for token in made if token.row == row] for row, prompt in enumerate(PROMPTS)]
    padded = np.stack([np.pad(row, (0, 60 - len(row))) for row in rows])
    logits = small(padded, lengths=np.asarray([len(row) for row in rows])).logits
    expected, places = jax.nn.log_softmax(logits), [itertools.count(len(prompt)) for prompt in PROMPTS]
    for token in made:
        before = next(places[token.row]) - 1
        assert token.logprob == pytest.approx(float(expected[token.row, before, token.id]), abs=1e-4)


def test_nothing_compiles_after_the_first_batch(generator):
    """No program per token, per prompt length or per set of sampling parameters."""
    texts(generator.generate(PROMPTS, max_tokens=3), 3)
    programs, compiled = generator.programs, []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    jax.jit(lambda x: x * 3)(1.0)
    assert len(compiled) == 1  # the listener does listen
    others = [[7] * 60, [1, 2, 3], [9] * 19]
    texts(generator.generate(others, max_tokens=25, sampling=Sampling(top_p=0.5, top_k=3, seed=8)), 3)
    assert len(compiled) == 1 and generator.programs == programs


def test_stop_ids(generator):
    free, _ = texts(generator.generate(PROMPTS, max_tokens=30, stop_ids=()), 3)
    stop = free[0][11]
    assert stop not in free[0][:11]
    ids, finish = texts(generator.generate(PROMPTS, max_tokens=30, stop_ids=(stop, 63)), 3)
    for row, expected in zip(ids, free, strict=True):
        ends = [i for i, token in enumerate(expected) if token in (stop, 63)]
        assert row == expected[: ends[0] + 1 if ends else 30]
    assert ids[0] == free[0][:12] and finish[0] == "stop"


def test_the_models_own_end_of_text_by_default(small, generator):
    end = small.config.eos_token_id
    prompts = [[i] * 40 for i in range(3)]
    for seed in range(20):
        free, _ = texts(generator.generate(prompts, max_tokens=30, sampling=Sampling(seed=seed), stop_ids=()), 3)
        if any(end in row for row in free):
            break
    ids, finish = texts(generator.generate(prompts, max_tokens=30, sampling=Sampling(seed=seed)), 3)
    for row, expected, why in zip(ids, free, finish, strict=True):
        assert row == (expected[: expected.index(end) + 1] if end in expected else expected)
        assert why == ("stop" if end in expected else "length")
    assert "stop" in finish


def test_limits(generator):
    generation = generator.generate(PROMPTS, max_tokens=1, stop_ids=())
    assert [(token.row, token.finish) for token in generation] == [(0, "length"), (1, "length"), (2, "length")]
    assert (generation.new_tokens, generation.first_tokens, generation.prompt_tokens) == (3, 3, 53)
    assert generation.prefill_seconds > 0 and generation.decode_seconds == 0
    full, finish = texts(generator.generate([[1], [2], [3] * 150], max_tokens=10, stop_ids=()), 3)
    assert [len(row) for row in full] == [10, 10, 10] and set(finish) == {"length"}


def test_a_reader_may_end_a_row(generator):
    free, _ = texts(generator.generate(PROMPTS, max_tokens=20, stop_ids=()), 3)
    generation = generator.generate(PROMPTS, max_tokens=20, stop_ids=())
    ids = [[], [], []]
    for token in generation:
        ids[token.row].append(token.id)
        if token.row == 1 and len(ids[1]) == 4:
            generation.stop(1)
            generation.stop(2)
    assert ids == [free[0], free[1][:4], free[2][:3]]


def test_the_reader_sees_the_first_token_before_the_last_is_made(generator):
    generation = generator.generate(PROMPTS, max_tokens=100, stop_ids=())
    assert len(list(itertools.islice(generation, 3))) == 3
    assert generation.new_tokens == 3


def test_progress(generator):
    seen = []
    generation = generator.generate(PROMPTS, max_tokens=1, progress=lambda done, total: seen.append((done, total)))
    list(generation)
    assert seen == [(0, 53), (28, 53), (48, 53)]


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "empty"),
        ([[1, 64]], {}, "token id 64 is outside of the vocabulary; legal ids are 0 to 63"),
        ([[-1]], {}, "token id -1 is outside"),
        ([[1] * 151], {}, "151 tokens and a continuation of 10 exceed the context of 160"),
        ([[1]], {"max_tokens": 0}, "max_tokens is 0"),
        ([[1]], {"sampling": [GREEDY, GREEDY]}, "1 prompts but 2 samplings"),
    ],
)
def test_bad_requests(generator, prompts, arguments, message):
    with pytest.raises(ValueError, match=message):
        generator.generate(prompts, **({"max_tokens": 10} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 2**21}, "1 to 1048576 tokens"),
        ({"max_length": 0}, "out of range"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"policy": "float64"}, "unknown precision policy"),
        ({"policy": "released"}, "24 and 16 channels; expected 'bfloat16' or 'float32'"),
        ({"cache_dtype": "released"}, "needs the policy 'released'"),
        ({"cache_dtype": "float16"}, "unknown cache dtype"),
    ],
)
def test_bad_generators(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        Generator(small.config, small.params, **({"max_length": 100} | arguments))


def test_chunks_are_few():
    assert [chunk_size(n, 512) for n in (1, 16, 17, 64, 65, 511, 512, 10**6)] == [16, 16, 32, 64, 128, 512, 512, 512]
    assert len({chunk_size(n, 512) for n in range(1, 5000)}) == 6
    assert chunk_size(100, 7) == 7
