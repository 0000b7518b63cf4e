"""What loading leaves out, by rule, and says so."""

import dataclasses
import logging

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint.directories import assert_same_tree, config_of, read_directory, write_directory
from tests.conftest import DATA
from v4_jax.checkpoint import CheckpointError, convert, export, load, open_checkpoint, verify

SOURCE = DATA / "flash-tiny"


def trunk(tensors):
    return {name: array for name, array in tensors.items() if not name.startswith("mtp.")}


def without_mtp(config):
    layers = config.num_hidden_layers
    return dataclasses.replace(config, num_nextn_predict_layers=0, compress_ratios=config.compress_ratios[:layers])


def expected_trunk():
    config, params = load(SOURCE)
    params.pop("mtp")
    return without_mtp(config), params


def test_duplicate_embedding_and_head_are_ignored(tmp_path, caplog):
    tensors = read_directory(SOURCE)
    copies = {"mtp.0.emb.tok_emb.weight": tensors["embed.weight"], "mtp.0.head.weight": tensors["head.weight"]}
    path = write_directory(tmp_path / "model", config_of(SOURCE), {**tensors, **copies})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.ignored == {"duplicate MTP embedding and head": tuple(copies)}
    with caplog.at_level(logging.WARNING):
        config, params = load(path)
    assert "2 tensors are ignored: duplicate MTP embedding and head" in caplog.text
    expected_config, expected = load(SOURCE)
    assert config == expected_config
    assert_same_tree(params, expected)


def test_the_rule_takes_nothing_else(tmp_path):
    tensors = {**read_directory(SOURCE), "mtp.0.header.weight": np.zeros(3, np.float32)}
    path = write_directory(tmp_path / "model", config_of(SOURCE), tensors)
    with pytest.raises(CheckpointError, match=r"no place for: mtp\.0\.header\.weight"):
        load(path)


def draft_release(tmp_path):
    """A release whose MTP block is replaced by a three-stage DSpark draft."""
    tensors, config = read_directory(SOURCE), config_of(SOURCE)
    dim, bfloat16 = config["hidden_size"], ml_dtypes.bfloat16
    draft = {
        "mtp.0.main_proj.weight": np.zeros((dim, 3 * dim), ml_dtypes.float8_e4m3fn),
        "mtp.0.main_proj.scale": np.ones((2, 5), ml_dtypes.float8_e8m0fnu),
        "mtp.0.main_norm.weight": np.ones(dim, bfloat16),
        "mtp.2.norm.weight": np.ones(dim, bfloat16),
        "mtp.2.markov_head.markov_w1.weight": np.ones((config["vocab_size"], 16), bfloat16),
        "mtp.2.confidence_head.proj.weight": np.ones((1, dim + 16), bfloat16),
    }
    blocks = {
        name.replace("mtp.0.", f"mtp.{stage}."): array
        for name, array in tensors.items()
        for stage in range(3)
        if name.startswith(("mtp.0.attn", "mtp.0.ffn", "mtp.0.hc_attn", "mtp.0.hc_ffn"))
    }
    config.update(
        compress_ratios=[*config["compress_ratios"], 0, 0],
        dspark_block_size=5,
        dspark_noise_token_id=7,
        dspark_target_layer_ids=[2, 3, 4],
        dspark_markov_rank=16,
    )
    path = write_directory(tmp_path / "draft", config, {**trunk(tensors), **draft, **blocks})
    return path, [*draft, *blocks]


def test_dspark_draft_is_ignored(tmp_path, caplog):
    path, names = draft_release(tmp_path)
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint.ignored["DSpark draft"]) == set(names)
    with caplog.at_level(logging.WARNING):
        config, params = load(path)
    assert f"{len(names)} tensors of a DSpark draft are ignored" in caplog.text
    expected_config, expected = expected_trunk()
    assert config == expected_config
    assert_same_tree(params, expected)


def test_dspark_draft_through_conversion_and_export(tmp_path):
    path, names = draft_release(tmp_path)
    convert(path, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "out")
    for directory in ("orbax", "out"):
        config, params = load(tmp_path / directory)
        expected_config, expected = expected_trunk()
        assert config == expected_config
        assert_same_tree(params, expected)
        written = config_of(tmp_path / directory)
        assert written["num_nextn_predict_layers"] == 0
        assert len(written["compress_ratios"]) == written["num_hidden_layers"]
        assert not [key for key in written if key.startswith("dspark")]
        comparison = verify(path, tmp_path / directory)
        assert comparison.equal
        assert comparison.ignored["a"] == {"DSpark draft": len(names)}
        assert comparison.ignored["b"] == {}


@pytest.mark.parametrize("copies", [False, True])
def test_mtp_block_that_is_absent(tmp_path, caplog, copies):
    tensors = trunk(read_directory(SOURCE))
    if copies:
        tensors["mtp.0.head.weight"] = tensors["head.weight"]
    path = write_directory(tmp_path / "model", config_of(SOURCE), tensors)
    with caplog.at_level(logging.WARNING):
        config, params = load(path)
    assert "announces a multi-token-prediction block that the checkpoint lacks: loaded without" in caplog.text
    expected_config, expected = expected_trunk()
    assert config == expected_config
    assert_same_tree(params, expected)


def test_mtp_block_that_is_incomplete(tmp_path):
    tensors = read_directory(SOURCE)
    del tensors["mtp.0.e_proj.weight"]
    path = write_directory(tmp_path / "model", config_of(SOURCE), tensors)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor: mtp\.0\.e_proj\.weight"):
        load(path)


def test_mtp_block_that_the_configuration_does_not_have(tmp_path):
    config = config_of(SOURCE)
    config.update(num_nextn_predict_layers=0, compress_ratios=config["compress_ratios"][:-1])
    path = write_directory(tmp_path / "model", config, read_directory(SOURCE))
    with pytest.raises(CheckpointError, match=r"no place for: mtp\.0\."):
        load(path)
