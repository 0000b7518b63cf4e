"""A Newton-Schulz iteration by the TPU kernels, interpreted, and by plain JAX: against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels.choose import newton_schulz_step
from v4_jax.kernels.newton_schulz import reference, tpu
from v4_jax.sharding.platform import interpreted
from v4_jax.train.muon import COEFFICIENTS, newton_schulz


@pytest.mark.parametrize("shape", [(2, 256, 384), (1, 128, 1024), (3, 768, 896), (640, 640)])
def test_against_float64(shape):
    """Within the roundings of both squares, of the polynomial and of the result to bfloat16."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=shape) / np.sqrt(shape[-1] * 4)
    y = jnp.asarray(y, jnp.bfloat16)
    coefficients = jnp.asarray(COEFFICIENTS[0], jnp.float32)
    exact = np.asarray(y, np.float64)
    a, b, c = np.asarray(coefficients, np.float64)
    squared = exact @ np.swapaxes(exact, -1, -2)
    factor = a * np.eye(shape[-2]) + b * squared + c * squared @ squared
    wanted, unit = factor @ exact, float(jnp.finfo(jnp.bfloat16).eps)

    assert tpu.supports(y)
    kernel = jax.jit(lambda y: tpu.step(y, coefficients, interpret=True))(y)
    for found in (kernel, jax.jit(reference.step)(y, coefficients)):
        assert found.dtype == y.dtype and found.shape == y.shape
        error = np.asarray(found, np.float64) - wanted
        assert np.linalg.norm(error) < unit * np.linalg.norm(wanted)
        assert abs(error).max() < 4 * unit * abs(wanted).max()


def test_squares_are_symmetric():
    """To the bit: what lies across the diagonal is the same numbers."""
    y = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1024, 256)), jnp.bfloat16)
    square = np.asarray(tpu._square(y, None, jnp.zeros(3), True)[0], np.float32)
    np.testing.assert_array_equal(square, square.T)


def test_muon_takes_the_kernels_in_programs_for_tpus_alone():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 384, 128)), jnp.float32)

    def run(x):
        return newton_schulz(x, jnp.bfloat16)

    with interpreted():
        traced, kernels = str(jax.make_jaxpr(run)(x)), jax.jit(run)(x)
    assert "interpret=True" in traced and "platform_index" not in traced
    for found in (kernels, jax.jit(run)(x)):
        assert abs(np.linalg.svd(found, compute_uv=False) - 1).max() < 0.05


def test_what_has_no_kernel():
    """Other dtypes, odd sizes, and squares that have no room."""
    assert not tpu.supports(jnp.zeros((128, 256)))
    assert not tpu.supports(jnp.zeros((96, 256), jnp.bfloat16))
    assert not tpu.supports(jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16))
    with interpreted():
        assert "pallas_call" not in str(
            jax.make_jaxpr(lambda y: newton_schulz_step(y, jnp.zeros(3)))(jnp.zeros((8, 8)))
        )
