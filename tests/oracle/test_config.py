"""transformers' configuration of the released models is ours, in every layout that it writes."""

import copy
import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DeepseekV4Config

from tests.conftest import CHECKPOINTS, DATA
from v4_jax import Config

RELEASED = {name: json.loads((DATA / name / "config.json").read_text()) for name in CHECKPOINTS}
RELEASED |= {"flash": Config.flash().to_hf(), "pro": Config.pro().to_hf()}


@pytest.mark.parametrize("name", RELEASED)
def test_transformers_configuration_is_ours(name, tmp_path):
    theirs = DeepseekV4Config(**copy.deepcopy(RELEASED[name]))  # it edits what it is given
    theirs.save_pretrained(tmp_path)
    reread = DeepseekV4Config.from_pretrained(tmp_path)
    ours = Config.from_hf(RELEASED[name])
    assert Config.from_hf(theirs.to_dict()) == ours
    assert Config.from_hf(tmp_path) == ours
    assert Config.from_hf(reread.to_dict()) == ours


@pytest.mark.parametrize("config", [Config.flash(), Config.pro(), Config.tiny()])
def test_transformers_reads_what_we_write(config):
    theirs = DeepseekV4Config(**config.to_hf())
    roles = {
        "sliding_attention": "sliding",
        "compressed_sparse_attention": "csa",
        "heavily_compressed_attention": "hca",
    }
    kinds = {"hash_moe": "hash", "moe": "routed"}
    layers = zip(theirs.layer_types, theirs.mlp_layer_types, strict=True)
    assert tuple((roles[a], kinds[b]) for a, b in layers) == config.layers
    assert theirs.qk_rope_head_dim == config.qk_rope_head_dim
    assert theirs.rope_parameters["main"]["rope_type"] == "default"
    assert theirs.rope_parameters["compress"]["rope_type"] == "yarn"
