"""The boundary between two sublayers: the TPU kernel against the reference, and both against float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels import choose
from v4_jax.kernels.hyper_connections import gradients, reference, tpu
from v4_jax.kernels.hyper_connections.reference import Numbers, Site
from v4_jax.sharding.platform import interpreted

NUMBERS = Numbers(streams=4, norm_eps=1e-6, eps=1e-6, iterations=20)
HC = NUMBERS.streams
GATES = HC + HC * HC


def inputs(batch, size, channels, seed=0):
    """Streams, output, mix as a site makes it, and the next site."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    streams = jax.random.normal(next(keys), (batch, size, HC * channels)).astype(jnp.bfloat16)
    output = jax.random.normal(next(keys), (batch, size, channels)).astype(jnp.bfloat16)
    weight = jax.random.normal(next(keys), (HC + GATES, HC * channels)) * (HC * channels) ** -0.5
    base, norm = jax.random.normal(next(keys), (HC + GATES,)), jax.random.uniform(next(keys), (channels,), minval=0.5)
    site = Site(weight, base, jnp.array([0.7, -0.9, 1.1]), norm)
    return streams, output, jax.random.uniform(next(keys), (GATES, batch, size)), site


def exact(streams, output, mix, site):
    """The boundary in float64: new streams, normed input, mix. The kernel's roundings are not repeated."""
    x, z, mix = (np.asarray(a, np.float64) for a in (streams, output, mix))
    x = x.reshape(*x.shape[:2], HC, -1)
    new = np.einsum("kbs,bsd->bskd", mix[:HC], z)
    new += np.einsum("jkbs,bsjd->bskd", mix[HC:].reshape(HC, HC, *mix.shape[1:]), x)
    weight, base, scale, norm = (np.asarray(a, np.float64) for a in site)
    flat = new.reshape(*new.shape[:2], -1)
    mixes = np.einsum("bsd,md->mbs", flat, weight) / np.sqrt((flat**2).mean(-1) + 1e-6)
    mixes = mixes * np.repeat(scale, (HC, HC, HC * HC))[:, None, None] + base[:, None, None]
    sigmoid = 1 / (1 + np.exp(-mixes[: 2 * HC]))
    matrix = mixes[2 * HC :].reshape(HC, HC, *mixes.shape[1:])
    matrix = np.exp(matrix - matrix.max(1, keepdims=True))
    matrix = matrix / matrix.sum(1, keepdims=True) + 1e-6
    matrix /= matrix.sum(0, keepdims=True) + 1e-6
    for _ in range(NUMBERS.iterations - 1):
        matrix /= matrix.sum(1, keepdims=True) + 1e-6
        matrix /= matrix.sum(0, keepdims=True) + 1e-6
    y = np.einsum("kbs,bskd->bsd", sigmoid[:HC] + 1e-6, new)
    y *= norm / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    return flat, y, np.concatenate([2 * sigmoid[HC:], matrix.reshape(HC * HC, *matrix.shape[2:])])


@pytest.mark.parametrize("form", [reference.cross, lambda *x: tpu.cross(*x, interpret=True)], ids=["reference", "tpu"])
@pytest.mark.parametrize(("batch", "size"), [(1, 1), (3, 1), (1, 7), (2, 65), (1, 200)])
def test_crossing(form, batch, size):
    """Streams are rounded once; what is computed of them is off by what that makes of a random sum."""
    given = inputs(batch, size, 128)
    for found, expected, unit in zip(form(*given, NUMBERS), exact(*given), (2**-8, 2**-7, 2**-8), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=unit, atol=unit)


@pytest.mark.parametrize(("batch", "size", "channels"), [(1, 1, 256), (2, 5, 384), (1, 130, 128)])
def test_entering_and_leaving(batch, size, channels):
    """Both forms round at the same places: gates differ by float32's rounding, streams and inputs by one bfloat16."""
    streams, output, mix, site = inputs(batch, size, channels)
    same, y, after = tpu.enter(streams, site, NUMBERS, interpret=True)
    expected_same, expected_y, expected_after = reference.enter(streams, site, NUMBERS)
    assert jnp.all(same == streams) and jnp.all(expected_same == streams)
    np.testing.assert_allclose(after, expected_after, rtol=2e-5, atol=2e-6)
    close(y, expected_y)
    close(tpu.leave(streams, output, mix, NUMBERS, interpret=True), reference.leave(streams, output, mix, NUMBERS))


def close(found, expected):
    assert found.dtype == expected.dtype == jnp.bfloat16 and found.shape == expected.shape
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-5)
    assert np.mean(found != expected) < 0.02


def test_a_crossing_is_leaving_and_entering():
    streams, output, mix, site = inputs(1, 9, 128)
    new, y, after = tpu.cross(streams, output, mix, site, NUMBERS, interpret=True)
    left = tpu.leave(streams, output, mix, NUMBERS, interpret=True)
    entered = tpu.enter(left, site, NUMBERS, interpret=True)
    for found, expected in zip((new, y, after), entered, strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def test_tokens_do_not_meet():
    """A token is as it is alone, and one that is not finite spoils no other."""
    streams, output, mix, site = inputs(1, 20, 128)
    streams = streams.at[0, 3].set(jnp.nan)
    found = tpu.cross(streams, output, mix, site, NUMBERS, interpret=True)
    alone = tpu.cross(streams[:, 5:6], output[:, 5:6], mix[..., 5:6], site, NUMBERS, interpret=True)
    for x, one, axis in zip(found, alone, (1, 1, 2), strict=True):
        kept = np.delete(np.asarray(x, np.float32), 3, axis=axis)
        assert np.isfinite(kept).all()
        np.testing.assert_allclose(np.asarray(x, np.float32).take([5], axis), np.asarray(one, np.float32), rtol=2**-7)


def test_what_the_kernel_does_not_take_goes_to_the_reference():
    streams, _, _, site = inputs(1, 3, 96)
    assert not tpu.supports(streams, NUMBERS) and not tpu.supports(streams.astype(jnp.float32), NUMBERS)
    np.testing.assert_array_equal(
        np.asarray(choose.enter_site(streams, site, NUMBERS)[2]), np.asarray(reference.enter(streams, site, NUMBERS)[2])
    )


def test_gradients_are_the_references():
    streams, output, mix, site = inputs(1, 5, 128)

    def total(form):
        return lambda *x: sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in form(*x, NUMBERS))

    found = jax.grad(total(choose.cross_sites), argnums=(0, 1, 2, 3))(streams, output, mix, site)
    expected = jax.grad(total(reference.cross), argnums=(0, 1, 2, 3))(streams, output, mix, site)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("name", ["enter", "leave", "cross"])
@pytest.mark.parametrize(("batch", "size", "channels"), [(1, 128, 256), (2, 192, 128)])
def test_gradients_by_kernels(name, batch, size, channels):
    """The reference rounds a gradient of bfloat16 arrays at every sum, the kernels once; parameters' are float32."""
    given = inputs(batch, size, channels)
    given = {"enter": (given[0], given[3]), "leave": given[:3], "cross": given}[name]
    assert gradients.supports(given[0], NUMBERS)
    form = functools.partial(getattr(reference, name), numbers=NUMBERS)
    out, pull = jax.vjp(form, *given)
    probe = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape).astype(x.dtype), out)
    found = getattr(gradients, name)(*given, probe, NUMBERS, interpret=True)
    parameters = len(jax.tree.leaves(given[3:] if name == "cross" else given[1:])) if name != "leave" else 0
    pairs = list(zip(*map(jax.tree.leaves, (given, found, pull(probe))), strict=True))
    for number, (like, one, other) in enumerate(pairs):
        assert one.shape == like.shape and one.dtype == like.dtype
        unit = (2**-6 if name == "cross" else 2**-7) if number < len(pairs) - parameters else 2e-3
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=unit, atol=unit * np.sqrt(np.mean(other**2)))


def test_which_gradients_are_by_kernels():
    """On TPUs those of whole blocks of tokens; a model's are then the kernels', through `choose`."""
    streams, output, mix, site = inputs(1, 128, 128)
    assert not gradients.supports(streams[:, :100], NUMBERS)
    with interpreted():
        out, pull = jax.vjp(lambda *x: choose.cross_sites(*x, NUMBERS), streams, output, mix, site)
        found = pull(out)
    expected = gradients.cross(streams, output, mix, site, out, NUMBERS, interpret=True)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
