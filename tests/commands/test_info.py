"""The model card says what the cost model computes, in numbers for programs and in tables for people."""

import dataclasses
import json

import pytest
from rich.console import Console

from tests.conftest import DATA
from v4_jax import Config, costs
from v4_jax.commands import info_report as info
from v4_jax.commands.shared.sizes import format_size, parse_size, share_text

FLASH = Config.flash()


def printed(config, context):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(info.render(config, context))
    return capture.get()


def test_the_card_for_programs():
    card = json.loads(json.dumps(info.as_json(FLASH, 65536)))
    assert card["layers"]["attention"] == {"sliding": 2, "csa": 21, "hca": 20}
    assert card["layers"]["feed_forward"] == {"hash": 3, "routed": 40}
    assert card["layers"]["period"] == {"start": 3, "repeats": 20, "attention": ["hca", "csa"]}
    assert card["parameters"] == {**FLASH.parameter_counts()._asdict(), "checkpoint": 290942289362}
    assert card["bytes"]["native"]["total"] == sum(card["bytes"]["native"]["by_format"].values()) == 159609485896
    decode, prefill = card["flops_per_token"]["decode"], card["flops_per_token"]["prefill"]
    assert decode["total"] == FLASH.flops_per_token(65536).total
    assert prefill["index"] < decode["index"]
    assert card["cache_bytes"]["dtype"] == "released"
    assert card["cache_bytes"]["by_role"] == FLASH.cache_bytes(65536).by_role
    assert card["comparison"]["cache_ratio"] == costs.compare(FLASH, 65536).cache_ratio


def test_the_card_for_people():
    text = printed(FLASH, 1024**2)
    for said in (
        *("layers 3 to 42: (hca, csa) x 20", "2 to 42 by 2", "284.33B", "13.27B", "6.61B", "159.61 GB", "568.74 GB"),
        *("at 1M tokens", "90.19G", "118.85G", "3,360.0", "3.70 GB", "50.40 GB", "10.0%", "9.9%", "7.3%", "2.0%"),
    ):
        assert said in text, said


def test_a_directory_without_weights(run, tmp_path):
    """Its card is that of the same configuration, and what was not checked is said."""
    (tmp_path / "config.json").write_text((DATA / "flash-tiny" / "config.json").read_text())
    alone, whole = run("info", tmp_path, "--json"), run("info", DATA / "flash-tiny", "--json")
    assert alone.code == whole.code == 0
    assert json.loads(alone.out)["parameters"] == json.loads(whole.out)["parameters"]
    assert alone.err == f"{tmp_path} has a config.json and no weights: nothing else was checked\n" and not whole.err


def test_layers_that_never_repeat():
    config = dataclasses.replace(
        Config.tiny(), num_hidden_layers=2, num_hash_layers=1, num_nextn_predict_layers=0, compress_ratios=(0, 4)
    )
    assert info.as_json(config, 256)["layers"]["period"]["attention"] == []
    text = printed(config, 256)
    assert "no roles repeat" in text and "MTP block: " not in text


def test_head_sizes_that_the_released_cache_cannot_hold():
    config = dataclasses.replace(Config.tiny(), head_dim=96)
    assert info.as_json(config, 256)["cache_bytes"]["dtype"] == "bfloat16"
    assert "bfloat16 format" in printed(config, 256)


def test_a_context_out_of_range_is_refused():
    with pytest.raises(ValueError, match="out of range"):
        info.render(FLASH, 2 * 1024**2)


@pytest.mark.parametrize(
    ("text", "size"), [("131072", 131072), ("64K", 65536), ("1M", 1048576), ("2m", 2097152), (" 3 k ", 3072)]
)
def test_sizes(text, size):
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "M", "0", "0K", "-1", "1.5K", "1T", "1MK", "64 Kb", "１"])
def test_nonsense_is_no_size(text):
    with pytest.raises(ValueError, match="expected a positive whole number"):
        parse_size(text)


def test_shares_are_never_written_as_nothing():
    assert [share_text(share) for share in (0, 1e-6, 4e-4, 6e-4, 0.1)] == [
        "0.0%",
        "under 0.1%",
        "under 0.1%",
        "0.1%",
        "10.0%",
    ]
    assert "0.0%" not in printed(Config.tiny(), 256)


def test_sizes_are_written_briefly():
    assert [format_size(size) for size in (1, 1000, 1024, 131072, 1048576, 1048577)] == [
        *("1", "1000", "1K", "128K", "1M", "1048577")
    ]
