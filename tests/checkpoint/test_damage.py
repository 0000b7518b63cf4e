"""A damaged or unknown checkpoint is refused, by one sentence that names what is wrong."""

import json
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint.directories import config_of, read_directory, read_file, write_directory, write_file
from tests.conftest import DATA
from v4_jax.checkpoint import CheckpointError, convert, export, load, verify

SOURCE = DATA / "released-tiny"
BASE = DATA / "flash-base-tiny"
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture
def directory(tmp_path):
    return write_directory(tmp_path / "model", config_of(SOURCE), read_directory(SOURCE))


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_no_directory(tmp_path):
    assert "nowhere does not exist, expected a checkpoint directory" in refusal(load, tmp_path / "nowhere")


def test_a_file_is_no_directory(directory):
    assert "config.json is a file, expected a checkpoint directory" in refusal(load, directory / "config.json")


def test_no_config(directory):
    (directory / "config.json").unlink()
    assert "has no config.json" in refusal(load, directory)


def test_config_that_is_not_json(directory):
    (directory / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(load, directory)


def test_config_of_another_model(directory):
    (directory / "config.json").write_text(json.dumps({**config_of(SOURCE), "model_type": "llama"}))
    assert "model_type is 'llama', expected 'deepseek_v4'" in refusal(load, directory)


def test_no_weights(directory):
    (directory / INDEX).unlink()
    assert f"has neither {INDEX} nor model.safetensors" in refusal(load, directory)


def test_index_without_a_weight_map(directory):
    (directory / INDEX).write_text("{}")
    assert "has no legal weight_map" in refusal(load, directory)


def test_index_that_points_outside(directory):
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["embed.weight"] = "../elsewhere.safetensors"
    (directory / INDEX).write_text(json.dumps(index))
    assert "points outside the directory: ../elsewhere.safetensors" in refusal(load, directory)


def test_missing_shard(directory):
    (directory / FIRST).unlink()
    assert f"lacks {FIRST}, which {INDEX} names" in refusal(load, directory)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard(directory, keep):
    content = (directory / FIRST).read_bytes()
    (directory / FIRST).write_bytes(content[:keep])
    assert f"{FIRST} is truncated: it has {len(content[:keep])} bytes" in refusal(load, directory)


def test_bytes_after_the_last_tensor(directory):
    with open(directory / FIRST, "ab") as file:
        file.write(b"more")
    assert "has 4 bytes after its last tensor, expected none" in refusal(load, directory)


def replace_header(file, edit) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = edit(content[8 : 8 + length])
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def edit_header(file, edit) -> None:
    def parsed(raw):
        header = json.loads(raw)
        edit(header)
        return json.dumps(header).encode()

    replace_header(file, parsed)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "corrupt header"),
        (b"\xff\xfe", "corrupt header"),
        (b"[]", "a JSON list, expected an object"),
        (b'{"a": 1}', "the entry of a is 1, expected dtype, shape and two data_offsets"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "the entry of a is"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "the entry of a is"),
        (b'{"a": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}}', "a has dtype Q7, expected one of BOOL, "),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            "a is F32 [2], which takes 8 bytes, but its data_offsets [0, 4] span 4",
        ),
        (
            b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
            b' "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
            "a appears twice",
        ),
    ],
)
def test_corrupt_header(directory, raw, message):
    replace_header(directory / FIRST, lambda _: raw)
    assert message in refusal(load, directory)


def test_absurd_header_length(directory):
    content = (directory / FIRST).read_bytes()
    (directory / FIRST).write_bytes(b"\xff" * 8 + content[8:])
    assert "has a corrupt header: its length reads as 18446744073709551615" in refusal(load, directory)


def test_overlapping_tensors(directory):
    def overlap(header):
        second = sorted((value["data_offsets"], name) for name, value in header.items())[1][1]
        header[second]["data_offsets"] = [offset - 1 for offset in header[second]["data_offsets"]]

    edit_header(directory / FIRST, overlap)
    assert " overlaps " in refusal(load, directory)


def test_gap_between_tensors(directory):
    def gap(header):
        last = max((value["data_offsets"], name) for name, value in header.items())[1]
        header[last]["data_offsets"] = [offset + 3 for offset in header[last]["data_offsets"]]

    edit_header(directory / FIRST, gap)
    assert "leaves a gap of 3 bytes after" in refusal(load, directory)


def test_the_same_tensor_in_two_shards(tmp_path):
    tensors = read_directory(SOURCE)
    path = write_directory(tmp_path / "model", config_of(SOURCE), tensors)

    other = path / "model-00002-of-00002.safetensors"
    stray = next(iter(read_file(path / FIRST)))
    write_file(other, {**read_file(other), stray: tensors[stray]})
    assert f"holds {stray} twice: in {FIRST} and in {other.name}" in refusal(load, path)


def edit_index(directory, edit) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_index_that_names_the_wrong_shard(directory):
    where = json.loads((directory / INDEX).read_text())["weight_map"]["embed.weight"]
    other = {FIRST: "model-00002-of-00002.safetensors"}.get(where, FIRST)
    edit_index(directory, lambda weight_map: weight_map.update({"embed.weight": other}))
    assert f"says that embed.weight is in {other}, but it is in {where}" in refusal(load, directory)


def test_index_that_names_a_tensor_which_is_nowhere(directory):
    edit_index(directory, lambda weight_map: weight_map.update({"ghost": FIRST}))
    assert f"says that ghost is in {FIRST}, but no shard has it" in refusal(load, directory)


def test_tensor_that_the_index_does_not_name(directory):
    edit_index(directory, lambda weight_map: weight_map.pop("head.weight"))
    assert f"holds tensors that {INDEX} does not name: head.weight" in refusal(load, directory)


# ---- tensors --------------------------------------------------------------------------------------------------------


def damaged(tmp_path, edit, source=SOURCE, **config):
    tensors = read_directory(source)
    edit(tensors)
    return write_directory(tmp_path / "model", {**config_of(source), **config}, tensors)


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def change(name, function):
    return lambda tensors: tensors.update({name: function(tensors[name])})


WQ_A, W1 = "layers.3.attn.wq_a", "layers.3.ffn.experts.2.w1"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("norm.weight"), "lacks 1 tensor: norm.weight; expected norm.weight as BF16 [128]"),
        (drop("norm.weight", "embed.weight"), "lacks 2 tensors: embed.weight, norm.weight"),
        (drop(WQ_A + ".scale"), f"lacks 1 tensor: {WQ_A}.scale; expected {WQ_A}.scale as F8_E8M0 [1, 1]"),
        (
            lambda tensors: tensors.update(stranger=np.zeros(3, np.float32)),
            "holds 1 tensor that the configuration has no place for: stranger",
        ),
        (
            lambda tensors: tensors.update({f"model.s{n}": np.zeros(3, np.float32) for n in range(5)}),
            "holds 5 tensors that the configuration has no place for: model.s0, model.s1, model.s2, ... (5 in all)",
        ),
        (
            change("norm.weight", lambda a: a.astype(np.float32)),
            "norm.weight is F32 [128], expected BF16 [128]",
        ),
        (change("norm.weight", lambda a: a[:-1]), "norm.weight is BF16 [127], expected BF16 [128]"),
        (
            change("layers.0.ffn.gate.tid2eid", lambda a: a.astype(np.int32)),
            "layers.0.ffn.gate.tid2eid is I32 [256, 3], expected I64 [256, 3]",
        ),
        (
            change(WQ_A + ".weight", lambda a: a.view(np.int8)),
            f"{WQ_A}.weight is I8 [64, 128] with scales F8_E8M0 [1, 1], expected F8_E4M3 [64, 128]",
        ),
        (
            change(WQ_A + ".scale", lambda a: np.repeat(a, 2, axis=1)),
            f"{WQ_A}.scale is F8_E8M0 [1, 2], expected F8_E8M0 [1, 1]",
        ),
        (
            change(WQ_A + ".scale", lambda a: a.view(np.uint8)),
            f"{WQ_A}.scale has dtype U8, expected F8_E8M0: legal scales are F8_E8M0 (a bare exponent",
        ),
        (
            change(WQ_A + ".scale", lambda a: a.astype(np.float32)),
            f"{WQ_A}.scale has dtype F32, expected F8_E8M0: legal scales are",
        ),
        (
            change(W1 + ".scale", lambda a: a[:, :1]),
            f"{W1}.scale is F8_E8M0 [64, 1], expected F8_E8M0 [64, 4]",
        ),
    ],
)
def test_wrong_tensors(tmp_path, edit, message):
    path = damaged(tmp_path, edit)
    for call in (load, lambda path: convert(path, tmp_path / "out"), lambda path: export(path, tmp_path / "out")):
        assert message in refusal(call, path)
    assert not (tmp_path / "out").exists()


def test_fp8_experts_under_an_fp4_configuration(tmp_path):
    """The format follows dtype and scales; a configuration that says otherwise is refused, in both directions."""
    message = refusal(load, damaged(tmp_path, drop(), source=BASE, expert_dtype="fp4"))
    assert "config.expert_dtype is 'fp4', but layers.0.ffn.experts.0.w1.weight is F8_E4M3 [128, 256]" in message
    assert "which is 'fp8'" in message and "expected I8 [128, 128]" in message


def test_fp4_experts_under_an_fp8_configuration(tmp_path):
    message = refusal(load, damaged(tmp_path, drop(), expert_dtype="fp8"))
    assert "config.expert_dtype is 'fp8', but layers.0.ffn.experts.0.w1.weight is I8 [64, 64]" in message
    assert "with scales F8_E8M0 [64, 4], which is 'fp4'" in message and "expected F8_E4M3 [64, 128]" in message


def test_one_byte_tensors_are_not_all_fp8(tmp_path):
    """Packed codes relabelled as E4M3 would lose half of the columns."""
    edit = change(W1 + ".weight", lambda a: a.view(ml_dtypes.float8_e4m3fn))
    message = refusal(load, damaged(tmp_path, edit))
    assert f"{W1}.weight is F8_E4M3 [64, 64] with scales F8_E8M0 [64, 4]" in message


def scales_of(tensors):
    return [name for name in tensors if name.endswith(".scale")]


def test_scale_bytes_converted_as_numbers(tmp_path):
    """The exponent byte of 2^-7 is 120; read as the number 120 it would still load, and the model would babble."""

    def edit(tensors):
        for name in scales_of(tensors):
            tensors[name] = tensors[name].view(np.uint8).astype(np.float32)

    message = refusal(load, damaged(tmp_path, edit))
    assert "decodes to values of standard deviation" in message
    assert "converted as numbers (a scale byte b means 2^(b - 127))" in message


def test_scale_values_converted_to_bytes(tmp_path):
    def edit(tensors):
        for name in scales_of(tensors):
            numbers = tensors[name].astype(np.float32).astype(np.uint8)
            tensors[name] = numbers.view(ml_dtypes.float8_e8m0fnu)

    assert "decodes to values of standard deviation" in refusal(load, damaged(tmp_path, edit))


def test_scale_that_is_not_a_number(tmp_path):
    def edit(tensors):
        scales = tensors[W1 + ".scale"].copy()
        scales.view(np.uint8)[5, 1] = 255
        tensors[W1 + ".scale"] = scales

    message = refusal(load, damaged(tmp_path, edit))
    assert f"{W1}.scale holds nan at [5, 1] (and 0 more), expected exponents 0 to 254 (255 is NaN)" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
def test_float_scale_that_is_not_positive(tmp_path, bad):
    edit = change(WQ_A + ".scale", lambda a: np.full_like(a, bad))
    message = refusal(load, damaged(tmp_path, edit, source=BASE))
    assert f"{WQ_A}.scale holds" in message and "expected positive finite numbers" in message


@pytest.mark.parametrize("bad", [-1, 8, 300])
def test_expert_ids_out_of_range(tmp_path, bad):
    def edit(tensors):
        ids = tensors["layers.1.ffn.gate.tid2eid"].copy()
        ids[7, 1] = bad
        tensors["layers.1.ffn.gate.tid2eid"] = ids

    message = refusal(load, damaged(tmp_path, edit))
    assert "layers.1.ffn.gate.tid2eid holds expert ids" in message and "expected 0 to 7" in message


def test_unknown_dtype_argument():
    assert "dtype is 'float16', expected 'native', 'bfloat16' or 'float32'" in refusal(load, SOURCE, dtype="float16")


# ---- converted directories ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "orbax"
    convert(SOURCE, path)
    return path


@pytest.fixture
def orbax(converted, tmp_path):

    shutil.copytree(converted, tmp_path / "orbax")
    return tmp_path / "orbax"


def test_rotary_parameters_that_changed_since(orbax):
    config = config_of(orbax)
    config["rope_scaling"]["factor"] = 4
    (orbax / "config.json").write_text(json.dumps(config))
    message = refusal(load, orbax)
    assert "'factor': 4" in message and "recorded" in message and "'factor': 16" in message


def test_manifest_of_another_version(orbax):
    record = json.loads((orbax / "v4_jax.json").read_text())
    (orbax / "v4_jax.json").write_text(json.dumps({**record, "version": 99}))
    assert "v4_jax.json has version 99, expected 1" in refusal(load, orbax)


def test_manifest_with_other_formats(orbax):
    record = json.loads((orbax / "v4_jax.json").read_text())
    (orbax / "v4_jax.json").write_text(json.dumps({**record, "number_formats": {"fp5": 1}}))
    assert "has number_formats {'fp5': 1}, expected" in refusal(load, orbax)


def test_missing_part(orbax):

    shutil.rmtree(orbax / "layers.2")
    assert "lacks the part layers.2, expected embed, layers.0" in refusal(load, orbax)
    missing = [row for row in verify(SOURCE, orbax).differing if row.status == "missing"]
    assert missing and all(row.name.startswith("layers.2.") for row in missing)


def test_damaged_part(orbax):
    for file in (orbax / "layers.2").rglob("manifest.ocdbt"):
        file.write_bytes(b"nonsense")
    message = refusal(load, orbax)
    assert "layers.2 is damaged" in message and "\n" not in message


def test_lost_data_of_a_part(orbax):
    for file in (orbax / "layers.2").rglob("d/*"):
        file.write_bytes(b"")
    message = refusal(load, orbax)
    assert "layers.2 is damaged" in message and "\n" not in message


def test_a_missing_chunk_does_not_read_as_zeros(orbax):
    import tensorstore

    base = {"driver": "file", "path": f"{orbax / 'layers.2'}/"}
    database = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    assert database.read("ffn.experts.w1.weight/3.0.0").result().value
    database.write("ffn.experts.w1.weight/3.0.0", None).result()
    message = refusal(load, orbax)
    assert "layers.2.ffn.experts.3.w1.weight cannot be read" in message and "\n" not in message
