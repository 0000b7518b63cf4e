"""The tour goes through, on what comes with the package and on a model of one's own."""

from importlib import resources


def test_embedded(run):
    result = run("demo", "--max-tokens", "4")
    assert result.code == 0, result.err
    steps = [line for line in result.out.splitlines() if line[:2] in ("1.", "2.", "3.", "4.")]
    assert len(steps) == 4
    assert "all 648 tensors are equal, bit for bit" in result.out
    assert "random weights, so its reply is noise" in result.out
    assert "decode 3 tokens" in result.err


def test_a_model_of_ones_own(run, model):
    result = run("demo", "--model", model, "--max-tokens", "4")
    assert result.code == 0 and str(model) in result.out and "random weights" not in result.out


def test_no_such_model(run, tmp_path):
    result = run("demo", "--model", tmp_path / "nowhere")
    assert (result.code, result.out) == (2, "") and result.err.startswith("v4-jax: there is no directory")


def test_the_embedded_checkpoint_stays_small():
    files = list((resources.files("v4_jax") / "data" / "demo").iterdir())
    assert {file.name for file in files} >= {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert sum(len(file.read_bytes()) for file in files) < 6e6
