"""`verify` finds every difference, and says how large it is."""

import json

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint.directories import config_of, read_directory, write_directory
from tests.conftest import DATA
from v4_jax.checkpoint import CheckpointError, convert, interface, load, verify

SOURCE = DATA / "released-tiny"
WEIGHT = "layers.3.ffn.experts.2.w1"


def changed(tmp_path, edit, source=SOURCE, **config):
    tensors = read_directory(source)
    edit(tensors)
    return write_directory(tmp_path / "model", {**config_of(source), **config}, tensors, shards=3)


def test_equal_however_stored(released, tmp_path):
    convert(released, tmp_path / "orbax")
    seen = []
    comparison = verify(released, tmp_path / "orbax", progress=lambda *args: seen.append(args))
    assert comparison.equal and not comparison.differing
    tensors = read_directory(released)
    assert sum(kind.tensors for kind in comparison.kinds) == len(tensors)
    assert sum(kind.bytes for kind in comparison.kinds) == sum(a.nbytes for a in tensors.values())
    assert seen[-1][1] == seen[-1][2] == sum(a.nbytes for a in tensors.values())


def test_parameters_in_memory_compare_too():
    config, params = load(SOURCE)
    assert verify(SOURCE, (config, params)).equal
    params["norm"] = params["norm"] * 2
    assert only_difference(verify((config, params), SOURCE)).name == "norm.weight"


def test_formats_are_named(tmp_path):
    formats = {kind.format for kind in verify(SOURCE, SOURCE).kinds}
    assert formats == {"E4M3 + E8M0 per 128x128", "E2M1 + E8M0 per 1x32", "BF16", "F32", "I64"}
    base = DATA / "flash-base-tiny"
    assert "E4M3 + F32 per 128x128" in {kind.format for kind in verify(base, base).kinds}


def only_difference(comparison):
    (row,) = comparison.differing
    assert not comparison.equal
    return row


def test_one_bit_of_a_packed_weight(tmp_path):
    scale = read_directory(SOURCE)[WEIGHT + ".scale"].astype(np.float32)[10, 3]

    def edit(tensors):
        codes = tensors[WEIGHT + ".weight"].copy()
        codes[10, 49] = codes[10, 49] & 0x0F | 0x20  # element 99 becomes 1.0
        tensors[WEIGHT + ".weight"] = codes

    before = read_directory(SOURCE)[WEIGHT + ".weight"].view(np.uint8)[10, 49] >> 4
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    row = only_difference(verify(SOURCE, changed(tmp_path, edit)))
    assert (row.name, row.status, row.tensors) == (WEIGHT + ".weight", "different", 2)
    assert row.max_difference == pytest.approx(abs(values[before] - 1.0) * scale) and row.max_difference > 0


def test_one_scale(tmp_path):
    def edit(tensors):
        scales = tensors[WEIGHT + ".scale"].copy()
        scales.view(np.uint8)[10, 3] += 1
        tensors[WEIGHT + ".scale"] = scales

    row = only_difference(verify(SOURCE, changed(tmp_path, edit)))
    assert row.status == "different" and row.max_difference > 0


def test_plain_tensors(tmp_path):
    def edit(tensors):
        norm = tensors["norm.weight"].astype(np.float32)
        norm[3] += 2.0
        tensors["norm.weight"] = norm.astype(ml_dtypes.bfloat16)
        ids = tensors["layers.0.ffn.gate.tid2eid"].copy()
        ids[0, 0] += 1
        tensors["layers.0.ffn.gate.tid2eid"] = ids

    rows = {row.name: row for row in verify(SOURCE, changed(tmp_path, edit)).differing}
    assert rows["norm.weight"].max_difference == pytest.approx(2.0, abs=0.02)
    assert rows["layers.0.ffn.gate.tid2eid"].max_difference == 1.0
    assert len(rows) == 2


def test_not_a_number_is_an_infinite_difference(tmp_path):
    def edit(tensors):
        norm = tensors["norm.weight"].copy()
        norm[0] = np.nan
        tensors["norm.weight"] = norm

    assert only_difference(verify(SOURCE, changed(tmp_path, edit))).max_difference == np.inf


def test_negative_zero_is_a_different_bit_with_the_same_value(tmp_path):
    def set_zero(sign):
        def edit(tensors):
            norm = tensors["norm.weight"].copy()
            norm[0] = sign * 0.0
            tensors["norm.weight"] = norm

        return edit

    a = changed(tmp_path / "a", set_zero(1.0))
    b = changed(tmp_path / "b", set_zero(-1.0))
    row = only_difference(verify(a, b))
    assert (row.status, row.max_difference) == ("different", 0.0)


def test_missing_and_extra(tmp_path):
    def edit(tensors):
        del tensors["norm.weight"], tensors[WEIGHT + ".scale"]
        tensors["stranger"] = np.zeros(3, np.float32)

    path = changed(tmp_path, edit)
    status = {row.name: row.status for row in verify(SOURCE, path).differing}
    assert status == {"norm.weight": "missing", WEIGHT + ".weight": "shape", "stranger": "extra"}
    status = {row.name: row.status for row in verify(path, SOURCE).differing}
    assert status == {"norm.weight": "extra", WEIGHT + ".weight": "shape", "stranger": "missing"}


def test_other_shape_and_dtype(tmp_path):
    def edit(tensors):
        tensors["norm.weight"] = tensors["norm.weight"][:-1]
        tensors["layers.0.attn_norm.weight"] = tensors["layers.0.attn_norm.weight"].astype(np.float32)
        scale = tensors["layers.0.attn.wq_a.scale"]
        tensors["layers.0.attn.wq_a.scale"] = scale.astype(np.float32)

    rows = {row.name: row for row in verify(SOURCE, changed(tmp_path, edit)).differing}
    assert rows["norm.weight"].status == "shape" and rows["norm.weight"].max_difference is None
    for name in ("layers.0.attn_norm.weight", "layers.0.attn.wq_a.weight"):
        assert (rows[name].status, rows[name].max_difference) == ("dtype", 0.0)
    assert rows["layers.0.attn.wq_a.weight"].other_format == "E4M3 + F32 per 128x128"
    assert len(rows) == 3


def test_configuration(tmp_path):
    comparison = verify(SOURCE, changed(tmp_path, lambda tensors: None, swiglu_limit=9.0))
    assert not comparison.differing and not comparison.equal
    assert comparison.config == {"swiglu_limit": (10.0, 9.0)}


def test_tensors_larger_than_a_piece(tmp_path, monkeypatch):
    """Pieces are compared one by one: no row is left out, and each is decoded with the scale of its own block."""
    monkeypatch.setattr(interface, "PIECE_BYTES", 1000)  # 15 rows of wq_b
    name = "layers.3.attn.wq_b"

    def with_element(code):
        def edit(tensors):
            codes, scales = tensors[name + ".weight"].copy(), tensors[name + ".scale"].copy()
            assert codes.shape == (512, 64)
            codes[128, 5] = code  # the first row of the second block
            scales.view(np.uint8)[:, 0] = [120, 123, 120, 120]
            tensors[name + ".weight"], tensors[name + ".scale"] = codes, scales
            norm = tensors["embed.weight"].copy()
            norm[-1, -1] = code
            tensors["embed.weight"] = norm

        return edit

    a, b = (changed(tmp_path / str(code), with_element(code)) for code in (1.0, 1.5))
    assert verify(a, a).equal
    rows = {row.name: row.max_difference for row in verify(a, b).differing}
    assert rows == {"embed.weight": 0.5, name + ".weight": 0.5 * 2.0 ** (123 - 127)}


def test_unreadable_directory_is_an_error(tmp_path):
    path = changed(tmp_path, lambda tensors: None)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b"}}))
    with pytest.raises(CheckpointError, match="lacks b"):
        verify(SOURCE, path)
