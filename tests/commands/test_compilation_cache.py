"""Where compiled programs are kept: the user's cache directory, unless something says otherwise; never a failure."""

from types import SimpleNamespace

import pytest

from v4_jax.commands.shared import compilation_cache
from v4_jax.commands.shared.compilation_cache import DIRECTORY, THRESHOLD, default_directory, keep_programs

KEPT, ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
LEAST = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def told(monkeypatch):
    """What jax was told, which it is spared; the environment and jax are as at a user's, who has told neither."""
    found = {}
    config = SimpleNamespace(update=found.__setitem__, values={KEPT: None, ENABLED: True})
    monkeypatch.setattr("v4_jax.commands.shared.compilation_cache.jax", SimpleNamespace(config=config))
    for variable in (DIRECTORY, THRESHOLD, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return found


def test_in_the_users_cache_directory(told, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which counts for nothing
    keep_programs(None)
    directory = default_directory({})
    assert directory.is_dir() and directory.parent == tmp_path / ".cache" / "v4_jax" / "programs"
    assert told == {KEPT: str(directory), LEAST: 0.1}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    keep_programs(None)
    assert told[KEPT].startswith(str(tmp_path / "other" / "v4_jax")) and not capsys.readouterr().err


def test_the_environment_and_the_option(told, monkeypatch, tmp_path):
    monkeypatch.setenv(DIRECTORY, str(tmp_path / "named"))
    monkeypatch.setenv(THRESHOLD, "3")
    keep_programs(None)
    assert told == {KEPT: str(tmp_path / "named")}
    monkeypatch.setenv(DIRECTORY, "gs://bucket/programs")
    keep_programs(None)
    assert told == {KEPT: "gs://bucket/programs"}
    keep_programs(tmp_path / "chosen")
    assert told == {KEPT: str(tmp_path / "chosen")}
    told.clear()
    keep_programs("off")
    assert told == {ENABLED: False}


@pytest.mark.parametrize("before", [{ENABLED: False}, {KEPT: "/somewhere"}])
def test_a_program_that_has_settled_it(told, monkeypatch, tmp_path, before):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(compilation_cache.jax.config.values, *next(iter(before.items())))
    keep_programs(None)
    assert told == {} and not list(tmp_path.iterdir())


def test_without_a_place(told, monkeypatch, tmp_path, capsys):
    """A file where a directory should be, one that nobody may write in, no home: one line, and on it goes."""
    file = tmp_path / "file"
    file.touch()

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    def refused(*_):
        return False

    for where, patch in ((file / "x", None), (file, None), (tmp_path / "y", ("os.access", refused))):
        with monkeypatch.context() as context:
            if patch:
                context.setattr(*patch)
            keep_programs(where)
        said = capsys.readouterr().err
        assert told == {ENABLED: False} and said.count("\n") == 1 and f"are not kept ({where}: " in said, said
    monkeypatch.setattr("pathlib.Path.home", nobody)
    keep_programs(None)
    assert "are not kept (Could not determine home directory.)" in capsys.readouterr().err


def test_commands_settle_it_first(run, told, tmp_path):
    result = run("generate", tmp_path / "nowhere", "--compilation-cache", tmp_path / "programs")
    assert "there is no directory" in result.err and told[KEPT] == str(tmp_path / "programs")
    assert "--compilation-cache" not in run("plan", "--help").out
