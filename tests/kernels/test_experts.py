"""The TPU kernel of whole experts, interpreted, against float64 with roundings where the layers round."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels import choose
from v4_jax.kernels.experts.tpu import ROWS, experts, supports
from v4_jax.kernels.stored_weights import SPREAD_ROWS
from v4_jax.layers.expert_parallelism import local_experts
from v4_jax.layers.experts import Experts, shared_expert
from v4_jax.number_formats import E2M1, E4M3, Stack, dequantise, quantise
from v4_jax.sharding.platform import interpreted

FORMATS = {"e2m1": E2M1, "e4m3": E4M3, "bfloat16": None}
LIMIT = 3.0  # low, so that both clamps are active
EXPERTS, DEPTH, HIDDEN = 5, 128, 256
NONE = EXPERTS
CHOICES = {  # of as many rows each
    "none here": [[NONE, NONE]] * 5,
    "some here": [[NONE, 4], [2, NONE], [NONE, NONE], [4, 2], [2, 4]],
    "all to one": [[2, NONE]] * 5,
    "far apart": [[0, 4], [4, 0], [NONE, 4], [-1, 0], [9, 4]],
}


def weights(form, *shape, seed=0):
    weight = jax.random.normal(jax.random.key(seed), shape)
    return weight.astype(jnp.bfloat16) if FORMATS[form] is None else quantise(weight, FORMATS[form])


def of_experts(form, *lead, depth=DEPTH, hidden=HIDDEN):
    """w1, w3 and w2."""
    shapes = ((hidden, depth), (hidden, depth), (depth, hidden))
    return [weights(form, *lead, *shape, seed=i) for i, shape in enumerate(shapes)]


def rows_of(count, depth=DEPTH):
    return (jax.random.normal(jax.random.key(7), (count, depth)) * 0.25).astype(jnp.bfloat16)


def interpret(function):
    """XLA:CPU's older emitters, which the tests use for speed, cannot reinterpret 4-bit elements; and it may leave out
    roundings, which kernels on TPUs do not."""
    options = {"xla_cpu_use_fusion_emitters": True, "xla_allow_excess_precision": False}
    return jax.jit(function, compiler_options=options)


@interpret
def run(x, assigned, scale, weights, layer=None):
    return experts(x, assigned, scale, weights, layer=layer, limit=LIMIT, interpret=True)


def bfloat16(values):
    return np.asarray(jnp.asarray(values, jnp.float32).astype(jnp.bfloat16), np.float64)


def check(out, x, assigned, scale, weights):
    """Within two steps of bfloat16 of what each expert gives, for where a sum lies near the border of two roundings.

    The products before err by float32 alone and are rounded as here, but for those at a border, which then differ by
    a step: 2^-7 of one hidden activation, a small part of a sum over all of them.
    """
    x, (w1, w3, w2) = np.asarray(x, np.float64), [np.asarray(dequantise(w, jnp.float32), np.float64) for w in weights]
    expected, bound = np.zeros((2, *x.shape))
    for t, k in np.ndindex(*assigned.shape):
        e = int(assigned[t, k])
        if not 0 <= e < len(w1):
            continue
        gate, up = bfloat16(w1[e] @ x[t]), bfloat16(w3[e] @ x[t])
        low = np.minimum(gate, LIMIT)
        hidden = bfloat16(low / (1 + np.exp(-low)) * np.clip(up, -LIMIT, LIMIT) * float(scale[t, k]))
        one = w2[e] @ hidden
        expected[t] += bfloat16(one)
        bound[t] += 2.0**-7 * abs(one) + 2.0**-7 * np.max(abs(w2[e] * hidden), axis=1)
    assert out.dtype == jnp.float32
    assert (abs(np.asarray(out, np.float64) - expected) <= bound).all()


def scales_of(assigned):
    return jax.random.uniform(jax.random.key(9), assigned.shape, minval=0.1)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_any_choices(form, choices):
    assigned = jnp.array(choices, jnp.int32)
    case = rows_of(len(assigned)), assigned, scales_of(assigned), of_experts(form, EXPERTS)
    out = run(*case)
    check(out, *case)
    nobody = np.all((np.asarray(assigned) < 0) | (np.asarray(assigned) >= EXPERTS), axis=1)
    assert (np.asarray(out)[nobody] == 0).all()


@pytest.mark.parametrize("form", ["e2m1", "e4m3"])
@pytest.mark.parametrize(("depth", "hidden"), [(384, 1280), (128, 4096), (256, 4096)])
def test_any_width_and_depth(form, depth, hidden):
    """Several tiles of one width and of the other, tiles that are not whole strips, scales across lanes and along."""
    assigned = jnp.array([[2, 0, 1]], jnp.int32)
    case = rows_of(1, depth), assigned, scales_of(assigned), of_experts(form, 3, depth=depth, hidden=hidden)
    check(run(*case), *case)


@pytest.mark.parametrize("rows", [1, SPREAD_ROWS, SPREAD_ROWS + 1])
def test_few_rows_and_more(rows):
    """Rows that are spread over eight, up to the most, and one more, which are not; several runs of blocks."""
    assigned = jax.random.randint(jax.random.key(4), (rows, 1), 0, 2)
    case = rows_of(rows, 768), assigned, scales_of(assigned), of_experts("e2m1", 2, depth=768, hidden=256)
    check(run(*case), *case)


def test_as_many_rows_as_can_be():
    all_of_them = jnp.tile(jnp.arange(EXPERTS + 1), (ROWS, 1))
    assigned = jax.random.permutation(jax.random.key(1), all_of_them, 1, independent=True)[:, :3]
    case = rows_of(ROWS), assigned, scales_of(assigned), of_experts("e4m3", EXPERTS)
    check(run(*case), *case)


@pytest.mark.parametrize("form", ["e2m1", "e4m3"])
def test_stacked_layers_read_the_named_layer(form):
    x, assigned = rows_of(4), jnp.array([[0, 1], [1, NONE], [0, 1], [1, 0]], jnp.int32)
    stack, scale = of_experts(form, 3, 2), scales_of(assigned)
    for layer in range(3):
        own = jax.tree.map(lambda w, layer=layer: w[layer], stack)
        check(run(x, assigned, scale, stack, jnp.int32(layer)), x, assigned, scale, own)


def test_rows_are_independent():
    """A row that overflows spoils no other, though experts that it did not choose are applied to it too."""
    assigned = jnp.array([[0, NONE], [1, NONE], [0, NONE], [1, 0], [1, 2]], jnp.int32)
    x, scale, own = rows_of(5), scales_of(assigned), of_experts("e4m3", EXPERTS)
    spoilt = run(x.at[0].set(jnp.inf), assigned, scale, own)
    np.testing.assert_array_equal(spoilt[1:], run(x, assigned, scale, own)[1:])


def test_chosen_for_few_rows_on_tpus():
    """What layers call: one kernel for few tokens, and one for each product of many."""
    w1, w3, w2 = of_experts("e2m1", EXPERTS)
    assigned = jnp.array(CHOICES["some here"], jnp.int32)
    case = rows_of(5), assigned, scales_of(assigned)

    def local(*case):
        return local_experts(*case, Experts(w1, w2, w3), None, count=EXPERTS, limit=LIMIT)

    with interpreted():
        assert str(jax.make_jaxpr(local)(*case)).count("pallas_call") == 1
        check(interpret(local)(*case), *case, [w1, w3, w2])
        more = [jnp.repeat(array, 30, axis=0) for array in case]
        assert str(jax.make_jaxpr(local)(*more)).count("pallas_call") == 3


@pytest.mark.parametrize("count", [5, 40], ids=["few tokens", "visits of some"])
def test_what_comes_beside_is_added(count):
    """In float32, after all experts."""
    w1, w3, w2 = of_experts("e2m1", EXPERTS)
    assigned = jnp.arange(2 * count).reshape(count, 2) % (EXPERTS + 1)
    case, beside = (rows_of(count), assigned, scales_of(assigned)), jnp.ones((count, DEPTH)) / 3

    def run(beside):
        def local(*case):
            return local_experts(*case, Experts(w1, w2, w3), None, beside, count=EXPERTS, limit=LIMIT)

        return interpret(local)(*case)

    np.testing.assert_array_equal(run(beside), run(None) + beside)
    with interpreted():
        np.testing.assert_array_equal(run(beside), run(None) + beside)


def test_the_shared_expert_is_read_in_its_stack():
    """All rows visit it, with nothing to weigh it by."""
    stacks = of_experts("e4m3", 3)
    x, everyone = rows_of(6), (6, 1)

    def run(x, own, layer):
        w1, w3, w2 = (
            one.replace(stack=Stack(stack.codes, stack.scales, layer)) for one, stack in zip(own, stacks, strict=True)
        )
        return shared_expert(x, Experts(w1, w2, w3), LIMIT, jnp.bfloat16)

    run = interpret(run)
    for layer in range(3):
        own = jax.tree.map(lambda w, layer=layer: w[layer], stacks)
        with interpreted():
            out = run(x, own, jnp.int32(layer))
        check(out, x, jnp.zeros(everyone, jnp.int32), jnp.ones(everyone), jax.tree.map(lambda w: w[None], own))


def test_gradients_take_the_plain_form():
    """A kernel without a gradient does not stand in the way of training."""
    x, assigned = rows_of(2), jnp.array([[0], [1]], jnp.int32)
    own, scale = of_experts("bfloat16", 2), scales_of(assigned)

    def plain(x, assigned, scale, weights, layer, beside):
        return jnp.sum(scale, axis=1, keepdims=True) * x.astype(jnp.float32)

    def loss(scale):
        return jnp.sum(choose.few_rows_experts(plain, x, assigned, scale, own, None, limit=LIMIT))

    with interpreted():
        np.testing.assert_allclose(jax.grad(loss)(scale)[:, 0], jnp.sum(x.astype(jnp.float32), axis=1), rtol=1e-6)


def test_unsupported_is_refused_by_name():
    x, assigned = rows_of(ROWS + 1), jnp.zeros((ROWS + 1, 1), jnp.int32)
    own = of_experts("e4m3", 1)
    assert not supports(x, own) and supports(x[1:], own)
    assert not supports(x[1:].astype(jnp.float32), own)
    with pytest.raises(NotImplementedError, match=f"at most {ROWS} rows"):
        experts(x, assigned, jnp.ones(assigned.shape), own, limit=LIMIT)
    with pytest.raises(ValueError, match="does not fit"):
        experts(rows_of(2, 256), assigned[:2], jnp.ones((2, 1)), own, limit=LIMIT)


@pytest.mark.parametrize("rows", [SPREAD_ROWS + 1, 70, ROWS])
def test_rows_in_visits(rows):
    """Experts that few of the rows chose, all of them, and none; as many visits as it takes."""
    key = jax.random.key(6)
    assigned = jax.random.permutation(key, jnp.tile(jnp.arange(1, EXPERTS + 1), (rows, 1)), 1, independent=True)[:, :2]
    assigned = jnp.concatenate([jnp.zeros((rows, 1), jnp.int32), jnp.where(assigned == 2, NONE, assigned)], axis=1)
    case = rows_of(rows, 256), assigned, scales_of(assigned), of_experts("e2m1", EXPERTS, depth=256, hidden=256)
    check(run(*case), *case)


def test_rows_of_visits_are_independent():
    """One that is not finite is told, and spoils no other: neither as it comes nor by what an expert makes of it."""
    rows = SPREAD_ROWS + 3
    assigned = jnp.stack([jnp.arange(rows) % 2, jnp.full(rows, 2)], axis=1).astype(jnp.int32)
    x, scale = rows_of(rows, 256), scales_of(assigned)
    own = of_experts("e2m1", 3, depth=256, hidden=256)
    expected = run(x, assigned, scale, own)
    spoiled = run(x.at[3, 5].set(jnp.nan).at[7].set(jnp.inf), assigned, scale.at[11, 1].set(jnp.inf), own)
    bad = np.isin(np.arange(rows), [3, 7, 11])
    assert not np.isfinite(spoiled[bad]).all(axis=1).any()
    np.testing.assert_array_equal(spoiled[~bad], expected[~bad])
