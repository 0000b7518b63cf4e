"""`--mesh`: the same words from many devices, and clear words about meshes that cannot be."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import TWO, make
from v4_jax import load
from v4_jax.commands.shared import meshes
from v4_jax.commands.shared.sizes import parse_size
from v4_jax.planning.mesh_choice import Demand

ROOT = Path(__file__).parents[2]
FAST = ("--policy", "float32", "--greedy", "--max-tokens", "6", "--prefill-chunk", "16", "--json")


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A released directory with eight experts."""
    return make(**TWO, n_routed_experts=8).exported(tmp_path_factory.mktemp("eight") / "model")


@pytest.fixture
def user(monkeypatch, tmp_path):
    """Somebody with several devices who asks for no mesh; where things are kept for them."""
    monkeypatch.delenv("V4_JAX_MESH")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "v4_jax"


def test_generate(run, eight, user, monkeypatch):
    """A mesh is chosen, said in one line, and remembered; the tokens are those of one device."""
    alone = run("generate", eight, "--tokens", "5 6 7 8 9", *FAST, "--mesh", "one")
    spread = run("generate", eight, "--tokens", "5 6 7 8 9", *FAST)
    assert spread.code == 0 and spread.err.count("\n") == 1 and not alone.err, spread.err
    assert re.match(r"mesh: \S+=\S+, all 8 devices, .* on each \(--mesh=one is one device", spread.err)
    assert json.loads(spread.out)["tokens"] == json.loads(alone.out)["tokens"]
    (kept,) = (user / "meshes").iterdir()
    demand = Demand(load(eight)[0], 256, 1, "long-context", "native", "float32")
    monkeypatch.setattr(meshes, "rank", lambda *_: [])
    assert meshes.choose_mesh(demand) == json.loads(kept.read_text())["mesh"]  # without ranking
    kept.write_text('{"mesh": {"data": "x"}}')
    assert meshes.choose_mesh(demand) is None


def test_several_slices(eight, user, monkeypatch, capsys):
    """Rows alone are spread over slices; what was chosen for devices of one is not taken for those of two."""
    one = Demand(load(eight)[0], 256, 1, "decode", "native", "float32")
    assert meshes.choose_mesh(one) is not None
    monkeypatch.setattr(meshes, "slices_of", lambda devices: 2)
    assert meshes.choose_mesh(one) is None and "using 1 of 8 devices" in capsys.readouterr().err
    assert meshes.choose_mesh(dataclasses.replace(one, rows=2))["data"] == 2


def test_no_room(run, eight, user, monkeypatch):
    """What would fit is said, and does."""
    monkeypatch.setattr(meshes, "device_memory", lambda devices: 1_000_000)
    asked = ("generate", eight, "--tokens", "5", "--policy", "float32", "--max-tokens")
    result = run(*asked, "512K")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "no mesh of 8 devices has room for 1 row of " in result.err and "each has 1.00 MB" in result.err
    found = re.search(r"what would fit: a context of (\S+) \(", result.err)
    assert found, result.err
    monkeypatch.setattr("v4_jax.commands.generate.Engine", None)
    with pytest.raises(TypeError, match="not callable"):  # it comes to the engine
        run(*asked, parse_size(found[1]) - 256)
    monkeypatch.setattr(meshes, "device_memory", lambda devices: 1000)
    assert "what would fit: nothing less of this model" in run(*asked, "512K").err


def test_score(run, eight):
    text = json.dumps({"tokens": list(range(3, 30))})
    arguments = ("score", eight, "--policy", "float32", "--batch", "1")
    alone, spread = run(*arguments, stdin=text), run(*arguments, "--mesh", "seq=8", stdin=text)
    assert spread.code == 0, spread.err
    assert json.loads(spread.out)["total"] == pytest.approx(json.loads(alone.out)["total"], abs=1e-3)


def test_eval(run, eight, tmp_path):
    arguments = ("--lengths", "512", "--depths", "0.5", "--samples", "2", "--raw", "--policy", "float32")
    for name, mesh in (("alone", ()), ("spread", ("--mesh", "seq=2,data=4"))):
        result = run("eval", eight, *arguments, *mesh, "--output", tmp_path / name)
        assert result.code == 0, result.err
    alone, spread = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("alone", "spread"))
    assert spread["questions"] == alone["questions"] and len(alone["questions"]) == 2
    assert spread["settings"]["engine"]["slots"] == 4 and alone["settings"]["engine"]["slots"] == 2


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("seq=3", "mesh seq=3 has 3 places, but there are 8 devices; legal meshes of 8 devices are "),
        ("sequence=8", "found 'sequence=8', expected each of data, seq, expert, tensor at most once"),
        ("seq=0,expert=8", "found 'seq=0'"),
        ("tensor=8", "legal meshes of 8 devices are expert=8; "),
        ("data=8", "the batch: axis 'batch' of size 1 cannot be split 8 ways over data"),
    ],
)
def test_meshes_that_cannot_be(run, eight, mesh, said):
    result = run("generate", eight, "--tokens", "5", *FAST, "--mesh", mesh)
    assert result.code == 2 and said in result.err and len(result.err.splitlines()) == 1, result.err


def test_processes_that_cannot_be_found(run, eight):
    result = run("generate", eight, "--tokens", "5", *FAST, "--distributed")
    assert result.code == 2 and "JAX_COORDINATOR_ADDRESS" in result.err


def test_the_guides_commands(tmp_path):
    """The two processes of docs/pods.md say what one does."""
    (script,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "pods.md").read_text(), flags=re.DOTALL)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, result.stdout + result.stderr
    command = re.search(r'COMMAND="v4-jax (.*?)"', script)[1].replace("--distributed --mesh seq=2,expert=2 ", "")
    alone = subprocess.run(
        ["v4-jax", *command.split()],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert json.loads(lines[0])["tokens"] == json.loads(alone.stdout)["tokens"]
