"""The command itself: help, verbs, and how it ends."""

import itertools
import signal
import subprocess
import sys

import pytest

from v4_jax.commands import VERBS, main
from v4_jax.commands.shared.absent_tpus import leave_out_absent_tpus


def test_overview(run):
    result = run("--help")
    assert result.code == 0 and not result.err
    assert all(f"  {verb} " in result.out and VERBS[verb] in result.out for verb in VERBS)
    assert run() == (2, "", result.out)
    assert run("--version").out == "v4-jax 0.1.0\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_each_verb_with_an_example(run, verb):
    result = run(verb, "--help")
    assert result.code == 0
    assert "Examples:" in result.out and f"  v4-jax {verb} " in result.out.replace(
        f"v4-jax {verb}\n", f"v4-jax {verb} "
    )
    assert "None" not in result.out and ("(required)" in result.out or verb in ("demo", "train"))


def test_unknown_verb(run):
    result = run("generat")
    assert result.code == 2 and not result.out
    assert result.err == f"v4-jax: unknown verb 'generat'; expected one of {', '.join(VERBS)}\n"


@pytest.mark.parametrize(
    "arguments", [("info",), ("info", "flash", "--what"), ("verify", "a"), ("generate", "x", "--mode", "deep")]
)
def test_arguments_that_do_not_parse(run, arguments):
    result = run(*arguments)
    assert result.code == 2 and not result.out and "Traceback" not in result.err


def test_help_imports_no_room():
    program = (
        "import sys; from v4_jax.commands import main; main(['--help'])\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('infer', 'train', 'orbax', 'tyro')])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


def test_errors_that_are_ours_keep_their_traceback(model, monkeypatch):
    def broken(*_):
        raise ValueError("a mistake in the program, not in its input")

    monkeypatch.setattr("v4_jax.infer.engine.scheduler.Engine.compile", broken)
    with pytest.raises(ValueError, match="a mistake in the program"):
        main(["generate", str(model), "--prompt", "x"])


def test_interrupt(start, model):
    process = start("generate", model, "--prompt", "hi", "--max-tokens", "100K", "--raw")
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not err and out.endswith("\n")


def test_a_reader_that_has_seen_enough(start, model):
    process = start("generate", model, "--prompt", "hi", "--max-tokens", "100K", "--raw")
    assert "".join(itertools.islice(iter(lambda: process.stdout.read(1), ""), 5))
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141 and not err


@pytest.mark.parametrize(
    ("environment", "installed", "node", "chosen"),
    [
        ({}, {"libtpu"}, False, "cpu"),
        ({}, {"libtpu"}, True, None),
        ({}, set(), False, None),
        ({}, {"libtpu", "jax_plugins"}, False, None),  # GPUs
        ({"TPU_NAME": "pod"}, {"libtpu"}, False, None),
        ({"JAX_PLATFORMS": "tpu"}, {"libtpu"}, False, "tpu"),
    ],
)
def test_tpus_are_not_looked_for_where_none_are(monkeypatch, tmp_path, environment, installed, node, chosen):
    """Else libtpu, which `plan` needs, says at length that it finds none."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in installed or None)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    if node:
        (tmp_path / "accel0").touch()
    found = dict(environment)
    leave_out_absent_tpus(found, (str(tmp_path / "accel*"),))
    assert found.get("JAX_PLATFORMS") == chosen
