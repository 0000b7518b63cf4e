"""A training run is a checkpoint: its newest complete step, rounded to the released formats when they are asked for."""

import functools
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import v4_jax
from tests.checkpoint.directories import assert_same_tensors, assert_same_tree, config_of, read_directory, write_run
from v4_jax.checkpoint import CheckpointError, convert, export, load, open_checkpoint, verify
from v4_jax.checkpoint.orbax_arrays import chunking, open_arrays
from v4_jax.config import Config
from v4_jax.parameter_tree import placements

CONFIG = Config.tiny()
STEPS = (2, 9, 10)  # the newest is not the last in the order of names


@functools.cache
def initial():
    return v4_jax.init(CONFIG, jax.random.key(0))


def params_of(step: int):
    return jax.tree.map(lambda x: x + 0.001 * step if x.dtype == np.float32 else x, initial())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of three steps, with an unfinished fourth."""
    path = write_run(tmp_path_factory.mktemp("runs") / "run", CONFIG, {step: params_of(step) for step in STEPS})
    (path / "generation_config.json").write_text('{"temperature": 0.5}')
    newest = path / "checkpoints" / "10"
    shutil.copytree(newest, newest.with_name("11.orbax-checkpoint-tmp-1700000000000000"))
    return path


@pytest.fixture
def run(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "run")


def refusal(call, *arguments) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- what it holds ---------------------------------------------------------------------------------------------------


def test_an_exported_run_is_its_newest_step_quantised(made, tmp_path):
    export(made, tmp_path / "out")
    export((CONFIG, params_of(10)), tmp_path / "expected")
    assert_same_tensors(read_directory(tmp_path / "out"), read_directory(tmp_path / "expected"))
    assert config_of(tmp_path / "out") == CONFIG.to_hf()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.5}
    assert verify(made, tmp_path / "out").equal

    config, params = load(made)
    expected_config, expected = load(tmp_path / "out")
    assert config == expected_config == CONFIG
    assert_same_tree(params, expected)


def test_an_older_step(made):
    step = made / "checkpoints" / "9"
    assert verify(step, (CONFIG, params_of(9))).equal
    assert not verify(step, made).equal


def test_float32_is_exact(made):
    assert_same_tree(load(made, dtype="float32")[1], params_of(10))


def test_bfloat16_is_rounded_once(made):
    params = load(made, dtype="bfloat16")[1]
    matrix = params_of(10)["layer_0"]["attn"]["wq_a"]
    np.testing.assert_array_equal(params["layer_0"]["attn"]["wq_a"], matrix.astype("bfloat16"))


def test_a_run_converts_too(made, tmp_path):
    convert(made, tmp_path / "orbax")
    assert verify(made, tmp_path / "orbax").equal


@pytest.mark.parametrize("chunks", [lambda array: ocp.SaveArgs(chunk_byte_size=4096), chunking])
def test_a_run_saved_on_a_mesh_in_chunks(tmp_path, chunks):
    mesh = jax.make_mesh((2, 1, 4, 1), ("data", "seq", "expert", "tensor"))
    params = jax.device_put(params_of(3), placements(CONFIG, mesh, "train"))
    run = write_run(tmp_path / "run", CONFIG, {3: params}, save_args=jax.tree.map(chunks, params))
    assert verify(run, (CONFIG, params_of(3))).equal
    assert_same_tree(load(run, dtype="float32")[1], params_of(3))


def test_chunks_are_what_is_read_at_once(tmp_path):
    params = params_of(3)
    run = write_run(tmp_path / "run", CONFIG, {3: params}, save_args=jax.tree.map(chunking, params))
    stores = dict(open_arrays(run / "checkpoints" / "3" / "params"))
    experts = {
        key: array.store.chunk_layout.read_chunk.shape for key, array in stores.items() if key.endswith(".ffn.w1")
    }
    assert set(experts.values()) == {(1, 64, 128), (1, 1, 64, 128)}


def test_a_run_loads_onto_a_mesh(made):
    mesh = jax.make_mesh((1, 1, 4, 1), ("data", "seq", "expert", "tensor"))
    for dtype in ("native", "float32"):
        assert_same_tree(load(made, dtype=dtype, mesh=mesh, rules="prefill")[1], load(made, dtype=dtype)[1])


def test_experts_in_fp8(run):
    (run / "config.json").write_text(json.dumps({**config_of(run), "expert_dtype": "fp8"}))
    config, params = load(run)
    assert config.expert_dtype == "fp8"
    assert params["layer_0"]["ffn"]["w1"].codes.dtype == "float8_e4m3fn"


def test_an_export_is_resumed_from_the_same_step_only(run, tmp_path):
    def stop(part, done, total):
        if part.startswith("model-00003"):
            raise KeyboardInterrupt

    for target in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            export(run, tmp_path / target, progress=stop)
    assert export(run, tmp_path / "a").resumed == 2
    shutil.rmtree(run / "checkpoints" / "10")  # now 9 is the newest
    assert "holds an unfinished copy of another checkpoint" in refusal(export, run, tmp_path / "b")


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_no_step(run):
    shutil.rmtree(run / "checkpoints" / "10")
    shutil.rmtree(run / "checkpoints" / "9")
    shutil.rmtree(run / "checkpoints" / "2")
    assert refusal(load, run).endswith("run/checkpoints holds no complete step yet, expected directories 1, 2, ...")
    shutil.rmtree(run / "checkpoints")
    assert "holds no complete step yet" in refusal(open_checkpoint, run)


@pytest.mark.parametrize("name", ["11", "11.orbax-checkpoint-tmp-1700000000000000"])
def test_a_step_that_is_not_complete(made, name):
    message = refusal(load, made / "checkpoints" / name)
    assert message.endswith(f"{name} is no complete step of the run, which has 2, 9, 10")


def test_a_run_of_another_version(run):
    (run / "run.json").write_text('{"format": "v4-jax training run", "version": 2}')
    assert "run.json holds {'format': 'v4-jax training run', 'version': 2}, expected {" in refusal(load, run)


def test_a_step_without_parameters(run):
    shutil.rmtree(run / "checkpoints" / "10" / "params")
    assert refusal(load, run).endswith("checkpoints/10 is damaged: it has no params")


@pytest.mark.parametrize("cut", ["manifest.ocdbt", "d/*", "ocdbt.process_0/d/*"])
def test_a_damaged_step(run, tmp_path, cut):
    for file in (run / "checkpoints" / "10" / "params").glob(cut):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = refusal(export, run, tmp_path / "out")
    assert "checkpoints/10" in message and ("is damaged: " in message or " cannot be read: " in message)
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_does_not_fit(run):
    (run / "config.json").write_text(json.dumps({**config_of(run), "q_lora_rank": 32}))
    message = refusal(load, run)
    assert "checkpoints/10 does not fit " in message and "has shape " in message and ", expected " in message


def test_parameters_that_the_configuration_lacks(run):
    content = config_of(run)
    ratios = content["compress_ratios"][: content["num_hidden_layers"]]
    (run / "config.json").write_text(json.dumps({**content, "num_nextn_predict_layers": 0, "compress_ratios": ratios}))
    assert "which the configuration has no place for" in refusal(load, run)


def test_a_run_without_a_configuration(run):
    (run / "config.json").unlink()
    assert "run has no config.json, expected " in refusal(load, run)
