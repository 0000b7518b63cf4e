"""Checkpoints that others have made of the released ones load, convert and verify as those do."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from tests.checkpoint.directories import assert_same_tree, config_of, read_directory
from tests.checkpoint.repackaging import E8M0, dequantised, nvfp4, repackage, stacked
from tests.conftest import DATA
from v4_jax import Transformer, costs
from v4_jax.checkpoint import CheckpointError, convert, export, load, open_checkpoint, verify
from v4_jax.checkpoint.names import in_stack, transformers_name
from v4_jax.number_formats import dequantise

FP4, FP8 = DATA / "flash-tiny", DATA / "flash-base-tiny"


def as_it_is(path, tmp_path):
    """Loads, converts and exports a directory; the three hold the same."""
    config, params = load(path)
    convert(path, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "out", format="bf16" if config.expert_dtype == "bf16" else "released")
    assert verify(path, tmp_path / "orbax").equal
    assert verify(path, tmp_path / "out").equal
    for made in ("orbax", "out"):
        again, same = load(tmp_path / made)
        assert again == config
        assert_same_tree(same, params)
    return config, params


# ---- number formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["F32", "E8M0"])
def test_fp8_experts_are_found_from_the_tensors(tmp_path, caplog, scales):
    tensors = read_directory(FP8)
    if scales == "E8M0":
        tensors = {name: array.astype(E8M0) if name.endswith(".scale") else array for name, array in tensors.items()}
    path = repackage(tmp_path / "model", FP8, tensors, expert_dtype=None)
    with caplog.at_level(logging.WARNING):
        config, _ = as_it_is(path, tmp_path)
    assert "config.json says nothing about the experts' format: by their tensors they are 'fp8'" in caplog.text
    assert config.expert_dtype == "fp8"
    assert config_of(tmp_path / "out")["expert_dtype"] == "fp8"
    expected = load(FP8, dtype="float32")[1]
    assert_same_tree(load(path, dtype="float32")[1], expected)


def test_released_without_expert_dtype_says_nothing(tmp_path):
    """As the first upload was."""
    path = repackage(tmp_path / "model", FP4, read_directory(FP4), expert_dtype=None)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.notes == []
    assert_same_tree(load(path)[1], load(FP4)[1])


@pytest.mark.parametrize("said", [None, "fp4"])  # transformers leaves it in place
def test_bfloat16_under_released_names(tmp_path, said):
    path = repackage(tmp_path / "model", FP4, dequantised(FP4), expert_dtype=said, quantization_config=None)
    config, params = as_it_is(path, tmp_path)
    assert config.expert_dtype == "bf16"
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert_same_tree(params, load(FP4, dtype="bfloat16")[1])


def test_plain_tensors_in_other_floats(tmp_path):
    """BF16 where float32 is released widens; float32 where BF16 is released is rounded, but not in float32."""
    tensors = dequantised(FP4)
    norm, sink = "layers.2.attn_norm.weight", "layers.2.attn.attn_sink"
    tensors[norm] = tensors[norm].astype(np.float32) + np.float32(2**-20)
    tensors[sink] = tensors[sink].astype(tensors["embed.weight"].dtype)
    path = repackage(tmp_path / "model", FP4, tensors)
    with open_checkpoint(path) as checkpoint:
        assert any("1 tensors are wider than their released BF16 (layers.2.attn_norm" in n for n in checkpoint.notes)
    _, params = load(path, dtype="float32")
    held = params["layer_2"]
    assert np.asarray(held["attn_norm"]).tobytes() == tensors[norm].tobytes()
    assert np.asarray(held["attn"]["attn_sink"]).tobytes() == tensors[sink].astype(np.float32).tobytes()
    assert (
        np.asarray(load(path)[1]["layer_2"]["attn_norm"]).tobytes()
        == tensors[norm].astype(tensors["embed.weight"].dtype).tobytes()
    )


@pytest.mark.parametrize("packed", [True, False], ids=["compressed-tensors", "modelopt"])
def test_nvfp4(tmp_path, packed):
    tensors, values = nvfp4(FP4, packed=packed)
    method = (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
        if packed
        else {"quant_method": "modelopt"}
    )
    path = repackage(tmp_path / "model", FP4, tensors, expert_dtype=None, quantization_config=method)
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint.ignored) == {"scales of activations"}
    config, native = as_it_is(path, tmp_path)
    assert config.expert_dtype == "nvfp4"
    floats, bfloats = load(path, dtype="float32")[1], load(path, dtype="bfloat16")[1]
    w2 = values["layers.2.ffn.experts.3.w2.weight"]
    for tree, dtype in ((floats, np.float32), (bfloats, "bfloat16")):
        assert np.asarray(tree["layer_2"]["ffn"]["w2"][3]).tobytes() == w2.astype(dtype).tobytes()
    held = native["layer_2"]["ffn"]["w2"]
    assert held.block == (1, 16)
    assert np.asarray(dequantise(jax.tree.map(lambda leaf: leaf[3], held), np.float32)).tobytes() == w2.tobytes()
    export((config, native), tmp_path / "from_memory")
    assert verify(path, tmp_path / "from_memory").equal


def test_nvfp4_computes(tmp_path):
    path = repackage(tmp_path / "model", FP4, nvfp4(FP4, packed=False)[0], expert_dtype=None, quantization_config=None)
    (config, native), (_, floats) = load(path), load(path, dtype="float32")
    apply = jax.jit(Transformer(config, policy="float32").apply)
    tokens = np.arange(6, dtype=np.int32)[None]
    outputs = [np.asarray(apply({"params": params}, tokens).logits) for params in (native, floats)]
    np.testing.assert_allclose(*outputs, atol=1e-5, rtol=1e-5)
    assert (
        costs.parameter_bytes(config).total
        < costs.parameter_bytes(dataclasses.replace(config, expert_dtype="bf16")).total
    )


def test_mxfp4_is_the_released_format_under_other_names(tmp_path):
    tensors = {}
    for name, array in read_directory(FP4).items():
        if ".experts." in name:
            name = name.replace(".weight", ".weight_packed").replace(".scale", ".weight_scale")
            array = array.view(np.uint8)
        tensors[name] = array
    path = repackage(tmp_path / "model", FP4, tensors, expert_dtype=None)
    assert_same_tree(load(path)[1], load(FP4)[1])


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [FP4, FP8], ids=["fp4", "fp8"])
def test_a_prefix_and_other_suffixes(tmp_path, source):
    def renamed(name):
        return "model." + name.replace(".scale", ".weight_scale_inv")

    path = repackage(
        tmp_path / "model", source, {renamed(name): array for name, array in read_directory(source).items()}
    )
    config, params = as_it_is(path, tmp_path)
    expected, reference = load(source)
    assert config == expected
    assert_same_tree(params, reference)
    assert verify(source, path).equal


def test_transformers_names_by_hand():
    """As transformers 5.23 saves them."""
    assert transformers_name("embed.weight") == "model.embed_tokens.weight"
    assert transformers_name("norm.weight") == "model.norm.weight"
    assert transformers_name("layers.2.attn.kv_norm.weight") == "model.layers.2.self_attn.kv_norm.weight"
    indexer = "model.layers.2.self_attn.compressor.indexer."
    assert transformers_name("layers.2.attn.indexer.compressor.norm.weight") == indexer + "kv_norm.weight"
    assert transformers_name("layers.2.attn.indexer.weights_proj.weight") == indexer + "scorer.weights_proj.weight"
    assert transformers_name("layers.2.hc_ffn_fn") == "model.layers.2.ffn_hc.fn"
    assert transformers_name("layers.3.ffn.experts.11.w3.weight") == "model.layers.3.mlp.experts.11.up_proj.weight"
    assert transformers_name("mtp.0.attn.wq_a.weight") == "mtp.0.attn.wq_a.weight"
    assert in_stack("layers.3.ffn.experts.11.w3.weight") == ("model.layers.3.mlp.experts.gate_up_proj", 11, 1, 2)
    assert in_stack("layers.3.ffn.shared_experts.w3.weight") is None


@pytest.mark.parametrize("experts", ["stacked", "single"])
def test_names_of_transformers(tmp_path, experts):
    """Without the MTP block, which it drops; all in one file, without an index."""
    trunk = {name: array for name, array in dequantised(FP4).items() if not name.startswith("mtp.")}
    theirs = stacked(trunk) if experts == "stacked" else {transformers_name(name): a for name, a in trunk.items()}
    path = repackage(tmp_path / "model", FP4, theirs, shards=1, quantization_config=None)
    assert not (path / "model.safetensors.index.json").exists()
    _, params = as_it_is(path, tmp_path)
    reference = load(FP4, dtype="bfloat16")[1]
    reference.pop("mtp")
    assert_same_tree(params, reference)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("expert",))
    assert_same_tree(load(path, mesh=mesh, rules="decode")[1], reference)


def test_fp8_experts_in_stacks(tmp_path):
    """128 inner units, so that no tile holds both gate and up."""
    tensors = read_directory(FP8)
    assert config_of(FP8)["moe_intermediate_size"] == 128
    weights = {name: array for name, array in tensors.items() if not name.endswith(".scale")}
    scales = {
        name.removesuffix(".scale") + ".weight": array for name, array in tensors.items() if name.endswith(".scale")
    }
    theirs = stacked(weights)
    for name, array in stacked(scales).items():
        theirs[name.replace(".weight", ".weight_scale_inv") if ".weight" in name else f"{name}_scale_inv"] = array
    path = repackage(tmp_path / "model", FP8, theirs)
    assert_same_tree(load(path)[1], load(FP8)[1])


def test_a_tensor_under_two_names(tmp_path):
    tensors = read_directory(FP4)
    path = repackage(tmp_path / "model", FP4, {**tensors, "model.embed_tokens.weight": tensors["embed.weight"]})
    with pytest.raises(CheckpointError, match=r"holds embed\.weight twice: as model\.embed_tokens\.weight and as"):
        load(path)


def test_an_unknown_name_stays_as_written(tmp_path):
    tensors = {f"model.{name}": array for name, array in read_directory(FP4).items()}
    path = repackage(tmp_path / "model", FP4, {**tensors, "model.vision.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"no place for: model\.vision\.weight"):
        load(path)


def test_a_stack_of_another_shape(tmp_path):
    theirs = stacked(dequantised(FP4))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    path = repackage(tmp_path / "model", FP4, {**theirs, name: theirs[name][1:]})
    with pytest.raises(CheckpointError, match=r"gate_up_proj is BF16 \[11, 192, 192\], expected \[12, 2 x out, in\]"):
        load(path)


# ---- directories and configurations ----------------------------------------------------------------------------------


def test_a_snapshot_of_the_hub_cache(tmp_path):
    """Files are links to blobs named by their hashes."""
    repository = tmp_path / "models--deepseek-ai--DeepSeek-V4-Flash"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    files = [file for file in FP4.iterdir() if file.name != "golden.safetensors"]
    for number, file in enumerate(files):
        (repository / "blobs" / f"{number:064x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert_same_tree(as_it_is(snapshot, tmp_path)[1], load(FP4)[1])
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (FP4 / "generation_config.json").read_bytes()
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_configuration_with_keys_of_gpt(tmp_path):
    config = config_of(FP4)
    extra = {
        "n_embd": config["hidden_size"],
        "n_layer": config["num_hidden_layers"],
        "n_ctx": config["max_position_embeddings"],
        "activation_function": "silu",
        "resid_pdrop": 0.1,
        "_attn_implementation": "eager",
    }
    path = repackage(tmp_path / "model", FP4, read_directory(FP4), **extra)
    assert load(path)[0] == load(FP4)[0]
    (path / "config.json").write_text(json.dumps({**config, **extra, "n_embd": 7}))
    with pytest.raises(CheckpointError, match="n_embd is 7, but hidden_size, which it repeats, is 192"):
        load(path)


# ---- what is not read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "BITSANDBYTES"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            "'pack-quantized'",
        ),
        ({"quantization_config": {"quant_method": "x\n\u001b[31m"}}, r"X\\n\\x1b\[31M"),
        ({"model_type": "deepseek_v41", "text_config": {}}, "DeepSeek-V4.1"),
    ],
)
def test_refused_by_name(tmp_path, changes, named):
    path = repackage(tmp_path / "model", FP4, {"embed.weight": np.zeros(3, np.float32)}, **changes)
    with pytest.raises(CheckpointError, match=rf"{named}.* is not read: use "):
        load(path)


def test_gguf_is_refused_by_name(tmp_path):
    (tmp_path / "DeepSeek-V4-Flash-Q4_K_M.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "DeepSeek-V4-Flash-Q4_K_M.gguf"):
        with pytest.raises(CheckpointError, match="is in the GGUF format, which is not read: use the released"):
            load(path)
