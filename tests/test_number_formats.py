"""The released number formats, against definitions written out with numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from v4_jax.number_formats import (
    E2M1,
    E4M3,
    E8M0,
    FP4_BLOCK,
    FP8_BLOCK,
    BlockScaled,
    decode_rows,
    dequantise,
    encode_rows,
    fake_quant_index,
    fake_quant_kv,
    hadamard,
    power_of_two_scale,
    quantise,
    saturate,
)

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_e2m1_codes_and_ties():
    codes = np.arange(16, dtype=np.uint8)
    values = jnp.asarray(codes.view(np.uint8)).astype(jnp.uint4)
    decoded = np.asarray(jax.lax.bitcast_convert_type(values, E2M1).astype(jnp.float32))
    np.testing.assert_array_equal(decoded, np.concatenate([E2M1_VALUES, -E2M1_VALUES]))
    midpoints = (E2M1_VALUES[1:] + E2M1_VALUES[:-1]) / 2
    rounded = np.asarray(jnp.asarray(midpoints, jnp.float32).astype(E2M1).astype(jnp.float32))
    even = np.where(np.arange(7) % 2 == 0, E2M1_VALUES[:-1], E2M1_VALUES[1:])
    np.testing.assert_array_equal(rounded, even)


@pytest.mark.parametrize(("dtype", "bound"), [(E4M3, 448.0), (E2M1, 6.0)])
def test_rounding_is_exact_next_to_ties(dtype, bound):
    """Compilers have been seen to round twice on the way to a small format; one rounding, ties to even, is the law."""
    rng = np.random.default_rng(0)
    positive = np.arange(128 if dtype == E4M3 else 8, dtype=np.uint8)
    grid = np.asarray(positive.view(dtype) if dtype == E4M3 else E2M1_VALUES).astype(np.float32)
    grid = grid[np.isfinite(grid)]
    ties = (grid[1:] + grid[:-1]) / 2
    close = [ties, np.nextafter(ties, np.inf), np.nextafter(ties, 0), ties * (1 + 1e-4), ties * (1 - 1e-4)]
    values = np.concatenate([*close, rng.uniform(0, bound, 50000), rng.lognormal(-3, 3, 50000), [0.0]])
    values = np.concatenate([values, -values]).astype(np.float32)
    expected = np.clip(values, -bound, bound).astype(dtype).astype(np.float32)  # numpy's conversion rounds once
    np.testing.assert_array_equal(jax.jit(lambda x: saturate(x, dtype).astype(jnp.float32))(values), expected)


def test_e8m0_is_a_bare_exponent():
    bytes_ = np.array([1, 120, 127, 134, 254], np.uint8)
    decoded = jnp.asarray(bytes_.view(ml_dtypes.float8_e8m0fnu)).astype(jnp.float32)
    np.testing.assert_array_equal(decoded, 2.0 ** (bytes_.astype(float) - 127))


@pytest.mark.parametrize("largest", [448.0, 6.0])
def test_scale_is_the_smallest_power_of_two_that_fits(largest):
    rng = np.random.default_rng(0)
    amax = np.concatenate([np.exp(rng.uniform(-30, 30, 500)), largest * 2.0 ** np.arange(-20, 20)]).astype(np.float32)
    scale = np.asarray(power_of_two_scale(jnp.asarray(amax), largest, 1e-30))
    assert (np.frexp(scale)[0] == 0.5).all()
    assert (amax <= largest * scale).all() and (amax > largest * scale / 2).all()


@pytest.mark.parametrize(("dtype", "block", "shape"), [(E4M3, FP8_BLOCK, (2, 300, 200)), (E2M1, FP4_BLOCK, (3, 5, 96))])
def test_quantise_round_trip(dtype, block, shape):
    weight = jax.random.normal(jax.random.key(0), shape) * 0.05
    once = quantise(weight, dtype)
    assert once.codes.shape == shape and once.block == block
    assert once.scales.shape == (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    values = dequantise(once, jnp.float32)
    step = 2.0**-3 if dtype == E4M3 else 0.5
    assert jnp.abs(values - weight).max() <= step * jnp.abs(weight).max()
    twice = quantise(values, dtype)
    np.testing.assert_array_equal(dequantise(twice, jnp.float32), values)


def test_dequantise_by_definition():
    rng = np.random.default_rng(1)
    codes = rng.normal(size=(200, 300)).astype(ml_dtypes.float8_e4m3fn)
    scales = (2.0 ** rng.integers(-6, 2, (2, 3))).astype(np.float32)
    expected = np.empty((200, 300), np.float32)
    for i in range(200):
        for j in range(300):
            expected[i, j] = np.float32(codes[i, j]) * scales[i // 128, j // 128]
    for held in (scales, scales.astype(ml_dtypes.float8_e8m0fnu)):
        weight = BlockScaled(jnp.asarray(codes), jnp.asarray(held), FP8_BLOCK)
        np.testing.assert_array_equal(dequantise(weight, jnp.float32), expected)


def test_four_bit_weights_take_four_bits():
    weight = quantise(jnp.ones((64, 64)), E2M1)
    assert weight.nbytes == 64 * 64 // 2 + 64 * 2


def test_hadamard_is_orthonormal_and_cancels_in_products():
    matrix = np.asarray(hadamard(jnp.eye(128)))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(128), atol=1e-6)
    np.testing.assert_allclose(np.abs(matrix), 128**-0.5, rtol=1e-6)
    expected = np.array([[1.0]])
    while expected.shape[0] < 128:
        expected = np.block([[expected, expected], [expected, -expected]])
    np.testing.assert_allclose(matrix, expected * 128**-0.5, rtol=1e-6)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(jnp.ones(48))


def test_rows_by_definition():
    rows = jax.random.normal(jax.random.key(2), (7, 128))
    codes, scales = encode_rows(rows, E2M1, 32)
    assert scales.dtype == E8M0 and scales.shape == (7, 4)
    decoded = np.asarray(decode_rows(codes, scales, jnp.float32)).reshape(7, 4, 32)
    blocks = np.asarray(rows).reshape(7, 4, 32)
    for row, block in np.ndindex(7, 4):
        scale = 2.0 ** np.ceil(np.log2(np.abs(blocks[row, block]).max() / 6))
        grid = np.concatenate([-E2M1_VALUES, E2M1_VALUES]) * scale
        nearest = np.abs(blocks[row, block][:, None] - grid).min(axis=1)
        np.testing.assert_allclose(np.abs(decoded[row, block] - blocks[row, block]), nearest, atol=1e-6)
    with pytest.raises(ValueError, match="blocks of 32"):
        encode_rows(jnp.ones((2, 48)), E2M1, 32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fake_quant_is_idempotent_and_stored_exactly(dtype):
    rows = (jax.random.normal(jax.random.key(3), (50, 192)) * 3).astype(dtype)
    once = fake_quant_kv(rows, 64)
    np.testing.assert_array_equal(once[:, 128:], rows[:, 128:])
    np.testing.assert_array_equal(fake_quant_kv(once, 64), once)
    assert jnp.abs(once - rows).max() > 0
    codes, scales = encode_rows(once[:, :128], E4M3, 64)
    np.testing.assert_array_equal(decode_rows(codes, scales, dtype), once[:, :128])


def test_fake_quant_gradient_is_straight_through():
    rows = jax.random.normal(jax.random.key(4), (3, 64))
    gradient = jax.grad(lambda x: jnp.sum(fake_quant_index(x) * rows))(rows)
    np.testing.assert_allclose(gradient, hadamard(rows), atol=1e-6)


def test_zero_rows_stay_zero():
    np.testing.assert_array_equal(fake_quant_kv(jnp.zeros((2, 128)), 64), 0)
    np.testing.assert_array_equal(fake_quant_index(jnp.zeros((2, 64))), 0)
