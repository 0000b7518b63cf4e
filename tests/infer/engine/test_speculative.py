"""Drafts change how many tokens a step yields, and nothing else."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.infer.engine.test_scheduler import served
from tests.models import OnMesh, make
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import GREEDY, Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.placement import Place

LENGTH, CHUNK, DEEPEST = 192, 24, 4


def guessable(weight: float, context: float):
    """A model whose MTP block guesses well: both predict the next token by the same rule, from the last one.

    Everything else that they compute is added to that with a `weight`; the block sees the trunk's streams with a
    weight of `context`. Without either all guesses are right.
    """
    model = make(num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1, vocab_size=16, index_n_heads=2)

    def scaled(path, x):
        return x * weight if path[-1].key in ("wo_b", "w2", "shared_w2") else x

    params = jax.tree_util.tree_map_with_path(scaled, model.params)
    size = model.config.hidden_size
    own = {"e_proj": jnp.eye(size), "enorm": jnp.ones(size), "norm": params["norm"]}
    own["h_proj"] = context * params["mtp"]["h_proj"]
    return model._replace(params=params | {"mtp": params["mtp"] | own})


def make_engine(model, draft, slots=3, **arguments):
    arguments = dict(max_length=LENGTH, prefill_chunk=CHUNK, policy="float32", cache_dtype="float32") | arguments
    draft = draft if isinstance(draft, str) else f"mtp:{draft}" if draft else "none"
    return Engine(model.config, model.params, slots=slots, draft=draft, **arguments)


@pytest.fixture(scope="module")
def model():
    return guessable(0.03, 0.1)


@pytest.fixture(scope="module")
def plain(model):
    return make_engine(model, 0)


@pytest.fixture(scope="module")
def engine(model):
    """By depth, made when first asked for."""
    return functools.cache(lambda depth: make_engine(model, depth))


def requests():
    """Prompts around the ends of blocks, windows and chunks, continued across further ones, in several ways."""
    rng = np.random.default_rng(5)
    samplings = (GREEDY, Sampling(seed=7), Sampling(temperature=0.7, top_p=0.9, seed=8), Sampling(top_k=5, seed=9))
    lengths = (1, 2, 3, 4, 5, 15, 17, CHUNK, CHUNK + 1, CHUNK + 2, 108, 115, 126, 127, 128, 129)
    return [
        Request(rng.integers(2, 16, length).tolist(), 21 + i % 5, samplings[(i + i // 4) % 4], stop_ids=())
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def expected(plain):
    return served(plain, requests())


def assert_same(found, expected):
    """Tokens and ends; log-probabilities come of sums in another order."""
    for one, other in zip(found, expected, strict=True):
        for (ids, logprobs, finish), (expected_ids, expected_logprobs, expected_finish) in zip(one, other, strict=True):
            assert (ids, finish) == (expected_ids, expected_finish)
            np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)


@pytest.mark.parametrize("depth", [1, DEEPEST])
def test_the_same_tokens(engine, expected, depth):
    """Greedy and sampled, with right and wrong drafts of every depth."""
    assert_same(served(engine(depth), requests()), expected)
    assert_some_were_right(engine(depth), depth)


@pytest.mark.parametrize(("mesh", "chunk", "depth"), [("seq=2,expert=2", 256, 2), ("data=2,tensor=2", CHUNK, 3)])
def test_on_a_mesh(model, expected, mesh, chunk, depth):
    """The other depths; long chunks are split over the sequence's devices, steps are not."""
    spread = OnMesh(model, mesh, "decode")
    engine = make_engine(spread, depth, 4, place=Place(spread.mesh, spread.preset), prefill_chunk=chunk)
    assert_same(served(engine, requests()), expected)
    assert_some_were_right(engine, depth)
    [[one, two]] = served(engine, [Request([9] * 40, 4, Sampling(seed=1), stop_ids=(), n=2)])
    assert one[0] != two[0]


def assert_some_were_right(engine, depth):
    offered, accepted = zip(*engine.acceptance, strict=True)
    assert len(accepted) == depth and len(set(offered)) == 1
    assert offered[0] > accepted[0] and accepted[-1] > 5 and sorted(accepted, reverse=True) == list(accepted)


def test_neighbours_change_nothing(engine):
    """In float32 to the last bit, log-probabilities included, though every row gets on at its own pace."""
    alone = [served(engine(DEEPEST), [request])[0] for request in requests()]
    assert served(engine(DEEPEST), requests()) == alone
    assert served(engine(DEEPEST), requests()[::-1])[::-1] == alone


def test_samples_share_a_prompt(engine, plain):
    for length in (1, 30, 131):
        one = Request(list(range(2, 15)) * 11, 20, Sampling(seed=3), stop_ids=(), n=3)
        one = dataclasses.replace(one, prompt=one.prompt[:length])
        assert_same(served(engine(DEEPEST), [one]), served(plain, [one]))


def particular():
    """What looks at the tokens before, what is reported beside them, and guides, which take one token at a time."""
    prompt, common = [5, 6, 7, 8, 9] * 4, dict(max_tokens=30, stop_ids=())
    return [
        Request(prompt, sampling=Sampling(seed=1, repetition_penalty=1.2, presence_penalty=0.5), **common),
        Request(prompt, sampling=Sampling(temperature=0, frequency_penalty=0.3), **common),
        Request(prompt, sampling=Sampling(seed=2, logit_bias={5: 1.5, 6: -2.0}), top_logprobs=3, **common),
        Request(prompt, sampling=Sampling(seed=3), reasoning_end=(3, 4), reasoning_budget=7, **common),
        Request(prompt, sampling=Sampling(seed=4), opening=(9, 3, 4), **common),
    ]


@pytest.mark.parametrize("depth", [1, DEEPEST])
def test_with_all_that_a_request_may_ask(engine, plain, depth):
    """Each token of a run is penalised for those before it in the same run; alternatives are those of its place."""
    found, expected = served(engine(depth), particular() + requests()[:4]), served(plain, particular())
    assert_same(found[:5], expected)
    assert_same(found[5:], served(plain, requests()[:4]))
    assert [ids.index(3) for [(ids, _, _)] in found[3:4]] == [ids.index(3) for [(ids, _, _)] in expected[3:4]]
    before = engine(depth).acceptance[0]
    for one, other in zip(*(events(made, particular()[2]) for made in (engine(depth), plain)), strict=True):
        assert [id for id, _ in one] == [id for id, _ in other] and len(one) == 3
    accepted = engine(depth).acceptance[0].accepted
    assert accepted > before.accepted


def test_drafts_go_on_where_a_guide_ends(engine):
    """Whose reasoning was ended is on its own after that, and so is an answer that was opened."""
    for request in particular()[3:]:
        before = engine(1).acceptance[0]
        served(engine(1), [request])
        after = engine(1).acceptance[0]
        assert 5 < after.offered - before.offered < 30 and after.accepted > before.accepted


def events(made, request):
    """The alternatives of a request's tokens."""
    made.submit(request)
    return [event.alternatives for event in made.run()]


@pytest.fixture(scope="module")
def long_run(engine):
    """A request in whose continuation a step yields 3 new tokens and more; it, its tokens, and where these begin."""
    for seed in range(100):
        request, ids = Request([5, 6, 7], 24, Sampling(seed=seed), stop_ids=()), []
        engine(DEEPEST).submit(request)
        while not engine(DEEPEST).idle:
            run = [event.id for event in engine(DEEPEST).round()]
            if len(run) >= 3 and len({*ids, *run[:3]}) == len(set(ids)) + 3:
                begin = len(ids)
                ids += run + [event.id for event in engine(DEEPEST).run()]
                return request, ids, begin
            ids += run
    raise AssertionError("no such run")


@pytest.mark.parametrize("place", range(3))
def test_stop_ids_inside_of_a_run(engine, expected, long_run, place):
    """What was accepted after a stop id is dropped, and others go on in the slot."""
    request, ids, begin = long_run
    stop = dataclasses.replace(request, stop_ids=(ids[begin + place],))
    found = served(engine(DEEPEST), [stop, *requests()])
    assert found[0][0][0] == ids[: begin + place + 1] and found[0][0][2] == "stop"
    assert_same(found[1:], expected)


@pytest.mark.parametrize("depth", [1, DEEPEST])
def test_as_many_tokens_as_asked_for(engine, expected, depth):
    for index in (4, 5, 14):
        request, [(ids, _, _)] = requests()[index], expected[index]
        for count in range(1, depth + 3):
            [[found]] = served(engine(depth), [dataclasses.replace(request, max_tokens=count)])
            assert (found[0], found[2]) == (ids[:count], "length")


def test_to_the_end_of_a_slot(engine, plain):
    """The last step may feed drafts that the cache has no room for."""
    requests = [Request([4] * (LENGTH - left), left, GREEDY, stop_ids=()) for left in range(1, 8)]
    assert_same(served(engine(DEEPEST), requests), served(plain, requests))


def test_cancelled_in_the_middle_of_a_run(engine, expected, long_run):
    """No further events, not even those of the same step; the slot serves others."""
    request, ids, begin = long_run
    number, found = engine(DEEPEST).submit(request), []
    for event in engine(DEEPEST).run():
        found.append(event.id)
        if len(found) == begin + 2:
            engine(DEEPEST).cancel(number)
    assert found == ids[: begin + 2]
    assert_same(served(engine(DEEPEST), requests()), expected)


def test_a_reader_may_come_back(engine, long_run):
    """Leaving `run` in the middle of a step's tokens loses none of them."""
    request, ids, begin = long_run
    engine(DEEPEST).submit(request)
    found = [event.id for event in itertools.islice(engine(DEEPEST).run(), begin + 1)]
    assert found + [event.id for event in engine(DEEPEST).run()] == ids


def test_nothing_compiles_after_warm_up(engine):
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    served(engine(DEEPEST), [Request([5] * 70, 9, n=3)])
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 43)(np.float32(1))
        assert len(compiled) == 1  # that is what it would look like
        served(engine(DEEPEST), [*requests(), Request([5] * 70, 9, n=3)])
        assert len(compiled) == 1 and engine(DEEPEST).programs == 3
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_equal_predictions_are_always_accepted():
    """Drafts are drawn with the random numbers, position and parameters of the tokens that they stand for."""
    engine = make_engine(guessable(0, 0), DEEPEST)
    served(engine, requests())
    assert [accepted for _, accepted in engine.acceptance] == [engine.acceptance[0].offered] * DEEPEST
    assert engine.acceptance[0].offered <= sum(-(-(one.max_tokens - 1) // (1 + DEEPEST)) for one in requests())


@pytest.mark.parametrize(("weight", "context", "right"), [(1, 1, 0), (0.05, 0.3, 5)])
def test_the_block_sees_all_tokens_and_streams(weight, context, right):
    """Every draft is what the block says without a cache, fed all that comes before, prompt included."""
    model = guessable(weight, context)
    engine = make_engine(model, DEEPEST)
    block = jax.jit(functools.partial(model.model.apply, method="mtp"))
    compared = 0
    for prompt in (list(range(2, 15)) * 3, [3, 8, 8, 5] * 30, [7]):
        engine.submit(Request(prompt, 25, GREEDY, stop_ids=()))
        runs, fed = [], []
        while not engine.idle:
            runs.append([event.id for event in engine.round()])
            fed.append(np.asarray(engine._next_tokens)[0].tolist())
        tokens = [*prompt, *itertools.chain(*runs)]
        text = np.asarray(tokens + [0] * (LENGTH - len(tokens)))[None]
        trunk = np.asarray(model(text).streams)
        known = len(prompt)
        for run, (newest, *drafts) in zip(runs[1:], fed, strict=False):  # a round returns the tokens of the one before
            known += len(run)
            if not run or known == len(tokens):
                continue
            assert newest == tokens[known - 1]
            streams, following = trunk.copy(), np.roll(text, -1, axis=1)
            for last, draft in enumerate(drafts, known - 2):
                output = jax.device_get(block({"params": model.params}, streams, following))
                assert draft == output.logits[0, last].argmax()
                streams[:, last + 1], following[:, last + 1] = output.streams[:, last], draft
                compared += 1
    assert compared > 150 and engine.acceptance[0].accepted >= right


def assert_distributed(model, engine, temperature):
    """Each of the first three tokens over seeds, of which drafts decide how the last two come: chi-squared tests.

    The probabilities come from the model itself, over all continuations of two tokens.
    """
    prompt, slots, rounds = [5, 9, 12], 3, 300
    drawn = []
    for i in range(rounds):
        request = Request(prompt, 3, Sampling(temperature=temperature, seed=1000 * i), stop_ids=(), n=slots)
        [samples] = served(engine, [request])
        drawn += [ids for ids, _, _ in samples]
    pairs = np.stack(np.meshgrid(range(16), range(16), indexing="ij"), axis=-1).reshape(-1, 2)
    text = jnp.concatenate([jnp.tile(jnp.asarray(prompt), (256, 1)), jnp.asarray(pairs)], axis=1)
    shares = jax.nn.softmax(model(text).logits[:, len(prompt) - 1 :] / temperature, axis=-1)
    first, second = shares[:, 0][np.arange(256), pairs[:, 0]], shares[:, 1][np.arange(256), pairs[:, 1]]
    joint = np.asarray((first * second)[:, None] * shares[:, 2], np.float64).reshape(16, 16, 16)
    for axes, column in (((1, 2), 0), ((0, 2), 1), ((0, 1), 2)):
        wanted = joint.sum(axes) * len(drawn)
        found = np.bincount([ids[column] for ids in drawn], minlength=16)
        assert wanted.min() > 5
        assert ((found - wanted) ** 2 / wanted).sum() < 37.7  # 99.9% of chi-squared with 15 degrees of freedom


def test_sampled_tokens_are_distributed_as_the_model_says(model, engine):
    assert_distributed(model, engine(DEEPEST), 1.3)


def test_refusals(model):
    for draft in ("", "mtp", "mtp:0", "mtp:5", "mtp:x", "none:1", "dspark:5", "2"):
        with pytest.raises(ValueError, match=f"draft is '{draft}', expected none, mtp:1 to mtp:4, dspark or auto"):
            make_engine(model, draft)
    with pytest.raises(ValueError, match="no DSpark stages; expected none, mtp:1 to mtp:4 or auto"):
        make_engine(model, "dspark")
    config = dataclasses.replace(model.config, num_nextn_predict_layers=0, compress_ratios=(0, 4, 128))
    with pytest.raises(ValueError, match="draft is 'mtp:1', but this model has no multi-token-prediction block"):
        Engine(config, {}, slots=1, max_length=8, draft="mtp:1")
