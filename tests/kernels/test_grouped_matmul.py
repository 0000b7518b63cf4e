"""The TPU kernel, interpreted, and its reference: a float64 product with the expanded weights; every code exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels import choose
from v4_jax.kernels.grouped_matmul import reference
from v4_jax.kernels.grouped_matmul.groups import map_groups
from v4_jax.kernels.grouped_matmul.tpu import grouped_matmul
from v4_jax.kernels.stored_weights import E5M2_RANGE, supports
from v4_jax.layers.expert_parallelism import _sorted_experts
from v4_jax.layers.experts import Experts, expert_ffn
from v4_jax.layers.linear import linear
from v4_jax.number_formats import E2M1, E4M3, E8M0, FP4_BLOCK, BlockScaled, dequantise, quantise
from v4_jax.sharding.platform import interpreted

FORMATS = {"e2m1": E2M1, "e4m3": E4M3, "bfloat16": None}
SIZES = {  # tiles are of 128 rows
    "some empty": [5, 0, 1, 7, 0, 3],
    "one has all": [0, 0, 520, 0, 0, 0],
    "first and last": [20, 0, 0, 0, 0, 17],
    "across tiles": [127, 129, 128, 1, 100, 30],
    "on tile edges": [128, 256, 0, 128, 0, 0],
    "several tiles each": [150, 3, 0, 201, 64, 90],
    "no row to spare": [129, 127, 8, 0, 0, 256],
    "one row each": [1, 1, 1, 1, 1, 1],
    "one row": [0, 0, 0, 0, 1, 0],
    "no rows": [0, 0, 0, 0, 0, 0],
}


def weights(form, *shape, seed=0):
    weight = jax.random.normal(jax.random.key(seed), shape)
    return weight.astype(jnp.bfloat16) if FORMATS[form] is None else quantise(weight, FORMATS[form])


def rows_of(count, depth, seed=1):
    return jax.random.normal(jax.random.key(seed), (count, depth)).astype(jnp.bfloat16)


def interpret(function):
    """XLA:CPU's older emitters, which the tests use for speed, cannot reinterpret 4-bit elements."""
    return jax.jit(function, compiler_options={"xla_cpu_use_fusion_emitters": True})


@interpret
def run(rows, weight, sizes, layer=None):
    return grouped_matmul(rows, weight, sizes, layer=layer, interpret=True)


BOTH = pytest.mark.parametrize("product", [run, jax.jit(reference.grouped_matmul)], ids=["kernel", "reference"])


def check(out, rows, weight, sizes):
    """Within what bfloat16 output and float32 sums allow.

    Half a step of bfloat16 is 2^-8 of the value; K float32 additions err by at most K 2^-24 of the sum of magnitudes.
    """
    used = sum(sizes)
    group = np.repeat(np.arange(len(sizes)), sizes)
    x = np.asarray(rows[:used], np.float64)
    w = np.asarray(dequantise(weight, jnp.float32), np.float64)
    expected = np.stack([w[g] @ row for g, row in zip(group, x, strict=True)]) if used else np.zeros((0, w.shape[1]))
    sums = np.stack([abs(w[g]) @ abs(row) for g, row in zip(group, x, strict=True)]) if used else expected
    bound = 2.0**-8 * abs(expected) + (1 + 2.0**-8) * x.shape[1] * 2.0**-24 * sums
    assert out.dtype == jnp.bfloat16
    out = np.asarray(out, np.float64)
    assert (abs(out[:used] - expected) <= bound).all()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@BOTH
def test_any_group_sizes(form, sizes, product):
    rows, weight = rows_of(520, 256), weights(form, len(sizes), 128, 256)
    check(product(rows, weight, jnp.array(sizes)), rows, weight, sizes)


@pytest.mark.parametrize("form", FORMATS)
def test_large_groups(form):
    """Tiles of 256 rows."""
    sizes = [700, 500]
    rows, weight = rows_of(1201, 128), weights(form, 2, 128, 128)
    check(run(rows, weight, jnp.array(sizes)), rows, weight, sizes)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("width", "depth"), [(640, 128), (1024, 128), (256, 1152), (128, 4096), (128, 4608)])
def test_any_width_and_depth(form, width, depth):
    """Tiles, strips and chunks of all sizes; scales that fill the lanes, fall short of them and exceed them."""
    sizes = [7, 0, 12]
    rows, weight = rows_of(19, depth), weights(form, 3, width, depth)
    check(run(rows, weight, jnp.array(sizes)), rows, weight, sizes)


@pytest.mark.parametrize("form", FORMATS)
def test_fewer_rows_than_a_tile_and_none_spare(form):
    rows, weight = rows_of(3, 128), weights(form, 8, 128, 128)
    sizes = [0, 1, 0, 0, 2, 0, 0, 0]
    check(run(rows, weight, jnp.array(sizes)), rows, weight, sizes)


@pytest.mark.parametrize("form", FORMATS)
@BOTH
def test_stacked_layers_read_the_named_layer(form, product):
    rows, stack = rows_of(20, 128), weights(form, 3, 4, 128, 128)
    sizes = [4, 0, 9, 3]
    for layer in range(3):
        check(
            product(rows, stack, jnp.array(sizes), layer=jnp.int32(layer)),
            rows,
            jax.tree.map(lambda x, layer=layer: x[layer], stack),
            sizes,
        )


@BOTH
def test_every_code_and_scale_decodes_exactly(product):
    """Rows of the identity read the weight itself: E2M1 is exact in bfloat16, with any scale that bfloat16 can hold."""
    exponents = np.array([-125, -124, -60, -7, -1, 0, 1, 7, 60, 124])
    codes = np.tile(np.arange(16), (2 * len(exponents), 8)).astype(np.uint8)  # [20, 128], all codes in each block
    codes = np.pad(codes, ((0, 128 - len(codes)), (0, 0)))
    scales = np.ones((128, 4), np.float32)
    scales[: 2 * len(exponents)] = np.ldexp(1.0, np.repeat(exponents, 2))[:, None]
    scales[: 2 * len(exponents), 2:] = 2.0**3  # neighbours along the inputs differ
    weight = BlockScaled(
        jax.lax.bitcast_convert_type(jnp.asarray(codes).astype(jnp.uint4), E2M1)[None],
        jnp.asarray(scales).astype(E8M0)[None],
        FP4_BLOCK,
    )
    out = product(jnp.eye(128, dtype=jnp.bfloat16), weight, jnp.array([128]))
    expected = np.asarray(dequantise(weight, jnp.float32))[0].T
    assert len(np.unique(abs(expected[:, 10]))) > 4
    np.testing.assert_array_equal(np.asarray(out, np.float32), expected)


@pytest.mark.parametrize("depth", [128, 4096])  # scales across the lanes, and along them
@pytest.mark.parametrize("binades", [E5M2_RANGE, E5M2_RANGE + 1])
def test_scales_as_far_apart_as_e5m2_allows_and_farther(binades, depth):
    """Every code under every scale, exactly, of scales within E5M2's range of one another, and of more."""
    size = 128
    exponents = np.arange(size * depth // 32).reshape(size, depth // 32) % (binades + 1) - 20
    codes = (np.arange(depth) + np.arange(size)[:, None]) % 16
    weight = BlockScaled(
        jax.lax.bitcast_convert_type(jnp.asarray(codes.astype(np.uint8)).astype(jnp.uint4), E2M1)[None],
        jnp.asarray(np.ldexp(np.float32(1), exponents)).astype(E8M0)[None],
        FP4_BLOCK,
    )
    expected = np.asarray(dequantise(weight, jnp.float32))[0].T
    assert len(np.unique(abs(expected))) >= binades + 4
    first = 0 if depth == size else depth // 2
    rows = jnp.eye(depth, dtype=jnp.bfloat16)[first : first + size]
    found = run(rows, weight, jnp.array([size]))
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected[first : first + size])


@pytest.mark.parametrize("form", FORMATS)
def test_experts_as_in_the_loop_over_groups(form):
    """The whole feed-forward, within a step of bfloat16 at the largest output: XLA:CPU leaves out roundings between."""
    experts = Experts(*(weights(form, 4, *s, seed=i) for i, s in enumerate([(256, 128), (128, 256), (256, 128)])))
    sizes = jnp.array([9, 0, 3, 20])
    rows = (rows_of(34, 128) * 0.25, jax.random.uniform(jax.random.key(3), (34,)))

    def one(rows, group):
        return expert_ffn(rows[0], group, rows[1], 10.0, jnp.bfloat16)

    def products(x, weights, dtype):
        return [run(x.astype(dtype), weight, sizes) for weight in weights]

    used = int(sum(sizes))
    found = expert_ffn(rows[0], experts, rows[1], 10.0, jnp.bfloat16, products)[:used]
    expected = map_groups(one, rows, experts, sizes, width=128)[:used]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-7 * float(abs(expected).max()))


@pytest.mark.parametrize("nobody", [0.4, 1.0])
def test_rows_of_nobody(nobody):
    """What the kernel leaves in them reaches no token: choices of no expert here count for nothing."""
    experts = Experts(*(weights("e2m1", 4, *s, seed=i) for i, s in enumerate([(256, 128), (128, 256), (256, 128)])))
    rng = np.random.default_rng(0)
    assigned = jnp.asarray(np.where(rng.random((150, 2)) < nobody, 4, rng.integers(0, 4, (150, 2))), jnp.int32)
    x, share = rows_of(150, 128) * 0.25, jnp.asarray(rng.random((150, 2)), jnp.float32)

    def call(*rows):  # traced for one platform, then for the other
        return interpret(lambda *x: _sorted_experts(*x, experts, None, count=4, limit=10.0))(*rows)

    expected = call(x, assigned, share)
    with interpreted():
        found = call(x, assigned, share)
    assert not expected[(assigned == 4).all(1)].any() and (assigned == 4).all(1).any()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-7 * float(abs(expected).max()))


def test_unsupported_is_refused_by_name():
    rows, weight = rows_of(4, 192), weights("e2m1", 2, 128, 192)
    assert not supports(weight, jnp.bfloat16)
    assert not supports(weights("e2m1", 2, 128, 128), jnp.float32)
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        grouped_matmul(rows, weight, jnp.array([4, 0]))


def test_gradients_take_the_loop_over_groups():
    """A kernel without a gradient does not stand in the way of training."""
    rows, weight = rows_of(8, 128).astype(jnp.float32), jax.random.normal(jax.random.key(0), (2, 128, 128))
    sizes = jnp.array([3, 4])

    def loss(rows, kernel):
        out = choose.map_groups(lambda x, w: linear(x, w, jnp.float32), rows, weight, sizes, width=128, kernel=kernel)
        return jnp.sum(out**2)

    def kernel(rows, weight, sizes, layer):
        del layer
        out = grouped_matmul(rows.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), sizes)
        return out.astype(jnp.float32)

    np.testing.assert_array_equal(jax.grad(loss)(rows, kernel), jax.grad(loss)(rows, None))
