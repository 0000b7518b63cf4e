"""Every way through the checkpoint code returns the released bytes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import v4_jax
from tests.checkpoint.directories import (
    assert_same_tensors,
    assert_same_tree,
    config_of,
    random_params,
    read_directory,
    write_directory,
)
from tests.conftest import DATA
from v4_jax.checkpoint import convert, export, load, open_checkpoint
from v4_jax.config import Config
from v4_jax.number_formats import BlockScaled
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import is_parameter


def test_memory_round_trip(released, tmp_path):
    written = export(load(released), tmp_path / "out")
    original = read_directory(released)
    assert_same_tensors(original, read_directory(tmp_path / "out"))
    assert Config.from_hf(tmp_path / "out") == Config.from_hf(released)
    assert written.tensors == len(original)
    assert written.bytes == sum(array.nbytes for array in original.values())


def test_orbax_round_trip(released, tmp_path):
    convert(released, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "out")
    assert_same_tensors(read_directory(released), read_directory(tmp_path / "out"))
    assert config_of(tmp_path / "out") == config_of(released)
    companion = "generation_config.json"
    assert (tmp_path / "out" / companion).read_bytes() == (released / companion).read_bytes()

    config, params = load(tmp_path / "orbax")
    expected_config, expected = load(released)
    assert config == expected_config
    assert_same_tree(params, expected)


def test_converted_directory_is_as_large_as_the_released_one(released, tmp_path):
    convert(released, tmp_path / "orbax")
    size = sum(file.stat().st_size for file in (tmp_path / "orbax").rglob("*") if file.is_file())
    data = sum(array.nbytes for array in read_directory(released).values())
    assert data < size < 1.02 * data + 400_000


def test_orbax_itself_restores_a_part(tmp_path):
    import orbax.checkpoint as ocp

    source = DATA / "flash-tiny"
    convert(source, tmp_path / "orbax")
    part = ocp.PyTreeCheckpointer().restore(tmp_path / "orbax" / "layers.3")
    tensors = read_directory(source)
    assert part["attn"]["wq_a"]["scale"].tobytes() == tensors["layers.3.attn.wq_a.scale"].tobytes()
    experts = np.stack([tensors[f"layers.3.ffn.experts.{e}.w2.weight"] for e in range(12)])
    assert part["ffn"]["experts"]["w2"]["weight"].tobytes() == experts.tobytes()


def test_params_have_the_declared_tree_and_the_released_formats():
    config, params = v4_jax.load(DATA / "flash-tiny")
    declared = declarations(config)
    found = jax.tree.structure(params, is_leaf=lambda node: isinstance(node, BlockScaled))
    assert found == jax.tree.structure(declared, is_leaf=is_parameter)
    for parameter, leaf in zip(
        jax.tree.leaves(declared, is_leaf=is_parameter),
        jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, BlockScaled)),
        strict=True,
    ):
        assert tuple(leaf.shape) == tuple(parameter.shape)
        if parameter.storage in ("fp8", "expert"):
            element = jnp.float8_e4m3fn if parameter.storage == "fp8" else jnp.float4_e2m1fn
            assert (leaf.codes.dtype, leaf.scales.dtype) == (element, jnp.float8_e8m0fnu)
        else:
            assert leaf.dtype == {"bf16": jnp.bfloat16, "f32": jnp.float32, "i64": jnp.int32}[parameter.storage]


def test_packed_codes_are_read_low_nibble_first():
    _, params = load(DATA / "flash-tiny")
    packed = read_directory(DATA / "flash-tiny")["layers.3.ffn.experts.5.w1.weight"].view(np.uint8)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = np.array(magnitudes + [-m for m in magnitudes], np.float32)
    codes = np.asarray(params["layer_3"]["ffn"]["w1"].codes[5]).astype(np.float32)
    assert (codes[:, 0::2] == values[packed & 15]).all()
    assert (codes[:, 1::2] == values[packed >> 4]).all()


def in_numpy(weight: BlockScaled) -> np.ndarray:
    """The values of a block-scaled weight, written down independently."""
    rows, columns = weight.shape[-2:]
    scales = np.asarray(weight.scales).astype(np.float32)
    scales = np.repeat(np.repeat(scales, weight.block[0], axis=-2), weight.block[1], axis=-1)
    return np.asarray(weight.codes).astype(np.float32) * scales[..., :rows, :columns]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantised_loading(released, dtype):
    _, native = load(released)
    _, params = load(released, dtype=dtype)

    def expected(leaf):
        if isinstance(leaf, BlockScaled):
            return in_numpy(leaf).astype(dtype)
        return np.asarray(leaf).astype(dtype) if leaf.dtype == jnp.bfloat16 else leaf

    assert_same_tree(params, jax.tree.map(expected, native, is_leaf=lambda node: isinstance(node, BlockScaled)))


def test_float_parameters_are_quantised_as_the_release(tmp_path):
    """Values on the grid stay there, whatever scale they were stored with."""
    source = DATA / "released-tiny"
    config, params = load(source, dtype="float32")
    export((config, params), tmp_path / "out")
    native, again = load(source)[1], load(tmp_path / "out")[1]
    for a, b in zip(
        jax.tree.leaves(native, is_leaf=lambda node: isinstance(node, BlockScaled)),
        jax.tree.leaves(again, is_leaf=lambda node: isinstance(node, BlockScaled)),
        strict=True,
    ):
        if isinstance(a, BlockScaled):
            assert (a.codes.dtype, a.scales.dtype) == (b.codes.dtype, b.scales.dtype)
            np.testing.assert_array_equal(in_numpy(a), in_numpy(b))
        else:
            np.testing.assert_array_equal(a, b)


def test_expert_ids_beyond_256_survive(tmp_path):
    """A detour over bfloat16, exact for integers only to 256, would round the ids of the larger model."""
    config = dataclasses.replace(
        Config.tiny(),
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_hash_layers=1,
        compress_ratios=(0,),
        num_nextn_predict_layers=0,
        n_routed_experts=384,
    )
    params = random_params(config)
    (table,) = [leaf for leaf in jax.tree.leaves(params) if leaf.dtype == np.int32]
    table.flat[:384] = np.arange(384)
    export((config, params), tmp_path / "released")
    assert read_directory(tmp_path / "released")["layers.0.ffn.gate.tid2eid"].dtype == np.int64
    convert(tmp_path / "released", tmp_path / "orbax")
    for directory in ("released", "orbax"):
        for dtype in ("native", "bfloat16") if directory == "released" else ("native",):
            _, loaded = load(tmp_path / directory, dtype=dtype)
            (ids,) = [leaf for leaf in jax.tree.leaves(loaded) if leaf.dtype == jnp.int32]
            np.testing.assert_array_equal(ids, table)


def test_single_file_without_an_index(tmp_path):
    source = DATA / "released-tiny"
    write_directory(tmp_path / "single", config_of(source), read_directory(source), shards=1)
    assert_same_tree(load(tmp_path / "single")[1], load(source)[1])


def test_exported_layout_is_the_release_s(tmp_path):
    source = DATA / "flash-tiny"
    export(source, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-{n:05d}-of-00008.safetensors" for n in range(1, 9)]
    with open_checkpoint(source) as checkpoint:
        total = checkpoint.nbytes
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    where = index["weight_map"]
    assert where["embed.weight"].startswith("model-00001")
    assert {where[name] for name in where if name.startswith("layers.2.")} == {shards[3].name}
    assert {where[name] for name in ("head.weight", "norm.weight", "hc_head_fn")} == {shards[6].name}
    assert {where[name] for name in where if name.startswith("mtp.0.")} == {shards[7].name}
    for shard in shards:
        length = int.from_bytes(shard.read_bytes()[:8], "little")
        header = json.loads(shard.read_bytes()[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert (8 + length) % 8 == 0
        width = {"F32": 4, "I64": 8, "BF16": 2}
        for entry in header.values():
            assert entry["data_offsets"][0] % width.get(entry["dtype"], 1) == 0


def test_no_new_dtype_appears_on_the_way(released):
    _, params = load(released)
    dtypes = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)}
    assert dtypes <= {
        np.dtype(t)
        for t in (
            ml_dtypes.bfloat16,
            ml_dtypes.float8_e4m3fn,
            ml_dtypes.float8_e8m0fnu,
            ml_dtypes.float4_e2m1fn,
            np.float32,
            np.int32,
        )
    }
