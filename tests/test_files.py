"""Files appear whole or not at all."""

import os
import stat

import pytest

from v4_jax.files import complete


@pytest.fixture
def umask(monkeypatch):
    """The group may read; nobody may ask or change it, as other threads make files meanwhile."""
    before, change = os.umask(0o027), os.umask
    monkeypatch.delattr(os, "umask")
    yield
    change(before)


@pytest.mark.parametrize(("private", "mode"), [(False, 0o640), (True, 0o600)])
def test_files_appear_whole(tmp_path, umask, private, mode):
    target = tmp_path / "out"
    with complete(target, private=private) as working:
        working.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new" and stat.S_IMODE(target.stat().st_mode) == mode
    with pytest.raises(ZeroDivisionError), complete(target) as working:
        working.write_text(str(1 / 0))
    assert os.listdir(tmp_path) == ["out"] and target.read_text() == "new"
