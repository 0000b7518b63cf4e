"""Two processes of four devices == one process of eight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.models import TOLERANCE
from tests.processes import finish, start, start_two

SCRIPT = Path(__file__).with_name("one_of_two.py")


@pytest.mark.parametrize("mesh", ["seq=2,expert=2,tensor=2"])
def test_two_processes(mesh, tmp_path):
    """The sequence, its halos and its entries cross from one process to the other."""
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    finish(start(SCRIPT, 8, mesh, one))
    for process in start_two(SCRIPT, 4, mesh, two):
        finish(process)
    expected, found = np.load(one), np.load(two)
    assert len(expected.files) == 5
    for name in expected.files:
        np.testing.assert_allclose(found[name], expected[name], atol=TOLERANCE, rtol=0, err_msg=name)
