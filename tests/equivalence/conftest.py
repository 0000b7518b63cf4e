"""Fixtures of the equivalence tests."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests import models


@pytest.fixture(scope="session")
def tiny() -> models.Tiny:
    """Six layers, some of which repeat."""
    return models.six()


@pytest.fixture(scope="session")
def three() -> models.Tiny:
    """One layer of each role, for tests that compile many shapes."""
    return models.three()


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """[2, 300] token ids."""
    return np.asarray(jax.random.randint(jax.random.key(7), (2, 300), 0, 64))
