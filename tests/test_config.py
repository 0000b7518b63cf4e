"""Configuration: both layouts of config.json, refusals, roles."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.conftest import CHECKPOINTS, DATA
from v4_jax import Config, ConfigError


def released(**changes):
    """The Flash `config.json` with some keys changed; None removes one."""
    content = Config.flash().to_hf() | changes
    return {key: value for key, value in content.items() if value is not None}


def as_transformers(config: Config) -> dict:
    """The layout that transformers writes: roles by name, rotary parameters by role."""
    content = config.to_hf()
    names = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    ratios = content.pop("compress_ratios")[: config.num_hidden_layers]
    yarn = content.pop("rope_scaling")
    fraction = config.qk_rope_head_dim / config.head_dim
    return content | {
        "layer_types": [names[ratio] for ratio in ratios],
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * (config.num_hidden_layers - 3),
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "partial_rotary_factor": fraction,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": fraction},
            "compress": yarn | {"rope_type": "yarn", "rope_theta": 160000, "attention_factor": 1.0},
        },
    }


@pytest.mark.parametrize("config", [Config.flash(), Config.pro_0813(), Config.tiny()])
def test_round_trip(config):
    assert Config.from_hf(config.to_hf()) == config
    assert Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert Config.from_hf(as_transformers(config)) == config


def test_width_from_the_fraction_alone():
    content = as_transformers(Config.flash())
    del content["qk_rope_head_dim"]
    assert Config.from_hf(content).qk_rope_head_dim == 64


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fixture_configurations(name):
    config = Config.from_hf(DATA / name)
    on_disk = json.loads((DATA / name / "config.json").read_text())
    assert {key: config.to_hf()[key] for key in on_disk} == on_disk


def test_roles_of_the_released_models():
    flash, pro = Config.flash(), Config.pro()
    roles = [layer.attention for layer in flash.layers]
    assert roles[:5] == ["sliding", "sliding", "csa", "hca", "csa"] and roles[-1] == "csa"
    assert (roles.count("csa"), roles.count("hca")) == (21, 20)
    roles = [layer.attention for layer in pro.layers]
    assert roles[:4] == ["hca", "hca", "csa", "hca"] and (roles.count("csa"), roles.count("hca")) == (30, 31)
    for config in (flash, pro):
        assert [layer.feed_forward for layer in config.layers[:4]] == ["hash", "hash", "hash", "routed"]
        assert (config.period.start, config.period.length, config.period.stop) == (3, 2, config.num_hidden_layers)


def test_no_period_means_every_layer_stands_alone():
    config = dataclasses.replace(Config.tiny(), num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1)
    assert config.period.repeats == 0


def test_draft_entries_are_trimmed():
    ratios = [*Config.flash().compress_ratios, 0, 0]
    assert Config.from_hf(released(compress_ratios=ratios)) == Config.flash()


def test_dspark_stages():
    """Official configurations say 1 next-token block and have three more ratios than layers."""
    official = Config.flash_0731()
    content = official.to_hf()
    assert content["num_nextn_predict_layers"] == 1 and content["dspark_target_layer_ids"] == [40, 41, 42]
    assert content["compress_ratios"] == [*Config.flash().compress_ratios, 0, 0]
    assert (official.dspark_stages, official.num_nextn_predict_layers) == (3, 0)
    assert official.trunk() == Config.flash().trunk()
    assert not [key for key in Config.flash().to_hf() if key.startswith("dspark")]
    for changes, said in (
        ({"dspark_markov_rank": None}, "missing configuration keys .'dspark_markov_rank'."),
        ({"dspark_target_layer_ids": [42, 41]}, "expected rising numbers of layers below 43"),
        ({"dspark_target_layer_ids": [42, 43]}, "expected rising numbers of layers below 43"),
        ({"dspark_target_layer_ids": 3}, "expected a list"),
        ({"dspark_noise_token_id": 129280}, "expected one below 129280"),
        ({"compress_ratios": content["compress_ratios"][:43]}, "no entries for DSpark's stages"),
    ):
        changed = {key: value for key, value in (content | changes).items() if value is not None}
        with pytest.raises(ConfigError, match=said):
            Config.from_hf(changed)


REFUSED = {
    "unknown": (dict(query_temperature=2.0), r"unknown configuration keys \['query_temperature'\]"),
    "activation": (dict(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
    "scoring": (dict(scoring_func="sigmoid"), "scoring_func is 'sigmoid'"),
    "shared": (dict(n_shared_experts=2), "n_shared_experts is 2, expected 1"),
    "model": (dict(model_type="deepseek_v41"), "model_type is 'deepseek_v41'"),
    "ratio": (
        dict(compress_ratios=[0, 8, *Config.flash().compress_ratios[2:]]),
        r"contains 8, expected one of \[0, 4, 128\]",
    ),
    "count": (dict(compress_ratios=[0, 4]), "compress_ratios has 2 entries, expected 44"),
    "no rope": (dict(rope_scaling=None), "compressed layers would lose YaRN"),
    "rope type": (dict(rope_scaling=dict(type="linear", factor=2)), "expected 'yarn'"),
    "mscale": (dict(rope_scaling=Config.flash().to_hf()["rope_scaling"] | {"mscale": 0.7}), "no attention factor"),
    "rope key": (
        dict(rope_scaling=Config.flash().to_hf()["rope_scaling"] | {"gamma": 1}),
        r"unknown rope scaling keys \['gamma'\]",
    ),
    "missing": (dict(hidden_size=None), r"missing configuration keys \['hidden_size'\]"),
    "no clamp": (dict(swiglu_limit=None), r"missing configuration keys \['swiglu_limit'\]"),
    "blocks": (dict(quantization_config=dict(weight_block_size=[32, 32])), r"weight_block_size is \[32, 32\]"),
    "groups": (dict(o_groups=7), "not a multiple of o_groups 7"),
    "expert": (dict(expert_dtype="int8"), "expert_dtype is 'int8'"),
    "twice": (dict(partial_rotary_factor=0.25), "is not qk_rope_head_dim 64"),
    "text": (dict(hidden_size="big"), "hidden_size is 'big', expected a whole number"),
    "fraction": (dict(hidden_size=64.5), "hidden_size is 64.5, expected a whole number"),
    "truth": (dict(num_hash_layers=True), "num_hash_layers is True, expected a whole number"),
    "layers": (dict(num_hidden_layers=5.5), "num_hidden_layers is 5.5"),
    "ratio text": (dict(compress_ratios=["4"] * 44), "compress_ratios contains '4', expected whole numbers"),
    "limit": (dict(swiglu_limit="10"), "swiglu_limit is '10', expected a number"),
    "negative": (dict(index_topk=-1), "index_topk is -1"),
    "streams": (dict(hc_mult=10**7), "hc_mult is 10000000, expected at most 64"),
    "iterations": (dict(hc_sinkhorn_iters=10**7), "hc_sinkhorn_iters is 10000000, expected at most 1,024"),
    "no turn": (dict(compress_rope_theta=1), "compress_rope_theta is 1, expected a number above 1"),
    "subnormal": (dict(rms_norm_eps=1e-320), "rms_norm_eps is 1e-320, expected at least 1e-30"),
    "subnormal yarn": (
        dict(rope_scaling=Config.flash().to_hf()["rope_scaling"] | {"beta_fast": 1e-320}),
        "rope_scaling beta_fast is 1e-320, expected a number from 1e-30",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        Config.from_hf(released(**changes))


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a JSON list"):
        Config.from_hf(tmp_path)
