"""What loading leaves out, by rule, and says so."""

import logging

import numpy as np
import pytest

from tests.checkpoint.directories import assert_same_tree, config_of, read_directory, write_directory
from tests.conftest import DATA
from v4_jax.checkpoint import CheckpointError, convert, export, load, open_checkpoint, verify

SOURCE = DATA / "flash-tiny"


def trunk(tensors):
    return {name: array for name, array in tensors.items() if not name.startswith("mtp.")}


def expected_trunk():
    config, params = load(SOURCE)
    params.pop("mtp")
    return config.trunk(), params


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


DSPARK = DATA / "dspark-tiny"


def undescribed(tmp_path):
    """A release with DSpark stages whose `config.json` does not describe them."""
    config = {key: value for key, value in config_of(DSPARK).items() if not key.startswith("dspark_")}
    tensors = read_directory(DSPARK)
    return write_directory(tmp_path / "draft", config, tensors), [name for name in tensors if name.startswith("mtp.")]


def trunk_of_dspark():
    config, params = load(DSPARK)
    params.pop("dspark")
    return config.trunk(), params


def test_stages_that_nothing_describes_are_ignored(tmp_path, caplog):
    path, names = undescribed(tmp_path)
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint.ignored["DSpark draft"]) == set(names)
    with caplog.at_level(logging.WARNING):
        config, params = load(path)
    assert f"{len(names)} tensors of a DSpark draft are ignored: config.json lacks" in caplog.text
    expected_config, expected = trunk_of_dspark()
    assert config == expected_config
    assert_same_tree(params, expected)


def test_ignored_stages_through_conversion_and_export(tmp_path):
    path, names = undescribed(tmp_path)
    convert(path, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "out")
    for directory in ("orbax", "out"):
        config, params = load(tmp_path / directory)
        expected_config, expected = trunk_of_dspark()
        assert config == expected_config
        assert_same_tree(params, expected)
        written = config_of(tmp_path / directory)
        assert written["num_nextn_predict_layers"] == 0
        assert len(written["compress_ratios"]) == written["num_hidden_layers"]
        comparison = verify(path, tmp_path / directory)
        assert comparison.equal
        assert comparison.ignored["a"] == {"DSpark draft": len(names)}
        assert comparison.ignored["b"] == {}


def test_the_tensors_say_how_many_stages_there_are(tmp_path):
    """transformers' layout does not; neither does one whose ratios were cut to the MTP block's."""
    config = config_of(DSPARK)
    config["compress_ratios"] = config["compress_ratios"][:-2]
    path = write_directory(tmp_path / "cut", config, read_directory(DSPARK))
    (found, params), (expected_config, expected) = load(path), load(DSPARK)
    assert found == expected_config
    assert_same_tree(params, expected)


def test_stages_that_are_absent_or_another_block(tmp_path, caplog):
    path = write_directory(tmp_path / "trunk", config_of(DSPARK), trunk(read_directory(DSPARK)))
    with caplog.at_level(logging.WARNING):
        config, params = load(path)
    assert "announces DSpark stages that the checkpoint lacks: loaded without" in caplog.text
    expected_config, expected = trunk_of_dspark()
    assert config == expected_config
    assert_same_tree(params, expected)
    other = {key: value for key, value in config_of(DSPARK).items() if key.startswith("dspark_")}
    other |= {"dspark_noise_token_id": 7}
    path = write_directory(tmp_path / "mtp", config_of(SOURCE) | other, read_directory(SOURCE))
    with pytest.raises(
        CheckpointError, match="announces DSpark stages, but the checkpoint has a multi-token-prediction"
    ):
        load(path)


def test_an_incomplete_stage(tmp_path):
    tensors = read_directory(DSPARK)
    del tensors["mtp.2.confidence_head.proj.weight"]
    path = write_directory(tmp_path / "model", config_of(DSPARK), tensors)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor: mtp\.2\.confidence_head\.proj\.weight"):
        load(path)


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
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.draft_blocks == 0 and set(checkpoint.ignored) == {"MTP block that is switched off"}
        assert "tensors of an MTP block are ignored: config.json has num_nextn_predict_layers 0" in checkpoint.notes[0]
    assert "mtp_0" not in load(path)[1] and "mtp" not in load(path)[1]
