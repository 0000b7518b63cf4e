"""Gradients of norm and rotation by the TPU kernel, interpreted, and by plain JAX: against float64."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels import choose
from v4_jax.kernels.rotary import gradients as kernel
from v4_jax.kernels.rotary import reference
from v4_jax.kernels.rotary.reference import Steps
from v4_jax.layers.rotary import turn
from v4_jax.sharding.platform import interpreted

EPS, FREQUENCIES = 1e-6, np.geomspace(1, 1e-3, 32).astype(np.float32)


class Case(NamedTuple):
    """Rows [rows, tokens, heads, channels]; of no heads: [rows, tokens, channels]."""

    rows: int
    tokens: int
    heads: int
    channels: int
    dtype: str = "bfloat16"
    norm: bool = True
    weight: bool = False
    rotary: bool = True


CASES = {
    "queries, uneven heads": Case(1, 40, 24, 256),
    "queries, float32": Case(2, 3, 16, 128, dtype="float32"),
    "keys, a last block of fewer": Case(1, 2100, 0, 512, weight=True),
    "a latent, float32": Case(3, 5, 0, 256, dtype="float32", weight=True, rotary=False),
    "index queries": Case(1, 9, 8, 128, norm=False),
}


def given(case):
    rng = np.random.default_rng(0)
    shape = (case.rows, case.tokens, *([case.heads] if case.heads else []), case.channels)
    x, gradient = (jnp.asarray(rng.normal(size=shape), case.dtype) for _ in range(2))
    weight = jnp.asarray(1 + rng.normal(size=case.channels) / 8, jnp.float32) if case.weight else None
    positions = jnp.arange(case.rows * case.tokens, dtype=jnp.int32).reshape(shape[:2])
    turned = turn(positions, FREQUENCIES) if case.rotary else None
    return x, weight, turned, gradient, Steps(EPS if case.norm else None)


def exact(case, x, weight, turned, gradient):
    """Gradients of rows and weight in float64, and the terms that they are sums of."""
    x, g = (np.asarray(value, np.float64) for value in (x, gradient))
    if turned is not None:
        cos, sin = (np.asarray(part, np.float64) for part in turned)
        if case.heads:
            cos, sin = cos[:, :, None], sin[:, :, None]
        tail = g[..., -64:]
        partner = tail.reshape(*tail.shape[:-1], 32, 2)[..., ::-1].reshape(tail.shape)
        g = np.concatenate([g[..., :-64], tail * cos - partner * sin], axis=-1)
    if not case.norm:
        return g, None, abs(g), None
    scale = (np.mean(x * x, axis=-1, keepdims=True) + EPS) ** -0.5
    v, axes = x * scale, tuple(range(x.ndim - 1))
    of_weight = None if weight is None else np.sum(g * v, axis=axes)
    size = None if weight is None else np.sum(abs(g * v), axis=axes)
    g = g if weight is None else g * np.asarray(weight, np.float64)
    of_x = scale * (g - v * np.mean(g * v, axis=-1, keepdims=True))
    return of_x, of_weight, scale * (abs(g) + abs(v) * np.mean(abs(g * v), axis=-1, keepdims=True)), size


@pytest.mark.parametrize("how", ["kernel", "plain"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_float64(case, how):
    """Within roundings to the rows' dtype: of what is turned back, in plain JAX, and of the result."""
    x, weight, turned, gradient, steps = given(case)
    if how == "kernel":
        run = jax.jit(lambda x, weight, gradient: kernel.gradients(x, weight, turned, gradient, steps, interpret=True))
        found = run(x, weight, gradient)
    else:
        found = jax.vjp(lambda x, w: reference.norm_rotate(x, w, turned, steps), x, weight)[1](gradient)
    of_x, of_weight, terms, sums = exact(case, x, weight, turned, gradient)
    unit, single = float(jnp.finfo(case.dtype).eps) / 2, 64 * float(jnp.finfo(jnp.float32).eps)
    assert found[0].dtype == x.dtype and found[0].shape == x.shape
    assert (abs(np.asarray(found[0], np.float64) - of_x) <= 3 * unit * terms + single * terms).all()
    if weight is None:
        assert found[1] is None
    else:
        assert found[1].dtype == weight.dtype
        assert (abs(np.asarray(found[1], np.float64) - of_weight) <= (2 * unit + single) * sums).all()


def test_programs_for_tpus_alone_take_the_kernel(monkeypatch):
    """Elsewhere gradients are plain JAX's, number for number; and so they are of what is rounded to coarse formats."""
    x, weight, turned, gradient, steps = given(CASES["a latent, float32"])
    calls, gradients = [], kernel.gradients
    monkeypatch.setattr(kernel, "gradients", lambda *given, **options: calls.append(1) or gradients(*given, **options))

    def pulled(steps, run=choose.norm_rotate):
        return jax.vjp(lambda x, weight: run(x, weight, turned, steps), x, weight)[1](gradient)

    jax.tree.map(np.testing.assert_array_equal, pulled(steps), pulled(steps, reference.norm_rotate))
    assert not calls
    with interpreted():
        found = pulled(steps)
        assert len(calls) == 1
        coarse = steps._replace(rounding="keys")
        jax.tree.map(np.testing.assert_array_equal, pulled(coarse), pulled(coarse, reference.norm_rotate))
    assert len(calls) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, pulled(steps))
