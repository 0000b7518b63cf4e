"""Costs against what is published, against what is really allocated, and against brute force."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from v4_jax import Config, costs, init, init_cache
from v4_jax.number_formats import bytes_of

MILLION = 1024**2
FLASH, PRO, TINY = Config.flash(), Config.pro(), Config.tiny()
NO_MTP = dataclasses.replace(TINY, num_nextn_predict_layers=0, compress_ratios=TINY.compress_ratios[:-1])
SLIDING = dataclasses.replace(TINY, compress_ratios=(0,) * len(TINY.compress_ratios))


def billions(count, digits=2):
    return f"{count / 1e9:.{digits}f}"


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_flash_has_its_published_parameters():
    counts = FLASH.parameter_counts()
    assert billions(counts.total) == "284.33"
    assert billions(counts.active) == "13.27"
    assert billions(counts.draft) == "6.61"
    assert billions(counts.checkpoint) == "290.94"


def test_pro_has_its_published_parameters():
    counts = PRO.parameter_counts()
    assert billions(counts.total, 1) == "1573.0"
    assert billions(counts.active) == "48.85"
    assert billions(counts.draft) == "25.84"
    assert billions(counts.checkpoint) == "1598.84"


def test_the_official_releases_draft_with_their_published_parameters():
    for config, preview, published in ((Config.flash_0731(), FLASH, "19.8"), (Config.pro_0813(), PRO, "77.5")):
        counts = config.parameter_counts()
        assert counts._replace(draft=0) == preview.parameter_counts()._replace(draft=0)
        assert billions(counts.draft, 1) == published


def test_drafting_costs_what_its_parameters_say():
    """Of a block of one draft, each parameter counts once, but for a token's key besides the draft's."""
    one = dataclasses.replace(Config.flash_0731(), dspark_block_size=1)
    counts, d, size = one.parameter_counts(), one.hidden_size, one.head_dim
    experts = 3 * 3 * d * one.moe_intermediate_size * (one.n_routed_experts - one.num_experts_per_tok)
    multiplied = counts.draft - experts - one.vocab_size * one.dspark_markov_rank
    linear = 2 * (multiplied + one.vocab_size * d + 3 * size * d)
    assert one.draft_flops() == linear + 3 * 4 * (128 + 1) * one.num_attention_heads * size
    assert NO_MTP.draft_flops() == 0 < TINY.draft_flops() < TINY.flops_per_token(1).total


def test_a_further_expert_per_token_activates_one_expert_per_layer():
    one_more = dataclasses.replace(TINY, num_experts_per_tok=TINY.num_experts_per_tok + 1)
    # The hash table widens too, and must not count.
    difference = costs.parameter_counts(one_more).active - costs.parameter_counts(TINY).active
    assert difference == TINY.num_hidden_layers * 3 * TINY.hidden_size * TINY.moe_intermediate_size
    assert costs.parameter_counts(one_more).total == costs.parameter_counts(TINY).total


def test_a_further_token_id_activates_its_head_row_alone():
    wider = dataclasses.replace(TINY, vocab_size=TINY.vocab_size + 1)
    before, after = costs.parameter_counts(TINY), costs.parameter_counts(wider)
    assert after.active - before.active == TINY.hidden_size
    assert after.total - before.total == 2 * TINY.hidden_size
    assert after.draft == before.draft


def test_the_mtp_block_is_counted_apart():
    counts = costs.parameter_counts(TINY)
    assert costs.parameter_counts(NO_MTP) == counts._replace(draft=0)
    for dtype in ("native", "bfloat16", "float32"):
        whole, trunk = costs.parameter_bytes(TINY, dtype), costs.parameter_bytes(NO_MTP, dtype)
        assert whole.draft > 0 == trunk.draft
        assert whole.total - whole.draft == trunk.total


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (FLASH, 159_609_485_896),
        (PRO, 864_704_792_696),
        (dataclasses.replace(FLASH, expert_dtype="fp8"), 292_555_345_480),  # Flash-Base: FP8 experts, float32 scales
    ],
    ids=["flash", "pro", "flash-base"],
)
def test_native_bytes_are_the_published_checkpoint_sizes(config, published):
    assert costs.parameter_bytes(config).total == published


def test_flash_takes_568_gigabytes_in_bfloat16():
    size = costs.parameter_bytes(FLASH, "bfloat16")
    assert (size.total - size.draft) // 10**9 == 568
    assert set(size.by_format) == {"bfloat16", "float32", "int32"}


def test_float32_bytes_are_those_of_fresh_parameters():
    fresh = jax.eval_shape(functools.partial(init, TINY), jax.random.key(0))
    assert costs.parameter_bytes(TINY, "float32").total == sum(bytes_of(leaf) for leaf in jax.tree.leaves(fresh))


def test_an_unknown_weight_dtype_is_refused():
    with pytest.raises(ValueError, match="'fp8', expected 'native'"):
        costs.parameter_bytes(TINY, "fp8")


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FLASH, PRO, TINY, SLIDING], ids=["flash", "pro", "tiny", "sliding"])
def test_linear_flops_are_two_per_active_parameter(config):
    flops = costs.flops_per_token(config, 4096)
    assert sum(flops.linear.values()) == 2 * costs.parameter_counts(config).active
    compressed = {"compressors", "indexer"} if config is not SLIDING else set()
    assert set(flops.linear) == {"attention", "experts", "hyper-connections", "head"} | compressed


def test_linear_roles_hold_what_they_say():
    linear = costs.flops_per_token(FLASH, 1).linear
    # Six routed experts and the shared one, the router and its bias, and the norm before them, in 43 layers.
    per_layer = 7 * 3 * 4096 * 2048 + 256 * 4096 + 4096
    assert linear["experts"] == 2 * (43 * per_layer + 40 * 256)
    assert linear["head"] == 2 * (129280 * 4096 + 4096)
    # Values and gates; entries of 512 channels, twice where blocks overlap; bias per slot and channel; norm.
    csa = 2 * 1024 * 4096 + 4 * 1024 + 512
    hca = 2 * 512 * 4096 + 128 * 512 + 512
    assert linear["compressors"] == 2 * (21 * csa + 20 * hca)
    indexer = 64 * 128 * 1024 + 64 * 4096 + 2 * 256 * 4096 + 4 * 256 + 128
    assert linear["indexer"] == 2 * 21 * indexer


def test_a_million_tokens_of_flash_by_hand():
    flops = costs.flops_per_token(FLASH, MILLION)
    per_key = 4 * 64 * 512
    assert flops.attention == {
        "window": 43 * 128 * per_key,
        "csa": 21 * 512 * per_key,
        "hca": 20 * MILLION // 128 * per_key,
    }
    assert flops.index == 21 * MILLION // 4 * 2 * 64 * 128
    assert flops.total == sum(flops.linear.values()) + sum(flops.attention.values()) + flops.index


def test_short_contexts_see_few_keys():
    per_key = 4 * TINY.num_attention_heads * TINY.head_dim
    flops = costs.flops_per_token(TINY, 7)
    assert flops.attention == {"window": 7 * 7 * per_key, "csa": 3 * per_key, "hca": 0}
    assert flops.index == 3 * 2 * TINY.index_n_heads * TINY.index_head_dim


@pytest.mark.parametrize("context", [1, 3, 4, 31, 33, 127, 128, 4 * TINY.index_topk + 3, 300])
def test_prefill_is_the_mean_over_decoded_tokens(context):
    prefill = costs.flops_per_token(TINY, context, phase="prefill")
    steps = [costs.flops_per_token(TINY, length) for length in range(1, context + 1)]
    for role, value in prefill.attention.items():
        assert value == round(sum(step.attention[role] for step in steps) / context)
    assert prefill.index == round(sum(step.index for step in steps) / context)
    assert prefill.linear == steps[0].linear


def test_weights_of_the_precisions():
    flops = costs.Flops(linear={"a": 100, "b": 10}, attention={"window": 7, "csa": 3}, index=8)
    assert flops.total == 128
    assert flops.equivalent_fp8 == 110 + 2 * 10 + 8 / 2


def test_flops_refuse_nonsense():
    with pytest.raises(ValueError, match="context is 0"):
        costs.flops_per_token(TINY, 0)
    with pytest.raises(ValueError, match="unknown phase 'training'"):
        costs.flops_per_token(TINY, 1, phase="training")


# ---- cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["released", "bfloat16", "float32"])
@pytest.mark.parametrize("config", [TINY, NO_MTP, SLIDING], ids=["tiny", "no-mtp", "sliding"])
@pytest.mark.parametrize("context", [1, 130, 1000])
def test_cache_bytes_are_those_of_a_real_cache(config, context, dtype):
    predicted = costs.cache_bytes(config, context, dtype)
    rows = 3
    real = init_cache(config, rows, context, dtype=dtype)
    assert {role: rows * size for role, size in predicted.by_role.items()} == real.nbytes()
    leaves = [leaf for leaf in jax.tree.leaves(real) if leaf.dtype != np.int32]  # lengths are no keys
    assert rows * predicted.total == sum(bytes_of(leaf) for leaf in leaves)
    assert predicted.trunk == predicted.total - predicted.by_role.get("draft", 0)


def test_a_million_tokens_of_flash_cache():
    cache = FLASH.cache_bytes(MILLION)
    content, entry, key = 448 + 448 // 64 + 2 * 64, 640, 128 // 2 + 128 // 32
    rows = 43 * (128 + 8) + 21 * MILLION // 4 + 20 * MILLION // 128
    assert cache.padding == rows * (entry - content)
    assert cache.by_role == {
        "window": 43 * (128 + 8) * entry,
        "csa": 21 * MILLION // 4 * entry,
        "hca": 20 * MILLION // 128 * entry,
        "index": 21 * MILLION // 4 * key,
        "open blocks": 4 * (21 * (8 + 8) * 2 * (1024 + 256) + 20 * (128 + 8) * 1024),
        "draft": (128 + 8) * entry,
    }
    shapes = jax.eval_shape(functools.partial(init_cache, FLASH, 1, MILLION, dtype="bfloat16"))
    assert costs.cache_bytes(FLASH, MILLION, "bfloat16").by_role == shapes.nbytes()


@pytest.mark.parametrize("dtype", ["released", "bfloat16"])
def test_cache_grows_by_its_bytes_per_token(dtype):
    short, long = costs.cache_bytes(PRO, 2048, dtype), costs.cache_bytes(PRO, 65536, dtype)
    for role in long.by_role:
        assert long.by_role[role] - short.by_role[role] == (65536 - 2048) * long.per_token.get(role, 0)


def test_a_context_out_of_range_is_refused():
    with pytest.raises(ValueError, match="out of range"):
        costs.cache_bytes(TINY, 2 * MILLION)
    with pytest.raises(ValueError, match="unknown cache dtype 'int8'"):
        costs.cache_bytes(TINY, 128, "int8")


# ---- comparison ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "flops", "cache"), [(PRO, "26.5%", "10.5%"), (FLASH, "10.0%", "7.3%")], ids=["pro", "flash"]
)
def test_shares_of_v32_and_of_grouped_query_attention(config, flops, cache):
    against = costs.compare(config, MILLION)
    assert f"{against.flops_ratio:.1%}" == flops
    assert f"{against.cache_ratio:.1%}" == cache
    assert f"{against.gqa_ratio:.1%}" == "2.0%"


@pytest.mark.parametrize(("config", "share"), [(PRO, "26.5%"), (FLASH, "9.9%")], ids=["pro", "flash"])
def test_shares_from_the_headline_parameter_counts(config, share):
    """The headlines round 13.27B to 13B, 48.85B to 49B and V3.2's 37.48B to 37B: Flash's 9.97% is then 9.93%."""
    assert f"{costs.compare(config, MILLION).headline_ratio:.1%}" == share


def test_the_comparison_leaves_the_mtp_block_out():
    assert costs.compare(TINY, 300) == costs.compare(NO_MTP, 300)


def test_v32_has_its_published_shape():
    model = costs.DeepSeekV32()
    total, active = model.parameters()
    indexers = 61 * (1536 * 64 * 128 + 7168 * 128 + 7168 * 64)
    assert billions(total - indexers) == "671.03"  # V3, which has none
    assert billions(active, 1) == "37.5"
    assert model.cache_bytes(10) == 10 * 61 * (656 + 132)


def test_v32_picks_at_most_what_there_is():
    model = costs.DeepSeekV32()
    per_token = 61 * (2 * 2 * 128 * (576 + 512) + 2 * 64 * 128)
    assert model.equivalent_fp8_flops(11) - model.equivalent_fp8_flops(10) == per_token
    assert model.equivalent_fp8_flops(3001) - model.equivalent_fp8_flops(3000) == 61 * 2 * 64 * 128


def test_config_offers_its_costs():
    assert TINY.parameter_counts() == costs.parameter_counts(TINY)
    assert TINY.flops_per_token(300) == costs.flops_per_token(TINY, 300)
    assert TINY.cache_bytes(300, "float32") == costs.cache_bytes(TINY, 300, "float32")
    assert TINY.cache_bytes(300) == costs.cache_bytes(TINY, 300, "released")
