"""`v4-jax completion`: the shell itself completes verbs, options and values."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from v4_jax.commands import VERBS


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """What bash adds to the words of a command when Tab is pressed after the last."""
    from v4_jax.commands.completion import _script

    path = tmp_path_factory.mktemp("shell") / "script"
    path.write_text(_script("bash"))

    def press(*words):
        program = (
            f'. {path}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _tyro_v4_jax; printf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        command = ["bash", "-c", program, "bash", "v4-jax", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment).stdout.split()

    return press


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash(tab):
    assert set(VERBS) <= set(tab(""))
    assert tab("gen") == ["generate"]
    assert {"--max-tokens", "--mesh", "--compilation-cache", "--profile"} <= set(tab("generate", "--"))
    assert "--topology" not in tab("generate", "--") and "--topology" in tab("plan", "--")
    assert set(tab("chat", "x", "--mode", "")) == {"non-think", "low", "high", "max"}


@pytest.mark.parametrize(
    ("shell", "name", "said"),
    [
        ("bash", "bash-completion/completions/v4-jax", "bash-completion"),
        ("zsh", "zsh/site-functions/_v4-jax", "fpath=("),
    ],
)
def test_install(run, monkeypatch, tmp_path, shell, name, said):
    monkeypatch.setattr("v4_jax.commands.completion._script", lambda shell: f"script of {shell}\n")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("BASH_COMPLETION_USER_DIR", raising=False)
    result = run("completion", shell, "--install")
    assert result.code == 0 and said in result.err and str(tmp_path / name) in result.err and not result.out
    assert (tmp_path / name).read_text() == run("completion", shell).out == f"script of {shell}\n"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / name))  # a file
    assert run("completion", shell, "--install").code == 2
    assert run("completion", "fish").code == 2
