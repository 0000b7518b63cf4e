"""The TPU compiler takes the engine's programs, and none of them copies the cache's pages around."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from tests.conftest import tpu_devices
from v4_jax import Config, Transformer
from v4_jax.infer.engine.drafters import choose_drafter
from v4_jax.infer.engine.programs import Programs
from v4_jax.infer.prefix_cache.cache import PrefixCacheOptions
from v4_jax.infer.prefix_cache.pager import Pager
from v4_jax.placement import Place, bytes_per_device
from v4_jax.planning.job import abstract_params
from v4_jax.sharding.mesh import make_mesh

pytest.importorskip("libtpu")
pytestmark = pytest.mark.skipif(jax.default_backend() == "tpu", reason="other topologies need a host without TPUs")

SLOTS, LENGTH = 8, 1 << 15
MANY = 64  # times the pages that the slots could fill

# Flash's attention with few and narrow layers, a period of which repeats, and few experts.
CONFIG = dataclasses.replace(
    Config.flash(),
    vocab_size=1024,
    hidden_size=1024,
    num_hidden_layers=6,
    num_hash_layers=1,
    compress_ratios=(0, 4, 128, 4, 128, 4, 0),
    num_attention_heads=16,
    n_routed_experts=8,
)


DSPARK = dataclasses.replace(
    CONFIG,
    num_nextn_predict_layers=0,
    compress_ratios=(*CONFIG.compress_ratios, 0),
    dspark_block_size=5,
    dspark_noise_token_id=1023,
    dspark_target_layer_ids=(4, 5),
    dspark_markov_rank=128,
)


@pytest.mark.parametrize(("config", "draft"), [(CONFIG, "mtp:2"), (DSPARK, "dspark")])
def test_pages_stay_where_they_are(monkeypatch, config, draft):
    """With drafts and a prefix cache: the temporaries of no program have room for a copy of a role's pages."""
    place = Place(make_mesh("data=2,seq=2", tpu_devices("v5p:2x2x1")), "long-context")
    chunk = place.chunk(256)
    cache = place.cache_shapes(config, SLOTS, LENGTH, "bfloat16", pages=MANY * SLOTS * LENGTH // place.page)
    arguments = dict(drafter=choose_drafter(config, draft), chunk=chunk, place=place)
    params = abstract_params(config, place.mesh, place.rules, "native")
    pager = Pager(PrefixCacheOptions(1), config, params, cache, **arguments, policy="bfloat16", cache_dtype="bfloat16")
    model = Transformer(config, mesh=place.mesh, rules=place.rules)
    programs = Programs(model, cache, **arguments, pager=pager)

    found, compile_ = [], jax.stages.Lowered.compile

    def compiled(lowered, *rest, **options):
        found.append(compile_(lowered, *rest, **options).memory_analysis())

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    programs.compile(params)
    pages = bytes_per_device(cache.entries)
    assert len(found) == programs.count == 6
    assert max(one.temp_size_in_bytes for one in found) < pages / 8, [one.temp_size_in_bytes for one in found]
    step, read, copy, copy_page, put_pages, put_tail = found
    assert all(one.alias_size_in_bytes >= pages for one in (step, read, copy, put_pages, put_tail))
    assert copy_page.output_size_in_bytes < pages / 1000
