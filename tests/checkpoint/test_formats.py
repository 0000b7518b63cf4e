"""`export --format`: BF16 under transformers' names, FP8 of the same values, and the released layout again."""

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint.directories import (
    assert_same_tensors,
    assert_same_tree,
    config_of,
    read_directory,
    write_directory,
)
from tests.checkpoint.repackaging import dequantised, nvfp4, repackage, stacked, values_of
from tests.conftest import DATA
from v4_jax.checkpoint import CheckpointError, convert, export, load, verify
from v4_jax.checkpoint.block_formats import as_fp8, pack, unpack
from v4_jax.config import Config

SOURCE = DATA / "flash-tiny"  # FP4 experts, MTP


@pytest.mark.parametrize("name", ["flash-tiny", "flash-base-tiny", "dspark-tiny"])
def test_bf16(tmp_path, name):
    written = export(DATA / name, tmp_path / "bf16", format="bf16")
    tensors = read_directory(tmp_path / "bf16")
    assert_same_tensors(tensors, stacked(dequantised(DATA / name)))
    assert written.tensors == len(tensors)
    config = config_of(tmp_path / "bf16")
    assert "quantization_config" not in config and config["expert_dtype"] == "bf16"
    assert_same_tree(load(tmp_path / "bf16")[1], load(DATA / name, dtype="bfloat16")[1])
    export(tmp_path / "bf16", tmp_path / "again", format="bf16")
    assert verify(tmp_path / "bf16", tmp_path / "again").equal


def test_released_from_bf16(tmp_path):
    """Quantised as the release is: the same values wherever a block has a value that needs its scale."""
    export(SOURCE, tmp_path / "bf16", format="bf16")
    export(tmp_path / "bf16", tmp_path / "out")
    a, b = read_directory(SOURCE), read_directory(tmp_path / "out")
    assert Config.from_hf(tmp_path / "out") == Config.from_hf(SOURCE)
    assert {name: (array.dtype, array.shape) for name, array in a.items()} == {
        n: (t.dtype, t.shape) for n, t in b.items()
    }
    for name in a:
        if name.endswith(".weight") and name.replace(".weight", ".scale") in a:
            scale = name.replace(".weight", ".scale")
            np.testing.assert_array_equal(values_of(b[name], b[scale]), values_of(a[name], a[scale]))
        elif not name.endswith(".scale"):
            assert a[name].tobytes() == b[name].tobytes()


@pytest.mark.parametrize(("key", "value"), [("w1", np.nan), ("w2", -np.inf), ("wq_a", np.nan)])
def test_what_no_block_can_hold_is_refused(tmp_path, key, value):
    """A number that is not finite would make zeros of its block, and FP4 has none to say so."""

    def damaged(path, leaf):
        values = np.array(leaf)
        if path[-1].key == key:
            values[..., 1, 2] = value
        return values

    config, params = load(SOURCE, dtype="float32")
    params = jax.tree_util.tree_map_with_path(damaged, params)
    with pytest.raises(CheckpointError, match=rf"{key}\.\w+ holds {value} at \[1, 2\] \(and 0 more\), expected finite"):
        export((config, params), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["flash-tiny", "released-tiny", "dspark-tiny"])
def test_fp8_is_lossless(tmp_path, name):
    """There: the same values, signs of zeros included. And back: their FP4 codes and scales."""
    source = DATA / name
    export(source, tmp_path / "fp8", format="fp8")
    assert config_of(tmp_path / "fp8")["expert_dtype"] == "fp8"
    assert_same_tree(load(tmp_path / "fp8", dtype="float32")[1], load(source, dtype="float32")[1])
    before, after = read_directory(source), read_directory(tmp_path / "fp8")
    experts = [name for name in before if ".experts." in name and name.endswith(".weight")]
    assert experts
    for weight in experts:
        scale = weight.replace(".weight", ".scale")
        assert after[weight].dtype == ml_dtypes.float8_e4m3fn
        again = values_of(after[weight], after[scale]) / np.repeat(before[scale].astype(np.float32), 32, 1)
        assert pack(again.astype(ml_dtypes.float4_e2m1fn)).tobytes() == before[weight].tobytes()
    others = set(before) - set(experts) - {weight.replace(".weight", ".scale") for weight in experts}
    assert_same_tensors({name: after[name] for name in others}, {name: before[name] for name in others})
    for kind in ("convert", "export"):
        (convert if kind == "convert" else export)(tmp_path / "fp8", tmp_path / kind)
        assert verify(tmp_path / "fp8", tmp_path / kind).equal


def test_fp8_of_every_scale_and_its_limit():
    codes = pack(np.tile(np.arange(16, dtype=np.uint8), (129, 24)).view(ml_dtypes.float4_e2m1fn))  # [129, 384]
    assert unpack(codes).shape == (129, 384)
    exponents = np.full((129, 12), 120, np.uint8)
    exponents[:, ::3] -= np.arange(4, dtype=np.uint8) * 4
    exponents[5, 1], exponents[128, 7] = 0, 0  # in tiles of others, too small: of these, only zeros are exact
    made = exponents.copy()
    made[5, 1] = made[128, 7] = 120 - 14
    scales = made.view(ml_dtypes.float8_e8m0fnu)
    new_codes, new_scales = as_fp8("w", codes, scales)
    assert new_scales.shape == (2, 3)
    assert values_of(new_codes, new_scales).tobytes() == values_of(codes, scales).tobytes()
    with pytest.raises(CheckpointError, match=r"w cannot be FP8 of the same values: the tile of element \[5, 33\] has"):
        as_fp8("w", codes, exponents.view(ml_dtypes.float8_e8m0fnu))
    smallest = np.zeros((1, 4), np.uint8).view(ml_dtypes.float8_e8m0fnu)
    row = codes[:1, :64]
    assert values_of(*as_fp8("w", row, smallest)).tobytes() == values_of(row, smallest).tobytes()


def test_nvfp4_cannot_be_fp8(tmp_path):
    path = repackage(tmp_path / "model", SOURCE, nvfp4(SOURCE, packed=False)[0], expert_dtype=None)
    with pytest.raises(CheckpointError, match="has experts in NVFP4, which FP8 cannot hold exactly"):
        export(path, tmp_path / "fp8", format="fp8")
    export(path, tmp_path / "bf16", format="bf16")
    assert_same_tree(load(tmp_path / "bf16")[1], load(path, dtype="bfloat16")[1])


def test_partly_quantised(tmp_path):
    """FP4 experts beside linear layers in BF16: kept in memory as it is, quantised in the released layout."""
    plain, released = dequantised(SOURCE), read_directory(SOURCE)
    mixed = {name: array for name, array in plain.items() if ".experts." not in name or "shared" in name}
    mixed |= {name: array for name, array in released.items() if ".experts." in name and "shared" not in name}
    path = write_directory(tmp_path / "model", config_of(SOURCE), mixed)
    assert_same_tree(load(path, dtype="bfloat16")[1], load(SOURCE, dtype="bfloat16")[1])
    export(path, tmp_path / "out")
    assert_same_tree(load(tmp_path / "out", dtype="float32")[1], load(SOURCE, dtype="float32")[1])


def test_an_unknown_format(tmp_path):
    with pytest.raises(CheckpointError, match="format is 'int4', expected one of released, bf16, fp8"):
        export(SOURCE, tmp_path / "out", format="int4")
    assert not list(tmp_path.iterdir())
