"""Fingerprints: the same for copies, another one for another model of the same name and shapes."""

import shutil

import pytest

from tests.conftest import DATA
from v4_jax.checkpoint import fingerprint


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(DATA / "flash-tiny", tmp_path / "model")


def test_a_copy_is_the_same_model(model, tmp_path):
    (model / "README.md").write_text("what it is")
    (model / "config.json").touch()  # another time
    assert fingerprint(model) == fingerprint(DATA / "flash-tiny") == fingerprint(shutil.copytree(model, tmp_path / "b"))


@pytest.mark.parametrize("where", [0, 200, -1])
def test_another_byte_is_another_model(model, where):
    before = fingerprint(model)
    for path in sorted(model.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors"):
            content = bytearray(path.read_bytes())
            content[min(where, len(content) - 1)] ^= 1
            path.write_bytes(content)
            after = fingerprint(model)
            assert after != before, path
            before = after


def test_large_files_count_by_samples(tmp_path):
    path = tmp_path / "model.safetensors"
    content = bytearray(3 << 20)
    path.write_bytes(content)
    found = {fingerprint(tmp_path)}
    for place in (0, (3 << 20) - 1):
        content[place] = 1
        path.write_bytes(content)
        found.add(fingerprint(tmp_path))
    path.write_bytes(content + b"0")
    found.add(fingerprint(tmp_path))
    assert len(found) == 4
