"""`convert`, `export` and `verify` from the command line: there and back is bit for bit, and differences are found."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.directories import config_of, write_run
from tests.remote_servers import TOKEN, serving
from v4_jax.checkpoint import load
from v4_jax.checkpoint.remote import directory
from v4_jax.commands.shared.models import ModelDirectory


def test_there_and_back(run, model, tmp_path):
    converted, exported = tmp_path / "converted", tmp_path / "exported"
    result = run("convert", model, converted)
    assert (result.code, result.out) == (0, "") and result.err.startswith(f"wrote {converted}: ")
    assert run("export", converted, exported).code == 0
    for a, b in ((model, converted), (model, exported), (converted, exported)):
        result = run("verify", a, b)
        assert result.code == 0 and "are equal, bit for bit" in result.out and not result.err
    again = run("convert", model, converted)
    assert (again.code, again.out, again.err.count("\n")) == (2, "", 1) and "already exists" in again.err


def test_one_bit(run, model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    shard = sorted(other.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = run("verify", model, other)
    assert result.code == 1 and "Tensors that differ" in result.out and "different" in result.out
    assert "1 of " in result.out


def test_another_configuration(run, model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = other / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
    result = run("verify", model, other)
    assert result.code == 1 and "1 configuration fields differ" in result.out
    assert "rope_theta" in result.out and "20000" in result.out


@pytest.mark.parametrize("verb", ["convert", "export", "verify"])
def test_no_such_directory(run, tmp_path, verb):
    result = run(verb, tmp_path / "nowhere", tmp_path / "target")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith(f"v4-jax: there is no directory {tmp_path / 'nowhere'}")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_damaged_source(run, model, tmp_path, verb):
    source = tmp_path / "source"
    shutil.copytree(model, source)
    sorted(source.glob("*.safetensors"))[0].unlink()
    result = run(verb, source, tmp_path / "target")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1) and "Traceback" not in result.err
    assert not (tmp_path / "target").exists()


def test_a_converted_directory_generates_alike(run, model, tmp_path):
    run("convert", model, tmp_path / "converted")
    for leaf in ("embed", "head"):
        np.testing.assert_array_equal(*(np.asarray(load(path)[1][leaf]) for path in (model, tmp_path / "converted")))
    arguments = ("--tokens", "5 6", "--max-tokens", "4", "--policy", "float32", "--prefill-chunk", "16")
    texts = [run("generate", path, *arguments).out for path in (model, tmp_path / "converted")]
    assert texts[0] == texts[1] != ""


def test_a_training_run(run, model, tmp_path):
    config, params = load(model, dtype="float32")
    training = write_run(tmp_path / "training", config, {3: params})
    exported, step = tmp_path / "exported", training / "checkpoints" / "3"
    assert run("export", training, exported).code == 0
    assert run("verify", step, exported).code == 0
    for path in (training, step):
        assert run("info", path).out == run("info", exported).out
    arguments = ("--tokens", "5 6", "--max-tokens", "4", "--policy", "float32", "--prefill-chunk", "16")
    texts = [run("generate", path, *arguments).out for path in (step, exported)]
    assert texts[0] == texts[1] != ""
    result = run("export", tmp_path, tmp_path / "target")
    assert (result.code, result.err.count("\n")) == (2, 1) and "has no config.json" in result.err


def test_formats(run, model, tmp_path):
    assert run("export", model, tmp_path / "bf16", "--format", "bf16").code == 0
    assert config_of(tmp_path / "bf16")["expert_dtype"] == "bf16"
    result = run("verify", model, tmp_path / "bf16")
    assert result.code == 1 and "dtype" in result.out
    result = run("export", model, tmp_path / "out", "--format", "int4")
    assert result.code == 2 and "int4" in result.err and "bf16" in result.err


def test_a_model_of_the_hub(run, model, tmp_path, monkeypatch):
    directory.cache_clear()
    with serving("hf", model) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        result = run("verify", "hf://org/name", model)
        assert result.code == 0 and "are equal, bit for bit" in result.out
        assert run("info", "hf://org/name", "--json").out == run("info", model, "--json").out
        result = run("convert", model, "hf://org/name")
        assert (result.code, result.err.count("\n")) == (2, 1) and "hf://org/name cannot be written" in result.err
        assert ModelDirectory.open(Path("hf://org/name")).generation_defaults().temperature == 1.0
        result = run("generate", "hf://org/other", "--prompt", "a")
        assert (result.code, result.err.count("\n")) == (2, 1) and "hf://org/other cannot be read" in result.err
        assert TOKEN not in result.err
