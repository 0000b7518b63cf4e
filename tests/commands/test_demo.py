"""The tour goes through, on what comes with the package and on a model of one's own."""

from importlib import resources

from v4_jax.commands import demo


def test_embedded(run, monkeypatch):
    """What was told far outside of the window is found, on eight devices. The demo's texts are longer."""
    monkeypatch.setattr(demo, "LENGTH", 4096)
    monkeypatch.setattr(demo, "CHUNK", 1024)
    result = run("demo")
    assert result.code == 0, result.err
    steps = [line for line in result.out.splitlines() if line[:2] in ("1.", "2.", "3.", "4.")]
    assert len(steps) == 4
    assert "tensors are equal, bit for bit" in result.out
    assert "4 texts of 4,096 characters, split over 8 devices (seq=8)" in result.out
    assert result.out.count(" right ") == len(demo.DEPTHS) and " wrong " not in result.out


def test_a_model_of_ones_own(run, model):
    result = run("demo", "--model", model, "--max-tokens", "4")
    assert result.code == 0 and str(model) in result.out and "Recall" not in result.out
    assert "decode 3 tokens" in result.err


def test_no_such_model(run, tmp_path):
    result = run("demo", "--model", tmp_path / "nowhere")
    assert (result.code, result.out) == (2, "") and result.err.startswith("v4-jax: there is no directory")


def test_the_embedded_checkpoint_stays_small():
    files = list((resources.files("v4_jax") / "data" / "demo").iterdir())
    assert {file.name for file in files} >= {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert sum(len(file.read_bytes()) for file in files) < 6e6
