"""Who may know whom: imports point down the house, never in a circle, and a user's own modules stay out of the way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import v4_jax

ROOT = Path(__file__).parents[1]

# A room may import those below it. train and infer stand side by side and do not import each other.
BELOW: dict[str, set[str]] = {
    "sharding": set(),
    "model": {"sharding"},
    "train": {"sharding", "model"},
    "infer": {"sharding", "model"},
    "planning": {"sharding", "model", "train", "infer"},
    "commands": {"sharding", "model", "train", "infer", "planning"},
}
ROOMS = [room for room in BELOW if room != "model"]


def module_name(file: Path) -> str:
    """What a source file is imported as: rooms at the top of the repository are parts of v4_jax."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "v4_jax" else ("v4_jax", *parts))


def sources() -> dict[str, Path]:
    """All modules of the package, each once."""
    files = [file for room in (*ROOMS, "v4_jax") for file in (ROOT / room).rglob("*.py")]
    own = [file for file in files if not any(parent.is_symlink() for parent in file.parents)]
    return {module_name(file): file for file in own}


MODULES = sources()


def room_of(module: str) -> str:
    second = f"{module}.".split(".")[1]
    return "commands" if module == "v4_jax.__main__" else second if second in ROOMS else "model"


def imported(module: str) -> set[str]:
    """The package's modules that a module imports anywhere, within functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name in MODULES and name != module}


# v4_jax itself only looks names up when they are asked for, and package docstrings import nothing.
IMPORTS = {module: imported(module) for module in MODULES if module != "v4_jax"}


def test_imports_point_down():
    up = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if other != "v4_jax" and room_of(other) not in {room_of(module), *BELOW[room_of(module)]}
    ]
    assert not up


def test_no_circles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(IMPORTS.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(IMPORTS):
        visit(module, ())
    assert len(done) > 100


def test_every_room_is_linked():
    """A bare checkout, an editable install and editors find the rooms where the wheel has them."""
    for room in ROOMS:
        link = ROOT / "v4_jax" / room
        assert link.is_symlink() and link.resolve() == ROOT / room


@pytest.mark.parametrize("arguments", [("script.py",), ("-m", "v4_jax", "train", "--fields")])
def test_files_of_the_same_names_do_not_get_in_the_way(tmp_path, arguments):
    for name in (*ROOMS, "model", "cache", "layers"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')\n")
    (tmp_path / "script.py").write_text(
        "import v4_jax, v4_jax.sharding.mesh, v4_jax.train.settings, v4_jax.infer.text, v4_jax.planning.hlo\n"
        "import v4_jax.commands, v4_jax.transformer\n"
        "print('learning_rate', v4_jax.Config.tiny().hidden_size)\n"
    )
    command = [sys.executable, *arguments]
    environment = {"PYTHONPATH": f".:{ROOT}", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "learning_rate" in ran.stdout


def test_public_names():
    assert dir(v4_jax) == sorted(v4_jax.__all__)
    for name in v4_jax.__all__:
        assert getattr(v4_jax, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Transformers'"):
        _ = v4_jax.Transformers
    ran = subprocess.run(
        [sys.executable, "-m", "v4_jax", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert ran.stdout == f"v4-jax {v4_jax.__version__}\n"
