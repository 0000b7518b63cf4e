"""Fixtures of the equivalence tests."""

from __future__ import annotations

import jax
import pytest

from tests.equivalence.tiny import Tiny, make


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """Six layers: three unrolled, and a period (hca, csa) when it repeats."""
    return make()


@pytest.fixture(scope="session")
def three() -> Tiny:
    """One layer of each role, for tests that compile many shapes."""
    return make(num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1)


@pytest.fixture(scope="session")
def tokens():
    return jax.random.randint(jax.random.key(7), (2, 300), 0, 64)
