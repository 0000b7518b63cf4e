"""Rows to tiles of memory and back by the TPU kernels, interpreted, and their gradients: bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels.choose import rows_from_tiles, rows_in_tiles
from v4_jax.kernels.row_tiles import reference, tpu
from v4_jax.sharding.platform import interpreted


@pytest.mark.parametrize(("length", "count", "width"), [(600, 600, 2048), (600, 300, 4096), (40, 0, 2048)])
def test_rows_go_to_tiles_and_back(length, count, width):
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(length, width)), jnp.bfloat16)
    tiles = reference.in_tiles(rows)
    np.testing.assert_array_equal(tpu.in_tiles(rows, jnp.int32(count), interpret=True)[:count], tiles[:count])
    np.testing.assert_array_equal(tpu.from_tiles(tiles, jnp.int32(count), interpret=True)[:count], rows[:count])


@pytest.mark.parametrize(("width", "dtype"), [(2048, jnp.bfloat16), (384, jnp.bfloat16), (2048, jnp.float32)])
def test_gradients_go_the_other_way(width, dtype):
    rng = np.random.default_rng(1)
    rows, probe = (jnp.asarray(rng.normal(size=(24, width)), dtype) for _ in range(2))

    def there_and_back(rows):
        return rows_from_tiles(jnp.sin(rows_in_tiles(rows, jnp.int32(24))), jnp.int32(24))

    def run(rows):
        out, pull = jax.vjp(there_and_back, rows)
        return out, *pull(probe)

    expected = jax.jit(lambda rows: (jnp.sin(rows), *jax.vjp(jnp.sin, rows)[1](probe)))(rows)
    with interpreted():
        kernels = jax.jit(run)(rows)
    for found in (kernels, jax.jit(run)(rows)):
        for one, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, wanted)


def test_what_travels_as_it_is():
    rows = jnp.zeros((3, 96))
    assert rows_from_tiles(rows_in_tiles(rows, jnp.int32(3)), jnp.int32(3)) is rows
