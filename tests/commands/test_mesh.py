"""`--mesh`: the same words from many devices, and clear words about meshes that cannot be."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import TWO, make

ROOT = Path(__file__).parents[2]
FAST = ("--policy", "float32", "--greedy", "--max-tokens", "6", "--prefill-chunk", "16", "--json")


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A released directory with eight experts."""
    return make(**TWO, n_routed_experts=8).exported(tmp_path_factory.mktemp("eight") / "model")


def test_generate(run, eight):
    alone = run("generate", eight, "--tokens", "5 6 7 8 9", *FAST)
    spread = run("generate", eight, "--tokens", "5 6 7 8 9", *FAST, "--mesh", "seq=4,expert=2")
    assert spread.code == 0, spread.err
    assert json.loads(spread.out)["tokens"] == json.loads(alone.out)["tokens"]


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
