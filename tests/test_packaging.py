"""What is installed has all files, and the image is made of files and extras that exist."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
PACKAGE = ROOT / "v4_jax"

# Each instruction of the Dockerfile with its words; lines that end in a backslash go on.
IMAGE = [
    line.split(maxsplit=1)
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]


def copied() -> list[str]:
    """What the image takes from the repository."""
    sources = []
    for instruction, words in IMAGE:
        if instruction == "COPY" and not words.startswith("--from"):
            sources += words.split()[:-1]
    return sources


def test_data_files_are_in_the_wheel():
    """A wheel has Python files of every room, and of other files those that `package-data` names."""
    patterns = SETUPTOOLS["package-data"]["v4_jax"]
    rooms = [ROOT / link.readlink().name for link in PACKAGE.iterdir() if link.is_symlink()]
    files = [file for place in (PACKAGE, *rooms) for file in place.rglob("*") if file.is_file()]
    others = [file for file in files if file.suffix not in (".py", ".pyc")]
    assert len(rooms) == 5 and len(others) > 10
    for file in others:
        assert file.is_relative_to(PACKAGE), f"{file}: package-data names files of v4_jax alone"
        name = str(file.relative_to(PACKAGE))
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


def test_the_image_is_made_of_what_exists():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore and set(copied()) == allowed
    for source in copied():
        assert (ROOT / source).exists(), source
    links = {link.readlink().name for link in PACKAGE.iterdir() if link.is_symlink()}
    assert links < allowed  # the rooms that v4_jax links to


def test_the_image_has_what_the_build_reads():
    project = PROJECT["project"]
    assert {"pyproject.toml", project["readme"], *project["license-files"]} <= set(copied())


def test_stages_extras_and_entry_point():
    stages = [words.split(" AS ")[1] for instruction, words in IMAGE if instruction == "FROM"]
    assert stages == ["build", "base", "tpu", "cpu"]
    installed = " ".join(words for instruction, words in IMAGE if instruction == "RUN")
    extras = {extra for names in re.findall(r"\[([\w,]+)\]", installed) for extra in names.split(",")}
    assert "tpu" in extras and extras <= set(PROJECT["project"]["optional-dependencies"])
    (entry,) = (words for instruction, words in IMAGE if instruction == "ENTRYPOINT")
    assert re.findall(r'"([^"]+)"', entry) == list(PROJECT["project"]["scripts"])


@pytest.mark.parametrize("page", ["Dockerfile", "docs/pods.md"])
def test_targets_that_are_shown_are_stages(page):
    targets = set(re.findall(r"docker build .*--target (\w+)", (ROOT / page).read_text()))
    assert targets and targets <= {"cpu", "tpu"}


def test_the_image_has_a_version_that_the_package_takes():
    (version,) = (words.removeprefix("PYTHON=") for instruction, words in IMAGE if instruction == "ARG")
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert tuple(map(int, version.split("."))) >= tuple(map(int, least.split(".")))
