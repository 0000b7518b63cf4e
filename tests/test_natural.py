"""Division of natural numbers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.natural import quotient, remainder


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 127, 128, 130])
def test_as_pythons(n):
    x = np.array([0, 1, n - 1, n, n + 1, 5 * n - 1, 2**20, 2**31 - 1], np.int32)
    np.testing.assert_array_equal(quotient(jnp.asarray(x), n), x // n)
    np.testing.assert_array_equal(remainder(jnp.asarray(x), n), x % n)
