"""Many requests in a few slots: each gets what it would get alone, and nothing is compiled on the way."""

import contextlib
import dataclasses
import math

import jax
import numpy as np
import pytest

from tests.models import OnMesh, three
from v4_jax.infer.engine.page_table import pages_within
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import GREEDY, Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.placement import Place
from v4_jax.sharding.axes import ShardingError

LENGTH, CHUNK = 192, 24


def make_engine(model, slots, **arguments):
    arguments = dict(max_length=LENGTH, prefill_chunk=CHUNK, policy="float32", cache_dtype="float32") | arguments
    return Engine(model.config, model.params, slots=slots, **arguments)


@pytest.fixture(scope="module")
def small():
    """One layer of each role."""
    return three()


@pytest.fixture(scope="module")
def engine(small):
    return make_engine(small, 3)


def requests():
    """Prompts around the ends of blocks, windows and chunks, sampled in several ways."""
    rng = np.random.default_rng(5)
    samplings = (GREEDY, Sampling(seed=7), Sampling(temperature=0.7, top_p=0.9, seed=8), Sampling(top_k=5, seed=9))
    lengths = (1, 2, 3, 4, 5, 9, 17, CHUNK, CHUNK + 1, CHUNK + 2, 127, 128, 129, 130)
    return [
        Request(rng.integers(2, 64, length).tolist(), 3 + i % 5, samplings[i % 4], stop_ids=())
        for i, length in enumerate(lengths)
    ]


def particular():
    """Greedy, each with another bias or penalty, from the same prompt."""
    prompt = np.random.default_rng(6).integers(2, 64, CHUNK + 5).tolist()
    samplings = (
        GREEDY,
        Sampling(0.0, repetition_penalty=2.5),
        Sampling(0.0, repetition_penalty=0.4),
        Sampling(0.0, frequency_penalty=1.5),
        Sampling(0.0, presence_penalty=-2, logit_bias={5: 2, 40: -1}),
        Sampling(0.0, repetition_penalty=1.5, frequency_penalty=-0.5, presence_penalty=1, logit_bias={7: 0.5}),
    )
    return [Request(prompt, 20, sampling, stop_ids=(), top_logprobs=i % 3) for i, sampling in enumerate(samplings)]


def served(engine, given):
    """By request and sample: ids, log-probabilities and how it ended, of all that were submitted together."""
    numbers = [engine.submit(request) for request in given]
    found = {(number, i): ([], [], []) for number, one in zip(numbers, given, strict=True) for i in range(one.n)}
    for event in engine.run():
        ids, logprobs, finish = found[event.request, event.sample]
        assert finish in ([], [None] * len(ids))
        ids.append(event.id)
        logprobs.append(event.logprob)
        finish.append(event.finish)
    assert engine.idle
    ordered = {key: (ids, logprobs, finish[-1]) for key, (ids, logprobs, finish) in found.items() if ids}
    return [[ordered.get((number, i)) for i in range(one.n)] for number, one in zip(numbers, given, strict=True)]


@pytest.fixture(scope="module")
def alone(engine):
    return [served(engine, [request])[0] for request in requests()]


def test_neighbours_change_nothing(engine, alone):
    """In float32 to the last bit, log-probabilities included, and in another order too."""
    assert served(engine, requests()) == alone
    assert served(engine, requests()[::-1])[::-1] == alone
    assert all(len(ids) == one.max_tokens for [(ids, _, _)], one in zip(alone, requests(), strict=True))


def test_samples_share_a_prompt(engine):
    """Sample i is what a request with the seed plus i gives; short prompts, long ones, and one of a single token."""
    for length in (1, 30, 131):
        one = Request(list(range(2, 2 + length % 60)) * (1 + length // 60), 6, Sampling(seed=3), stop_ids=(), n=3)
        apart = [dataclasses.replace(one, n=1, sampling=Sampling(seed=3 + i)) for i in range(3)]
        [together] = served(engine, [one])
        assert together == [sample for [sample] in served(engine, apart)]
        assert len({tuple(ids) for ids, _, _ in together}) == 3


def test_samples_that_share_a_prompt_are_penalized_apart(engine):
    sampling = Sampling(seed=3, repetition_penalty=1.5, presence_penalty=1, frequency_penalty=0.5)
    for length in (1, 30):
        one = Request(list(range(2, 2 + length)), 12, sampling, stop_ids=(), n=3)
        apart = [dataclasses.replace(one, n=1, sampling=dataclasses.replace(sampling, seed=3 + i)) for i in range(3)]
        assert served(engine, [one])[0] == [sample for [sample] in served(engine, apart)]


def test_stop_ids_end_a_sample(engine, alone):
    request, [(ids, _, _)] = requests()[7], alone[7]
    [[(stopped, _, finish)]] = served(engine, [dataclasses.replace(request, stop_ids=(ids[1],))])
    assert (stopped, finish) == (ids[:2], "stop") and alone[7][0][2] == "length"


@contextlib.contextmanager
def compilations():
    """What is compiled inside, by name of the event, one of its own at the beginning: so it would look."""
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 41)(np.float32(1))
        assert len(compiled) == 1
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_compiles_after_warm_up(engine, alone):
    with compilations() as compiled:
        served(engine, [*requests(), Request([5] * 70, 9, n=3), *particular()])
    assert len(compiled) == 1 and engine.programs == 3


def test_penalties_bias_and_alternatives(engine, small, alone):
    """Greedy, against the model's logits of the whole text so far; in company as alone, and nothing stays in a slot."""
    given = particular()
    apart = [served(engine, [request])[0] for request in given]
    company = requests()[:6]
    together = served(engine, [one for pair in zip(given, company, strict=True) for one in pair])
    assert together[::2] == apart and together[1::2] == alone[:6]

    for request, [(ids, logprobs, _)] in zip(given, apart, strict=True):
        sampling, prompt = request.sampling, list(request.prompt)
        text = np.zeros((1, 64), np.int32)
        text[0, : len(prompt) + len(ids)] = prompt + ids
        everywhere = np.asarray(small(text).logits[0])
        for i, token in enumerate(ids):
            logits = everywhere[len(prompt) + i - 1]
            model = logits - np.log(np.sum(np.exp(logits)))
            assert logprobs[i] == pytest.approx(model[token], abs=1e-4)
            adjusted = np.array(logits)
            for other, bias in sampling.logit_bias.items():
                adjusted[other] += bias
            seen, counts = sorted({*prompt, *ids[:i]}), np.bincount(ids[:i], minlength=64)
            factor = sampling.repetition_penalty
            adjusted[seen] = np.where(adjusted[seen] > 0, adjusted[seen] / factor, adjusted[seen] * factor)
            adjusted -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
            assert token == np.argmax(adjusted)
    assert len({tuple(ids) for [(ids, _, _)] in apart}) == len(given)  # each of them matters


def test_bias_forces_and_forbids(engine, alone):
    request, [(ids, _, _)] = requests()[12], alone[12]
    forced = dataclasses.replace(request, sampling=Sampling(seed=8, logit_bias={9: 100}))
    without = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, logit_bias={ids[0]: -100}))
    [[(always, logprobs, _)], [(never, _, _)]] = served(engine, [forced, without])
    assert always == [9] * request.max_tokens and max(logprobs) < 0 and ids[0] not in never


def test_alternatives(engine, small):
    """The model's own, whatever is sampled; as many as asked for, by each row for itself."""
    prompt = list(range(2, 30))
    given = [
        Request(prompt, 4, Sampling(seed=3, logit_bias={5: 50}), stop_ids=(), top_logprobs=most, n=1 + most % 2)
        for most in (0, 1, 20)
    ]
    numbers = [engine.submit(request) for request in given]
    texts = {}
    for event in engine.run():
        texts.setdefault((event.request, event.sample), []).append(event)
    for (number, _), events in texts.items():
        most = given[numbers.index(number)].top_logprobs
        text = np.zeros((1, 64), np.int32)
        text[0, : len(prompt) + 4] = prompt + [event.id for event in events]
        logits = np.asarray(small(text).logits[0])
        for event, row in zip(events, logits[len(prompt) - 1 :], strict=False):
            order = np.argsort(-row, kind="stable")[:most]
            assert [token for token, _ in event.alternatives] == order.tolist()
            expected = row[order] - np.log(np.sum(np.exp(row)))
            np.testing.assert_allclose([logprob for _, logprob in event.alternatives], expected, atol=1e-4)
    assert len(texts) == 4


def test_an_echo_says_how_probable_the_prompt_is(engine, small, alone):
    """In company, around chunks' ends, with samples and alternatives; what is generated is what it is without."""
    plain = [*requests(), particular()[5]]
    given = [dataclasses.replace(one, echo=True) for one in plain]
    found = served(engine, given)
    assert [sample[0][0][-3:] for sample in found[:-1]] == [sample[0][0][-3:] for sample in alone]
    assert found[-1][0][0][-20:] == served(engine, plain[-1:])[0][0][0]
    for request, [(ids, logprobs, finish)] in zip(given, found, strict=True):
        read = len(request.prompt) - 1
        assert ids[:read] == request.prompt[1:] and len(ids) == read + request.max_tokens and finish == "length"
        np.testing.assert_allclose(logprobs[:read], prompt_scores(small, request.prompt)[0], atol=1e-4)


def prompt_scores(model, prompt):
    """Log-probabilities of a prompt's tokens after its first, and all of them [tokens, V] in their places."""
    text = np.zeros((1, LENGTH), np.int32)
    text[0, : len(prompt)] = prompt
    logits = np.asarray(model(text).logits[0, : len(prompt) - 1])
    scores = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return scores[np.arange(len(prompt) - 1), prompt[1:]], scores


def test_an_echo_alone(engine, small):
    """Nothing is generated; both samples have it, and the most probable tokens; slots are free afterwards."""
    prompt = np.random.default_rng(1).integers(2, 64, 2 * CHUNK + 3).tolist()
    number = engine.submit(Request(prompt, 0, stop_ids=(), top_logprobs=3, n=2, echo=True))
    events = list(engine.run())
    assert engine.idle and engine.pages_used == 0 and all(event.request == number for event in events)
    values, scores = prompt_scores(small, prompt)
    for sample in range(2):
        own = [event for event in events if event.sample == sample]
        assert [event.id for event in own] == prompt[1:]
        assert [event.finish for event in own] == [None] * (len(own) - 1) + ["length"]
        np.testing.assert_allclose([event.logprob for event in own], values, atol=1e-4)
        for event, row in zip(own, scores, strict=True):
            assert [token for token, _ in event.alternatives] == np.argsort(-row, kind="stable")[:3].tolist()


def test_cancelled_requests_leave_the_rest_alone(engine, alone):
    """While waiting, being read, shared, and generating; their slots serve others."""
    long = Request([3] * 150, 20, stop_ids=())
    shared = Request([4] * 100, 5, Sampling(seed=2), stop_ids=(), n=2)
    first, second, third = (engine.submit(one) for one in (long, shared, long))
    engine.round()
    engine.cancel(third)
    engine.cancel(second, 0)
    events = [event for _ in range(9) for event in engine.round()]
    assert {event.request for event in events} == {first}
    engine.cancel(first)
    rest = list(engine.run())
    assert {(event.request, event.sample) for event in rest} == {(second, 1)} and len(rest) == 5
    [apart] = served(engine, [dataclasses.replace(shared, n=1, sampling=Sampling(seed=3))])
    assert [event.id for event in rest] == apart[0][0]

    both = engine.submit(shared)
    engine.round()
    engine.cancel(both, 0)
    engine.cancel(both, 1)
    engine.cancel(12345)
    assert list(engine.run()) == []
    echo = engine.submit(Request([3] * 60, 0, echo=True))
    next(engine.run())
    engine.cancel(echo)
    assert list(engine.run()) == [] and engine.pages_used == 0
    assert served(engine, requests()) == alone


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request([], 5), "the prompt is empty"),
        (Request([64], 5), "token id 64 is outside of the vocabulary; legal ids are 0 to 63"),
        (Request([3] * 190, 3), "190 tokens and a continuation of 3 exceed the 192 tokens that a slot has room for"),
        (Request([3], 5, n=4), "n is 4, but there are 3 slots"),
        (Request([3], 0), "max_tokens is 0, expected at least 1"),
        (Request([3], 0, echo=True), "max_tokens is 0, expected at least 1"),
        (Request([3], 5, top_logprobs=21), "top_logprobs is 21, expected 0 to 20"),
        (Request([3], 5, Sampling(logit_bias={64: 1})), "token id 64 is outside of the vocabulary"),
        (Request([3], 5, Sampling(logit_bias={-1: 1})), "token id -1 is outside of the vocabulary"),
        (Request([3], 5, stop_ids=[64]), "token id 64 is outside of the vocabulary"),
    ],
)
def test_refused_at_the_door(engine, request_, sentence):
    with pytest.raises(ValueError, match=sentence):
        engine.submit(request_)
    assert engine.idle


@pytest.mark.parametrize("mesh", ["seq=2,expert=2", "data=2,tensor=2"])
def test_on_a_mesh(small, alone, mesh):
    """The same tokens; sums over devices are added in another order."""
    spread = OnMesh(small, mesh, "decode")
    engine = make_engine(spread, 4, place=Place(spread.mesh, spread.preset))
    engine.compile()
    with compilations() as compiled:
        made = served(engine, requests())
    assert len(compiled) == 1
    for [found], [expected] in zip(made, alone, strict=True):
        assert found[0] == expected[0]
        np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
    [[one, two]] = served(engine, [Request([9] * 40, 4, Sampling(seed=1), stop_ids=(), n=2)])
    assert one[0] != two[0]
    prompt = requests()[-1].prompt
    events = served(engine, [Request(prompt, 0, echo=True, top_logprobs=2)])[0][0]
    np.testing.assert_allclose(events[1], prompt_scores(small, prompt)[0], atol=1e-4)


def test_samples_spread_over_shards(small):
    """Those on other devices than the prompt was read on get copies of its pages, the others share them."""
    spread = OnMesh(small, "data=2,tensor=2", "decode")
    engine = make_engine(spread, 4, place=Place(spread.mesh, spread.preset), max_length=384)
    one = Request([7] * 130 + [9] * 170, 4, Sampling(seed=1), stop_ids=(), n=4)
    [together] = served(engine, [one])
    apart = served(engine, [dataclasses.replace(one, n=1, sampling=Sampling(seed=1 + i)) for i in range(4)])
    assert together == [sample for [sample] in apart]
    with pytest.raises(ShardingError, match="the cache's pages: axis 'batch' of size 7 cannot be split 2 ways"):
        make_engine(spread, 4, place=Place(spread.mesh, spread.preset), pages=7)
    number = engine.submit(one)
    engine.round()
    engine.cancel(number, 0)
    engine.cancel(number, 2)  # the first that would have got copies
    ids = {i: [] for i in range(4)}
    for event in engine.run():
        ids[event.sample].append(event.id)
    assert ids == {0: [], 1: together[1][0], 2: [], 3: together[3][0]} and engine.pages_used == 0


def test_waiting_for_pages(small, alone):
    """Fewer pages than the slots could fill: who has to wait does, in order, and gets the same."""
    engine = make_engine(small, 3, pages=3)
    assert served(engine, requests()) == alone and engine.pages_used == 0
    assert engine.programs == 3
    long, short = Request([3] * 150, 20, stop_ids=()), Request([4] * 10, 30, stop_ids=())
    first, second, third, fourth = (engine.submit(one) for one in (long, short, long, short))
    ended, most = [], 0
    for event in engine.run():
        most = max(most, engine.pages_used)
        ended += [event.request] * (event.finish is not None)
    assert ended in ([first, second, third, fourth], [second, first, third, fourth]) and most == 3
    shared = Request([5] * 130, 20, Sampling(seed=2), stop_ids=(), n=2)  # a page for both, and one for each
    [[one, other]] = served(engine, [shared])
    assert one[0] != other[0]
    numbers = "2 samples of up to 190 tokens need 4 pages of 128 tokens, more than there are: the cache has 3 for all"
    with pytest.raises(ValueError, match=numbers):
        engine.submit(Request([5] * 120, 70, stop_ids=(), n=2))
    with pytest.raises(ValueError, match="pages is 0, expected at least 1"):
        make_engine(small, 3, pages=0)


def test_pages_of_a_budget(small):
    """As many as fit beside what slots take, counted as they are stored, and no more than slots can fill."""
    arguments = (small.config, 4, LENGTH, "float32")

    def size(pages):
        cache = Place().cache(*arguments[:3], "float32", pages=pages)
        return sum(cache.nbytes().values()) + 4 * (8 + 2 * 4 + 5 * small.config.vocab_size)

    assert size(3) - size(2) == 128 // 4 * 4 * (32 + 16) + 4 * 32
    assert [pages_within(*arguments, size(pages) + 100) for pages in (2, 3, 5, 8, 30)] == [2, 3, 5, 8, 8]
    with pytest.raises(
        ValueError, match=r"no room for 192 tokens: 4 slots with pages for one text of that length take "
    ):
        pages_within(*arguments, size(2) - 1)


def test_logits_that_are_not_finite_end_their_row_alone(engine, alone):
    """A token whose embedding is damaged ends whoever reads it with an error at once.

    Whoever shares the steps, or gets the slot and its pages later, has every bit as without.
    """
    good = [(one, sample) for one, sample in zip(requests(), alone, strict=True) if 63 not in one.prompt]
    assert len(good) > 3
    bad = Request([2, 3, 63, 4] * 20, 5, stop_ids=())
    params = engine._params
    engine._params = params | {"embed": params["embed"].at[63].set(math.nan)}
    try:
        found = served(engine, [bad, good[0][0], bad, *(one for one, _ in good), bad])
    finally:
        engine._params = params
    healthy = [found[1], *found[3:-1]]
    for [(ids, logprobs, finish)] in (found[0], found[2], found[-1]):
        assert len(ids) == 1 and math.isnan(logprobs[0]) and finish == "error"
    for sample, (_, wanted) in zip(healthy, [good[0], *good], strict=True):
        assert 63 in wanted[0][0] or sample == wanted  # it may say the token itself


def test_logits_that_are_not_finite_end_an_echo(engine):
    params = engine._params
    engine._params = params | {"embed": params["embed"].at[63].set(math.nan)}
    try:
        [[(ids, logprobs, finish)]] = served(engine, [Request([2, 3, 63, 4, 5], 5, stop_ids=(), echo=True)])
    finally:
        engine._params = params
    # What is not finite may spread over the chunk, in which masked keys are multiplied by zero.
    assert ids == [3, 63, 4][: len(ids)] and math.isnan(logprobs[-1]) and finish == "error" and engine.pages_used == 0
