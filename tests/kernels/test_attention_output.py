"""The end of attention's softmax, turned back: the TPU kernel, interpreted, and plain JAX; also on parts of devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels.attention.reference import MASKED
from v4_jax.kernels.output import few, gradients, tpu
from v4_jax.layer_stack import Cut
from v4_jax.layers.partial_softmax import attend, finish, merge
from v4_jax.layers.partials import Packed, Partial, packed, separate
from v4_jax.layers.rotary import turn
from v4_jax.layers.window_attention import attention_end, output_in_parts
from v4_jax.number_formats import E4M3, Stack, dequantise, quantise

C = 128


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def softmax(seed, rows, queries, heads):
    """Of some keys; the first query sees none of them."""
    values = normal(seed, rows, queries, heads, C)
    keys, mask = normal(seed + 1, rows, 9, C), jnp.ones((rows, queries, 9), bool).at[:, 0].set(False)
    return attend(values, keys, mask)


@pytest.mark.parametrize(("rows", "queries", "heads"), [(1, 1, 8), (3, 2, 24), (2, 17, 8)])
@pytest.mark.parametrize("devices", [0, 1, 4])
def test_parts_of_devices(rows, queries, heads, devices):
    """A window, and what other devices saw, each in one array: as all of them merged."""
    window, *others = (softmax(10 * i, rows, queries, heads) for i in range(devices + 1))
    sink = normal(5, heads)
    positions = jnp.arange(rows * queries, dtype=jnp.int32).reshape(rows, queries)
    turned = turn(positions, np.geomspace(1, 1e-3, 32).astype(np.float32))
    partials = [window, Packed(jnp.stack([packed(x) for x in others]))] if others else [window]
    exact = np.asarray(output_in_parts([window, *others], sink, turned, jnp.float32), np.float64)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2.0**-7)):
        for form in (output_in_parts, functools.partial(tpu.attention_output, interpret=True)):
            found = form(partials, sink, turned, dtype)
            assert found.dtype == dtype and found.shape == (rows, queries, heads * C)
            np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("rows", "queries", "heads", "parts", "dtype"),
    [(2, 37, 24, 1, "bfloat16"), (1, 9, 8, 3, "bfloat16"), (2, 5, 16, 2, "float32")],
)
@pytest.mark.parametrize("how", ["kernel", "plain"])
def test_gradients_against_float64(rows, queries, heads, parts, dtype, how):
    """Within the roundings of what comes in, to the output's dtype; one query of the first part sees nothing."""
    partials = [softmax(10 * i, rows, queries, heads) for i in range(parts)]
    sink, given = normal(5, heads), normal(6, rows, queries, heads * C).astype(dtype)
    positions = jnp.arange(rows * queries, dtype=jnp.int32).reshape(rows, queries)
    turned = turn(positions, np.geomspace(1, 1e-3, 32).astype(np.float32))
    if how == "kernel":
        run = jax.jit(lambda *operands: gradients.gradients(*operands, interpret=True))
        of_partials, of_sink = run(partials, sink, turned, given)
    else:

        def plain(partials, sink):
            held = [Partial(jax.lax.stop_gradient(x.maximum), x.total, x.weighted) for x in partials]
            return output_in_parts(held, sink, turned, jnp.dtype(dtype))

        of_partials, of_sink = jax.vjp(plain, partials, sink)[1](given)

    g = np.asarray(given, np.float64).reshape(rows, queries, heads, C)
    cos, sin = (np.asarray(part, np.float64)[:, :, None] for part in turned)
    tail = g[..., -64:]
    partner = tail.reshape(*tail.shape[:-1], 32, 2)[..., ::-1].reshape(tail.shape)
    g = np.concatenate([g[..., :-64], tail * cos + partner * sin], axis=-1)
    maxima, totals, sums = (np.stack([np.asarray(x[i], np.float64) for x in partials]) for i in range(3))
    sinks = np.asarray(sink, np.float64)
    largest = np.maximum(maxima.max(0), sinks)
    shares, of_sinks = np.exp(maxima - largest), np.exp(sinks - largest)
    denominator = (totals * shares).sum(0) + of_sinks
    factors = shares / denominator
    along = np.einsum("bqhc,nbqhc,nbqh->bqh", g, sums, factors) / denominator
    size = np.einsum("bqhc,nbqhc,nbqh->bqh", abs(g), abs(sums), factors) / denominator
    bound = 2 * float(jnp.finfo(dtype).eps) + 256 * float(jnp.finfo(jnp.float32).eps)
    for i, found in enumerate(of_partials):
        assert not found.maximum.any()
        for one, expected, terms in (
            (found.total, -shares[i] * along, shares[i] * size),
            (found.weighted, g * factors[i][..., None], abs(g) * factors[i][..., None]),
        ):
            large = np.broadcast_to(terms.max(-1, keepdims=True), terms.shape) if one.ndim == 4 else terms
            assert (abs(np.asarray(one, np.float64) - expected) <= bound * large).all()
    expected, terms = ((of_sinks * x).sum((0, 1)) for x in (-along, size))
    assert (abs(np.asarray(of_sink, np.float64) - expected) <= bound * terms).all()


def test_packing_loses_nothing():
    one = softmax(0, 2, 3, 8)
    (again,) = separate([Packed(packed(one)[None])])
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert float(again.maximum[0, 0, 0]) == np.float32(MASKED) and float(again.total[0, 0, 0]) == 0
    alone = finish(functools.reduce(merge, separate([one, Packed(packed(one)[None])])), jnp.full(8, -jnp.inf))
    np.testing.assert_allclose(alone[:, 1:], finish(one, jnp.full(8, -jnp.inf))[:, 1:], rtol=1e-6)


@pytest.mark.parametrize(("rows", "queries", "heads", "groups", "devices"), [(1, 1, 8, 1, 4), (2, 3, 16, 2, 0)])
@pytest.mark.parametrize("stacked", [False, True])
def test_both_products(rows, queries, heads, groups, devices, stacked):
    """The kernel that goes on to the end of the sublayer, against plain JAX in float64 bounds."""
    window, *others = (softmax(10 * i, rows, queries, heads) for i in range(devices + 1))
    partials = [window, Packed(jnp.stack([packed(x) for x in others]))] if others else [window]
    positions = jnp.arange(rows * queries, dtype=jnp.int32).reshape(rows, queries)
    turned, sink = turn(positions, np.geomspace(1, 1e-3, 32).astype(np.float32)), normal(5, heads)
    sizes = (groups * 256, heads * C // groups), (384, groups * 256)
    stacks = [quantise(normal(20 + i, 2, *size) / 16, E4M3) for i, size in enumerate(sizes)]
    weights = [jax.tree.map(lambda x: x[1], stack) for stack in stacks]
    exact = np.asarray(output_in_parts(partials, sink, turned, jnp.bfloat16), np.float64)
    exact = exact.reshape(rows, queries, groups, -1)
    first, second = (np.asarray(dequantise(weight, jnp.float32), np.float64) for weight in weights)
    middle = np.einsum("bqgi,goi->bqgo", exact, first.reshape(groups, 256, -1)).reshape(rows, queries, -1)
    expected = middle @ second.T

    assert few.supports(partials, turned, weights, groups, jnp.bfloat16)
    given, own = weights, sink
    if stacked:
        own = Cut(jnp.zeros_like(sink), jnp.stack([jnp.zeros_like(sink), sink]), jnp.int32(1))
        given = [
            jax.tree.map(jnp.zeros_like, weight).replace(stack=Stack(stack.codes, stack.scales, jnp.int32(1)))
            for weight, stack in zip(weights, stacks, strict=True)
        ]
    found = few.attention_end(partials, own, turned, given, groups=groups, dtype=jnp.bfloat16, interpret=True)
    plain = attention_end(partials, sink, turned, tuple(weights), groups=groups, dtype=jnp.bfloat16)
    unit = 2.0**-7 * (abs(middle) @ abs(second).T + abs(expected))  # rounded before the second product, and after
    for one in (found, plain):
        assert one.shape == (rows, queries, 384) and one.dtype == jnp.bfloat16
        assert (abs(np.asarray(one, np.float64) - expected) <= unit).all()
