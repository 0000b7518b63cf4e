"""Any drafter will do: it decides how many tokens a step yields, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.infer.engine.test_scheduler import served
from tests.infer.engine.test_speculative import assert_same, guessable, make_engine, requests
from tests.models import drafts, trained
from v4_jax.cache import pages
from v4_jax.infer.engine.drafters import Drafts, DSparkDrafter, MtpDrafter, PlainDecoding, choose_drafter
from v4_jax.infer.prefix_cache.cache import PrefixCacheOptions


@dataclasses.dataclass(frozen=True)
class Repeating:
    """Says that the newest token comes again and again; without a part of the cache."""

    depth: int
    kind = "repeating"
    confident = False
    trunk_options = {}
    reach = 0

    def prefill(self, apply, output, tokens, lengths, cache):
        assert output.cache is not None and tokens.shape[1] == output.streams.shape[1] + 1
        return cache

    def draft(self, apply, output, step, sampling, cache, place):
        newest = jnp.take_along_axis(step.ids, jnp.maximum(step.counts - 1, 0)[:, None], axis=1)
        return Drafts(jnp.tile(newest, (1, self.depth))), cache

    def at(self, cache, lengths):
        return cache

    def tail_sizes(self, cache, config):
        return pages.tail_sizes(cache, config, draft=False)

    def tokens_to_refill(self, config):
        return pages.tokens_to_refill(config, draft=False)


@pytest.fixture(scope="module")
def model():
    return guessable(0.03, 0.1)


def test_another_drafter(model, monkeypatch):
    """The same tokens, with a prefix cache too; its guesses are right now and then."""
    expected = served(make_engine(model, 0), requests())
    monkeypatch.setattr("v4_jax.infer.engine.scheduler.choose_drafter", lambda *_: Repeating(3))
    engine = make_engine(model, 3, prefix_cache=PrefixCacheOptions(1 << 30))
    assert_same(served(engine, requests()), expected)
    assert_same(served(engine, requests()), expected)
    assert 0 < engine.acceptance[0].accepted < engine.acceptance[0].offered


def test_the_drafter_of_a_name(model):
    stages = drafts().config
    for config, draft, drafter in (
        (model.config, "none", PlainDecoding()),
        (model.config, "mtp:3", MtpDrafter(3)),
        (model.config, "auto", MtpDrafter(1)),
        (stages, "dspark", DSparkDrafter(5)),
        (stages, "auto", DSparkDrafter(5)),
        (trained().config, "auto", PlainDecoding()),
    ):
        assert choose_drafter(config, draft) == drafter
    with pytest.raises(ValueError, match="no multi-token-prediction block; expected none, dspark or auto"):
        choose_drafter(stages, "mtp:1")
    with pytest.raises(ValueError, match="drafts 9 tokens at once, expected at most 8"):
        choose_drafter(dataclasses.replace(stages, dspark_block_size=9), "dspark")


def test_profiles_tell_the_parts_of_programs_apart(model, monkeypatch):
    lowered = []
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda one, *_, **__: lowered.append(one))
    engine = make_engine(model, 2, prefix_cache=PrefixCacheOptions(1 << 30))
    engine._programs.compile(engine._params)
    step, prefill, copy, save, load_pages, load_tail = (one.as_text(debug_info=True) for one in lowered)
    for name in ("trunk", "history", "verify", "sample", "draft"):
        assert f"engine.{name}/" in step
    for name in ("prefill", "history", "draft", "save_pages"):
        assert f"engine.{name}/" in prefill
    assert "engine.copy/" in copy and "engine.save_pages/" in save
    assert "engine.load_pages/" in load_pages and "engine.load_tail/" in load_tail
