"""The example programs run as shown: two on the embedded checkpoint, the others on one that compiles sooner."""

import io
import json
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro

from tests.models import trained

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A released directory: two layers, bytes for tokens."""
    return trained().exported(tmp_path_factory.mktemp("models") / "small")


def main_of(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_generate(capsys):
    assert main_of("generate")() == "47"  # what the prompt told under the key that it ends with
    assert capsys.readouterr().out.endswith("bay moss hill QZ47\n")


def test_score_and_gradient(model, capsys):
    chosen, norms = main_of("score_and_gradient")(model, text="red fox")
    assert chosen.shape == (6,) and (chosen < 0).all()
    assert all(norm >= 0 for norm in norms.values()) and norms["['head']"] > 0
    said = capsys.readouterr().out
    assert f"mean negative log-probability: {-chosen.mean():.4f}" in said


def test_train_tiny(model, capsys):
    losses = main_of("train_tiny")(model, steps=4, rows=1, length=64, learning_rate=0.01)
    assert min(losses[1:]) < losses[0]
    assert capsys.readouterr().out.count("loss") == 4


def test_serve(model, capsys):
    answer = main_of("serve")(model)
    assert answer and capsys.readouterr().out == f"moon KB03 fox QZ47 pond KB{answer}\n"


def test_notebook(capsys):
    """Its cells in order, as a notebook runs them, on all devices; it is kept without what it printed."""
    notebook = json.loads((EXAMPLES / "v4_jax.ipynb").read_text())
    cells = notebook["cells"]
    assert notebook["nbformat"] == 4 and notebook["metadata"]["accelerator"] == "TPU"
    assert len({cell["id"] for cell in cells}) == len(cells)
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    said = capsys.readouterr().out
    assert names["answer"] == "47" and f"{names['PROMPT']}47\n" in said
    told, not_told = names["scores"][:, -2:].sum(-1)
    assert told > not_told + 1
    assert names["losses"][-1] < names["losses"][0] - 0.5
    assert names["on_all"].sharding.device_set == set(jax.devices())
    np.testing.assert_allclose(names["on_all"], names["scores"], atol=1e-4)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_is_short_and_explains_itself(path):
    assert f"test_{path.stem}" in globals() and len(path.read_text().splitlines()) < 60
    with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as end:
        tyro.cli(main_of(path.stem), args=["--help"])
    assert end.value.code == 0 and "--model" in said.getvalue()
