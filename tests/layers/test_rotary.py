"""Rotary embedding: YaRN per role, interleaved pairs, long positions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax import Config
from v4_jax.architecture import RATIO_OF_ROLE
from v4_jax.layers.rotary import inverse_frequencies, rotate, turn

FLASH = Config.flash()


def test_sliding_layers_have_no_yarn():
    found = inverse_frequencies(FLASH, RATIO_OF_ROLE["sliding"])
    np.testing.assert_allclose(found, 10000.0 ** (-np.arange(0, 64, 2) / 64), rtol=1e-6)


@pytest.mark.parametrize("role", ["csa", "hca"])
def test_compressed_layers_have_yarn(role):
    """Pairs up to 15 keep their frequency, pairs from 25 on are slowed 16 times, a ramp lies between."""
    found = inverse_frequencies(FLASH, RATIO_OF_ROLE[role])
    plain = 160000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(found[:16], plain[:16], rtol=1e-6)
    np.testing.assert_allclose(found[25:], plain[25:] / 16, rtol=1e-6)
    share = (np.arange(16, 25) - 15) / 10
    np.testing.assert_allclose(found[16:25], plain[16:25] * (1 - share + share / 16), rtol=1e-6)


def test_rotary_width_is_64_in_both_models():
    for config in (Config.flash(), Config.pro()):
        assert len(inverse_frequencies(config, config.layers[-1].ratio)) * 2 == 64


@pytest.mark.parametrize("position", [1, 65537, 1048575])
def test_rotation_is_a_complex_product(position):
    frequencies = inverse_frequencies(FLASH, RATIO_OF_ROLE["csa"])
    x = jax.random.normal(jax.random.key(0), (1, 1, 3, 80))
    turned = np.asarray(rotate(x, turn(jnp.full((1, 1), position), frequencies)))[0, 0]
    tail = np.asarray(x)[0, 0, :, 16:].reshape(3, 32, 2)
    angles = np.float32(position) * frequencies  # float32 like the released model
    expected = (tail[..., 0] + 1j * tail[..., 1]) * np.exp(1j * angles.astype(np.float64))
    np.testing.assert_allclose(turned[:, 16:].reshape(3, 32, 2)[..., 0], expected.real, atol=1e-5)
    np.testing.assert_allclose(turned[:, 16:].reshape(3, 32, 2)[..., 1], expected.imag, atol=1e-5)
    np.testing.assert_array_equal(turned[:, :16], x[0, 0, :, :16])


def test_inverse_undoes():
    frequencies = inverse_frequencies(FLASH, RATIO_OF_ROLE["hca"])
    x, positions = jax.random.normal(jax.random.key(1), (2, 7, 64)), jnp.arange(14).reshape(2, 7) * 9973
    angles = turn(positions, frequencies)
    back = rotate(rotate(x, angles), angles, inverse=True)
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_original_length_moves_the_ramp():
    short = dataclasses.replace(FLASH.rope_scaling, original_max_position_embeddings=64)
    config = dataclasses.replace(FLASH, rope_scaling=short)
    assert inverse_frequencies(config, RATIO_OF_ROLE["csa"])[10] < inverse_frequencies(FLASH, RATIO_OF_ROLE["csa"])[10]
