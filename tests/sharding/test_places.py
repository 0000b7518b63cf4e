"""Rows spread over places and collected from them: a gather, a sum, and the gradients of each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.sharding.places import Places, collect, spread

# Of five rows one lies nowhere and one twice; of seven places three hold none, and name some row all the same.
PLACES = Places(np.array([2, 0, 4, 4, 0, 0, 3]), np.array([[1, -1], [-1, -1], [0, -1], [6, -1], [2, 3]]))
HELD = [0, 1, 2, 3, 6]
ROWS = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
IN_PLACES = np.random.default_rng(1).normal(size=(7, 2, 3)).astype(np.float32)


def summed(values):
    total = np.zeros((5, 2, 3), np.float32)
    np.add.at(total, PLACES.row[HELD], values[HELD])
    return total


def test_rows_to_places_and_back():
    np.testing.assert_array_equal(spread(ROWS, PLACES)[jnp.array(HELD)], ROWS[PLACES.row[HELD]])
    beyond = IN_PLACES.copy()
    beyond[4:6] = np.nan  # what no row has is not looked at
    np.testing.assert_array_equal(collect(beyond, PLACES), summed(IN_PLACES))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_is_the_gradient_of_the_other(dtype):
    rows, places = (jnp.asarray(x).astype(dtype) for x in (ROWS, IN_PLACES))
    (of_rows,) = jax.vjp(lambda x: spread(x, PLACES), rows)[1](places)
    expected = summed(np.asarray(places, np.float32))
    np.testing.assert_array_equal(of_rows, jnp.asarray(expected).astype(dtype))
    (of_places,) = jax.vjp(lambda y: collect(y, PLACES), places)[1](jnp.asarray(ROWS))
    np.testing.assert_array_equal(of_places[jnp.array(HELD)], rows[PLACES.row[HELD]])
    assert of_rows.dtype == of_places.dtype == dtype
