"""The tour goes through, on what comes with the package and on a model of one's own."""

import functools
import importlib
import shlex
import sys
from importlib import resources
from pathlib import Path

from v4_jax.commands import demo


def next_commands(out):
    """The arguments of the three commands that the tour ends with."""
    words = [shlex.split(line) for line in out.splitlines()[-3:]]
    assert {Path(program).name for program, *_ in words} == {"v4-jax"}
    return [arguments for _, *arguments in words]


def assert_parse(monkeypatch, run, *commands):
    """Commands are complete, with what they would do left out."""
    for verb, *arguments in commands:
        module = importlib.import_module(f"v4_jax.commands.{verb}")
        with monkeypatch.context() as context:
            context.setattr(module, verb, functools.wraps(getattr(module, verb))(lambda *_, **__: 0))
            result = run(verb, *arguments)
        assert result.code == 0, result.err


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
    next_generate, next_info, next_chat = next_commands(result.out)
    assert next_generate[-1] == demo.TOLD_BRIEFLY and (Path(next_generate[1]) / "config.json").is_file()
    assert run(*next_info).code == 0 and next_chat[0] == "chat"
    assert_parse(monkeypatch, run, next_generate, next_chat)


def test_a_model_of_ones_own(run, model, monkeypatch):
    result = run("demo", "--model", model, "--max-tokens", "4")
    assert result.code == 0 and str(model) in result.out and "Recall" not in result.out
    assert "decode 3 tokens" in result.err
    commands = next_commands(result.out)
    assert all(command[1] == str(model) for command in commands)
    assert_parse(monkeypatch, run, *commands)


def test_an_option_without_effect_is_refused(run):
    result = run("demo", "--max-tokens", "4")
    assert result.code == 2 and "--max-tokens is for the reply of a model of yours" in result.err and not result.out


def test_no_such_model(run, tmp_path):
    result = run("demo", "--model", tmp_path / "nowhere")
    assert (result.code, result.out) == (2, "") and result.err.startswith("v4-jax: there is no directory")


def test_the_embedded_checkpoint_stays_small():
    files = list((resources.files("v4_jax") / "data" / "demo").iterdir())
    assert {file.name for file in files} >= {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert sum(len(file.read_bytes()) for file in files) < 6e6


def test_the_program_is_named_as_a_shell_finds_it(monkeypatch, tmp_path):
    program = tmp_path / "some where" / "bin" / "v4-jax"
    program.parent.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    monkeypatch.setenv("PATH", "/nowhere")
    assert demo._program() == "v4-jax"  # python -m v4_jax, without a program of that name
    program.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    assert demo._program() == "'some where/bin/v4-jax'"
    monkeypatch.setenv("PATH", str(program.parent))
    assert demo._program() == "v4-jax"
