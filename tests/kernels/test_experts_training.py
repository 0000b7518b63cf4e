"""Experts on many rows and their gradients: the TPU kernels, interpreted, and float64 sums written out.

Operands are small integers, so that every sum before a rounding is exact in float32, gate and up round the same
everywhere, and many of them lie on the bounds of the activation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.test_grouped_matmul import SIZES as ALL_SIZES
from v4_jax.kernels import choose
from v4_jax.kernels.experts import training
from v4_jax.kernels.grouped_matmul.groups import map_groups
from v4_jax.layers.experts import Experts, expert_ffn
from v4_jax.sharding.platform import interpreted

LIMIT = 3.0
HALF_STEP = 2.0**-8  # of bfloat16, of a value
FLOAT32 = 2.0**-19  # of the functions of gate and up, and of sums of a thousand
NAMES = ("some empty", "one has all", "first and last", "across tiles", "on tile edges", "no rows")
SIZES = {name: ALL_SIZES[name] for name in NAMES}


def case(count, sizes, depth, hidden):
    rng = np.random.default_rng(sum(sizes))

    def integers(*shape, most):
        return rng.integers(-most, most + 1, size=shape).astype(np.float32)

    groups = len(sizes)
    weights = [integers(groups, *s, most=1) / 8 for s in ((hidden, depth), (hidden, depth), (depth, hidden))]
    scale = rng.integers(0, 5, size=count).astype(np.float32) / 4
    return integers(count, depth, most=2), scale, weights, np.array(sizes, np.int32), integers(count, depth, most=2)


@jax.jit
def run(rows, scale, weights, sizes, gradient):
    rows, gradient = rows.astype(jnp.bfloat16), gradient.astype(jnp.bfloat16)
    kernel = functools.partial(training.forward, limit=LIMIT, interpret=True)
    pull = functools.partial(training.gradients, limit=LIMIT, interpret=True)
    return kernel(rows, scale, weights, sizes), pull(rows, scale, weights, sizes, gradient)


def inside(x, low, high):
    """The slope of a clip, which at a bound is half of that within."""
    return ((x >= low) * 1.0 + (x > low)) * ((x <= high) * 1.0 + (x < high)) / 4


def check(count, sizes, depth, hidden):
    """Results and gradients, each within its roundings to bfloat16: of what is summed, and of the sum."""
    rows, scale, weights, counts, gradient = case(count, sizes, depth, hidden)
    out, (of_rows, of_scale, of_weights) = run(rows, scale, weights, counts, gradient)
    own = np.repeat(np.arange(len(sizes)), sizes)
    used = len(own)
    x, s, g = (a[:used].astype(np.float64) for a in (rows, scale[:, None], gradient))
    w1, w3, w2 = (w.astype(np.float64) for w in weights)

    def times(a, weight):
        """Each row times its group's matrix."""
        found = [a[own == group] @ weight[group] for group in range(len(sizes))]
        return np.concatenate(found)

    def rounded(a):
        return np.asarray(jnp.asarray(a, jnp.float32).astype(jnp.bfloat16), np.float64)

    def near(found, expected, slack, *, steps):
        assert found.shape == expected.shape and np.isfinite(np.asarray(found, np.float64)).all()
        assert (abs(np.asarray(found, np.float64) - expected) <= slack * 1.01 + steps * abs(expected)).all()

    gate, up = (rounded(times(x, w.swapaxes(1, 2))) for w in (w1, w3))
    low, high = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
    sigmoid = 1 / (1 + np.exp(-low))
    active, through = low * sigmoid * high, times(g, w2)
    of_gate = through * s * high * sigmoid * (1 + low * (1 - sigmoid)) * inside(gate, -np.inf, LIMIT)
    of_up = through * s * low * sigmoid * inside(up, -LIMIT, LIMIT)
    spread = [HALF_STEP * abs(a) + FLOAT32 * abs(through) * LIMIT * 4 for a in (of_gate, of_up)]

    back = w2.swapaxes(1, 2)
    slack = (HALF_STEP + FLOAT32) * times(abs(active * s), abs(back))
    near(out[:used], times(active * s, back), slack, steps=HALF_STEP)
    slack = times(spread[0], abs(w1)) + times(spread[1], abs(w3))
    near(of_rows[:used], times(of_gate, w1) + times(of_up, w3), slack, steps=HALF_STEP)
    near(of_scale[:used], (through * active).sum(1), FLOAT32 * abs(through * active).sum(1), steps=0)
    for a in (out, of_rows, of_scale):
        assert (np.asarray(a, np.float32)[used:] == 0).all()

    pairs = [(of_gate, x, spread[0], abs(x)), (of_up, x, spread[1], abs(x))]
    pairs.append((g, active * s, abs(g), (HALF_STEP + FLOAT32) * abs(active * s)))
    for found, weight, (a, b, of_a, of_b) in zip(of_weights, weights, pairs, strict=True):
        assert found.dtype == jnp.float32
        for group in range(len(sizes)):
            mine = own == group
            near(found[group], a[mine].T @ b[mine], of_a[mine].T @ of_b[mine], steps=FLOAT32)
            assert found[group].shape == weight[group].shape


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_any_group_sizes(sizes):
    check(520, sizes, depth=128, hidden=384)


def test_large_groups():
    """Tiles of 256 rows, and of 512 where weights' gradients are summed; several strips of columns."""
    check(2100, [1333, 700], depth=128, hidden=512)


def test_fewer_rows_than_a_tile():
    check(3, [1, 0, 2], depth=128, hidden=128)


def test_several_tiles_of_columns(monkeypatch):
    monkeypatch.setattr(training, "WEIGHT_BYTES", 2**18)
    monkeypatch.setattr(training, "TILE", 128)
    jax.clear_caches()
    check(150, [100, 0, 33], depth=256, hidden=256)
    jax.clear_caches()


def test_training_takes_the_kernels_in_programs_for_tpus_alone(monkeypatch):
    """Elsewhere it is the loop over groups, number for number."""
    rows, scale, weights, sizes, gradient = case(20, [9, 0, 8], 128, 128)
    rows = jnp.asarray(rows, jnp.bfloat16)
    calls = []

    def one(rows, group):
        return expert_ffn(rows[0], Experts(group[0], group[2], group[1]), rows[1], LIMIT, jnp.bfloat16)

    def plain(rows, scale, weights, sizes, layer):
        return map_groups(one, (rows, scale), weights, sizes, layer=layer, width=128)

    def spy(*operands, **options):
        calls.append(options)
        return kernel(*operands, **options)

    kernel = training.gradients
    monkeypatch.setattr(training, "gradients", spy)

    def pulled(function):
        out, pull = jax.vjp(lambda *floats: function(*floats, jnp.asarray(sizes), None), rows, scale, weights)
        return out, pull(jnp.asarray(gradient, out.dtype))

    chosen = functools.partial(choose.many_rows_experts, plain, limit=LIMIT)
    expected, found = pulled(plain), pulled(chosen)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with interpreted():
        by_kernels = pulled(chosen)
    assert calls[-1]["interpret"]
    size = jax.tree.map(lambda a: float(abs(a.astype(jnp.float32)).max()) * 2.0**-5, expected)
    jax.tree.map(
        lambda a, b, most: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=most, rtol=0
        ),
        by_kernels,
        expected,
        size,
    )


def test_unsupported_is_refused_by_name():
    rows, weights = jnp.zeros((4, 192), jnp.bfloat16), [jnp.zeros((2, 128, 192))] * 2 + [jnp.zeros((2, 192, 128))]
    assert not training.supports(rows, weights)
    assert not training.supports(jnp.zeros((4, 128)), [jnp.zeros((2, 128, 128))] * 3)
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        training.forward(rows, jnp.zeros(4), weights, jnp.array([4, 0]), limit=LIMIT)
    with pytest.raises(ValueError, match="do not fit"):
        training.forward(rows[:, :128], jnp.zeros(4), [jnp.zeros((2, 128, 256))] * 3, jnp.array([4, 0]), limit=LIMIT)


def test_weights_are_rounded_as_a_conversion_does():
    """To the nearest, and to even where two are; of every exponent, and infinity."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 2**16, dtype=np.uint32)
    ties = (rng.integers(0, 2**16, 2**14, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, ties, [0x7F800000, 0xFF800000, 0, 0x80000000, 1]]).astype(np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    expected = jnp.asarray(values).astype(jnp.bfloat16)
    found = training._in_bfloat16(jnp.asarray(values))
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), np.asarray(expected).view(np.uint16))
