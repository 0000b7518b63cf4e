"""Drafts by DSpark's stages change how many tokens a step yields, and nothing else."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.infer.engine.test_scheduler import served
from tests.infer.engine.test_speculative import assert_distributed, assert_same, make_engine, particular, requests
from tests.models import THREE, OnMesh, make
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import GREEDY, Sampling
from v4_jax.infer.prefix_cache.cache import PrefixCacheOptions
from v4_jax.placement import Place

LENGTH, CHUNK, DEPTH, VOCABULARY = 192, 24, 5, 16


def guessable(weight: float, context: float):
    """A model whose stages guess well: trunk and Markov head predict a token by the same rule, from the one before.

    Everything else that the trunk computes is added to that with a `weight`, what the stages compute with a weight of
    `context`. Without either all guesses are right.
    """
    changes = dict(
        num_nextn_predict_layers=0,
        compress_ratios=(0, 4, 128, 0, 0),
        vocab_size=VOCABULARY,
        index_n_heads=2,
        dspark_block_size=DEPTH,
        dspark_noise_token_id=VOCABULARY - 1,
        dspark_target_layer_ids=(1, 2),
        dspark_markov_rank=VOCABULARY,
    )
    model = make(**THREE | changes)

    def scaled(weight):
        def scale(path, x):
            inside = path[0].key != "dspark" and path[-1].key in ("wo_b", "w2", "shared_w2")
            return x * weight if inside else x

        return jax.tree_util.tree_map_with_path(scale, model.params)

    rule = model._replace(params=scaled(0.0))(np.arange(VOCABULARY)[:, None]).logits[:, 0]
    stages = model.params["dspark"]
    stages = stages | {"norm": context * stages["norm"], "markov_w1": jnp.eye(VOCABULARY), "markov_w2": rule.T}
    return model._replace(params=scaled(weight) | {"dspark": stages})


@pytest.fixture(scope="module")
def model():
    return guessable(0.03, 0.1)


@pytest.fixture(scope="module")
def plain(model):
    return make_engine(model, "none")


@pytest.fixture(scope="module")
def engine(model):
    return make_engine(model, "dspark")


@pytest.fixture(scope="module")
def expected(plain):
    return served(plain, requests())


def assert_some_were_right(engine, depth=DEPTH):
    """Right and wrong drafts in the first `depth` places; how many of the others are verified depends on timings."""
    offered, accepted = zip(*engine.acceptance, strict=True)
    assert len(accepted) == DEPTH and offered[0] > accepted[0] and accepted[depth - 1] > 2
    assert sorted(accepted, reverse=True) == list(accepted)


def test_the_same_tokens(engine, plain, expected):
    """Greedy and sampled, with right and wrong drafts in each place, with all that a request may ask."""
    assert_same(served(engine, requests()), expected)
    assert_some_were_right(engine)
    found = served(engine, particular() + requests()[:4])
    assert_same(found, served(plain, particular()) + expected[:4])
    for length in (1, 30, 131):
        several = Request((list(range(2, 15)) * 11)[:length], 20, Sampling(seed=3), stop_ids=(), n=3)
        assert_same(served(engine, [several]), served(plain, [several]))


def test_alone_as_in_company(engine):
    """Though every row gets on at its own pace."""
    alone = [served(engine, [request])[0] for request in requests()]
    assert_same(served(engine, requests()), alone)
    assert_same(served(engine, requests()[::-1])[::-1], alone)


def test_to_the_end_of_a_slot(engine, plain):
    """The last step may feed drafts that the cache has no room for."""
    requests = [Request([4] * (LENGTH - left), left, GREEDY, stop_ids=()) for left in range(1, 9)]
    assert_same(served(engine, requests), served(plain, requests))


@pytest.mark.parametrize(("mesh", "chunk", "every"), [("seq=2,expert=2", 256, True), ("data=2,tensor=2", CHUNK, False)])
def test_on_a_mesh(model, expected, mesh, chunk, every):
    """Long chunks are split over the sequence's devices, steps are not; with every draft verified, and only some."""
    spread = OnMesh(model, mesh, "decode")
    place = Place(spread.mesh, spread.preset)
    engine = make_engine(spread, "dspark", 4, place=place, prefill_chunk=chunk, verify_all=every)
    assert_same(served(engine, requests()), expected)
    assert_some_were_right(engine, DEPTH if every else 1)


def test_equal_predictions_are_always_accepted():
    """Drafts are drawn with the random numbers, position and parameters of the tokens that they stand for."""
    engine = make_engine(guessable(0, 0), "dspark", 1)
    served(engine, requests())
    assert [accepted for _, accepted in engine.acceptance] == [engine.acceptance[0].offered] * DEPTH
    assert engine.acceptance[0].offered <= sum(-(-(one.max_tokens - 1) // (1 + DEPTH)) for one in requests())


def test_the_stages_see_all_tokens():
    """Every block is what the stages say without a cache, given the taps of all that comes before, prompt included."""
    model = guessable(1, 1)
    engine = make_engine(model, "dspark", 1)
    block = jax.jit(functools.partial(model.model.apply, method="dspark"))
    compared = 0
    for prompt in (list(range(2, 15)) * 3, [3, 8, 8, 5] * 30, [7]):
        engine.submit(Request(prompt, 25, GREEDY, stop_ids=()))
        runs, fed = [], []
        while not engine.idle:
            runs.append([event.id for event in engine.round()])
            fed.append(np.asarray(engine._next_tokens)[0].tolist())
        tokens = [*prompt, *itertools.chain(*runs)]
        text = np.asarray(tokens + [0] * (LENGTH - len(tokens)))[None]
        taps = model(text, return_taps=True).taps
        known = len(prompt)
        for run, (newest, *drafts) in zip(runs[1:], fed, strict=False):  # a round returns the tokens of the one before
            known += len(run)
            if not run or known == len(tokens):
                continue
            assert newest == tokens[known - 1]
            found = block({"params": model.params}, taps, jnp.asarray([newest]), lengths=jnp.asarray([known - 1]))
            assert drafts == found.tokens[0].tolist()
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("mode", ["full", "none"])
def test_a_prefix_that_is_found_refills_the_windows(mode, length=384):
    """A text that was read before is drafted for as one that is read anew."""
    model = guessable(1, 1)
    sizes = dict(max_length=512, prefill_chunk=128)
    engine = make_engine(model, "dspark", 1, prefix_cache=PrefixCacheOptions(1 << 30, mode), **sizes)
    apart = make_engine(model, "dspark", 1, **sizes)
    common = np.random.default_rng(1).integers(2, VOCABULARY, 300).tolist()
    served(engine, [Request([*common, 3, 4], 2, GREEDY, stop_ids=())])
    served(engine, [Request([5] * 140, 2, GREEDY, stop_ids=())])
    request, fed = Request([*common, 7, 8, 9], 20, GREEDY, stop_ids=()), []
    for one in (engine, apart):
        one.submit(request)
        cached, blocks = set(), []
        while not one.idle:
            cached |= {event.cached for event in one.round()}
            blocks.append(np.asarray(one._next_tokens)[0].tolist())
        fed.append(blocks[-5:])
        assert cached == ({0} if one is apart else {256 if mode == "full" else 256 - 128})
    assert fed[0] == fed[1]


def test_sampled_tokens_are_distributed_as_the_model_says(model, engine):
    assert_distributed(model, engine, 1.5)
