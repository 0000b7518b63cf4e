"""A whole model with the TPUs' kernels, interpreted, is the model without them: in one shot, in chunks, on a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import TOLERANCE, Tiny, make
from v4_jax import Transformer, init_cache
from v4_jax.kernels.attention import gradients as attention_gradients
from v4_jax.kernels.attention import tpu as attention
from v4_jax.kernels.csa import gradients as csa_gradients
from v4_jax.kernels.csa import tpu as csa
from v4_jax.kernels.hyper_connections import tpu as hyper_connections
from v4_jax.kernels.indexer import tpu as indexer
from v4_jax.kernels.indexer_loss import picked as picked_loss
from v4_jax.kernels.indexer_loss import tpu as indexer_loss
from v4_jax.kernels.window import tpu as window
from v4_jax.layers.stages import Stage
from v4_jax.parameter_tree import placements
from v4_jax.sharding.mesh import make_mesh
from v4_jax.sharding.platform import interpreted
from v4_jax.train.objectives.objective import value_and_grad

# The kernels want the real models' widths, of which these are the least: a sliding and a CSA layer.
WIDE = dict(
    num_hidden_layers=2,
    hidden_size=128,
    compress_ratios=(0, 4),
    num_nextn_predict_layers=0,
    num_attention_heads=16,
    head_dim=256,
    index_n_heads=16,
    index_head_dim=128,
)
CHUNKS = ((0, 100), (100, 101))
# KL of tokens that choose the same experts and entries: they differ by roundings. Roundings settle near-ties, too, on
# each kind of processor in their own way: a few tokens choose otherwise, which costs what bfloat16 itself costs.
MEDIAN, MEAN = 1e-4, 1e-3
CHOOSE_OTHERWISE = 0.03


@pytest.fixture(scope="module")
def wide() -> Tiny:
    return make(**WIDE)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(3), (1, CHUNKS[-1][1]), 0, 64)


@pytest.fixture
def interpreted_calls(monkeypatch):
    """Names of the kernels that are interpreted, as they are traced."""
    calls = []

    def spy(kernel):
        def call(*operands, interpret, **options):
            calls.extend([kernel.__name__] * interpret)
            return kernel(*operands, interpret=interpret, **options)

        return call

    kernels = (
        (csa, "attend_picked"),
        (csa_gradients, "gradients"),
        (picked_loss, "loss"),
        (indexer, "best_entries"),
        (hyper_connections, "cross"),
    )
    for module, name in (*kernels, (attention, "window_attention"), (window, "step")):
        monkeypatch.setattr(module, name, spy(getattr(module, name)))
    return calls


def chunked(wide, tokens, policy, mesh):
    """A function that computes logits and choices of the chunks anew each time, so that it is traced anew."""
    place = {} if mesh is None else dict(mesh=make_mesh(mesh, jax.devices()[:2]), rules="long-context")
    model = Transformer(wide.config, policy=policy, **place)
    params = wide.params if mesh is None else jax.device_put(wide.params, placements(wide.config, *place.values()))

    def computed():
        step = jax.jit(
            lambda params, tokens, cache: model.apply({"params": params}, tokens, cache=cache, return_routing=True)
        )
        logits, choices, cache = [], [], init_cache(wide.config, 1, 256, dtype=policy, **place)
        for first, last in CHUNKS:
            output = step(params, tokens[:, first:last], cache)
            logits.append(output.logits)
            choices.append([np.sort(x) for x in (*output.routing.experts, *output.routing.entries)])
            cache = output.cache
        return np.concatenate(logits, axis=1), [np.concatenate(x, axis=1) for x in zip(*choices, strict=True)]

    return computed


@pytest.mark.parametrize("mesh", [None, "seq=2"])
def test_float32(wide, tokens, mesh, interpreted_calls):
    """Entries are chosen by one kernel, the window is attended by another: exactly as without."""
    computed = chunked(wide, tokens, "float32", mesh)
    plain, _ = computed()
    assert not interpreted_calls
    with interpreted():
        kernels, _ = computed()
    assert interpreted_calls == len(CHUNKS) * ["window_attention", "best_entries", "window_attention"]
    np.testing.assert_allclose(kernels, plain, atol=TOLERANCE, rtol=0)


def test_gradients(wide, tokens, interpreted_calls):
    """Of a row of two blocks of queries, in which entries are picked: as they are without kernels."""
    model = Transformer(wide.config, policy="float32", stage=Stage(indexer_loss=True))

    def loss(params):
        some = tokens[:, : wide.config.sliding_window + 3]
        output = model.apply({"params": params}, some, return_routing=True)
        probe = jnp.cos(jnp.arange(output.logits.size, dtype=jnp.float32)).reshape(output.logits.shape)
        return jnp.mean(output.logits * probe) + jnp.mean(output.statistics.indexer_loss), None

    plain = jax.jit(lambda params: value_and_grad(loss, params))(wide.params)
    assert not interpreted_calls
    with interpreted():
        kernels = jax.jit(lambda params: value_and_grad(loss, params))(wide.params)
    assert "window_attention" in interpreted_calls and "attend_picked" not in interpreted_calls
    for one, other in zip(jax.tree.leaves(kernels), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * (1e-3 + abs(other).max()), rtol=0)


def test_gradients_beyond_what_vmem_holds(wide, tokens, interpreted_calls, monkeypatch):
    """Entries are fetched, and gradients added to theirs: as near to float32 as bfloat16 is without kernels.

    Where a layer's forward pass is run again in the backward pass, the loss is not: its slopes are kept.
    """
    some = tokens[:, : wide.config.sliding_window + 3]
    keys = wide.config.sliding_window - 1 + some.shape[1]
    room = (keys + 2 * 128) * wide.config.head_dim * (4 + 2)
    monkeypatch.setattr(attention_gradients, "HELD_BYTES", room)  # for the window alone
    monkeypatch.setattr(indexer_loss, "HELD_BYTES", 0)

    def gradients(policy):
        model = Transformer(wide.config, policy=policy, stage=Stage(indexer_loss=True), remat="layers")

        def loss(params):
            output = model.apply({"params": params}, some, return_routing=True)
            probe = jnp.cos(jnp.arange(output.logits.size, dtype=jnp.float32)).reshape(output.logits.shape)
            return jnp.mean(output.logits * probe) + jnp.mean(output.statistics.indexer_loss), None

        _, found = jax.jit(lambda params: value_and_grad(loss, params))(wide.params)
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(found)]

    exact, plain = gradients("float32"), gradients("bfloat16")
    assert not interpreted_calls
    with interpreted():
        kernels = gradients("bfloat16")
    for name, runs in (("attend_picked", 2), ("gradients", 1), ("loss", 1)):
        assert interpreted_calls.count(name) >= runs

    def distance(found):
        return [
            np.linalg.norm(one - other) / (1e-9 + np.linalg.norm(other))
            for one, other in zip(found, exact, strict=True)
        ]

    for one, by_kernel, without in zip(exact, distance(kernels), distance(plain), strict=True):
        assert by_kernel <= (1.2 if one.size > 16 else 2) * without + 0.01  # of few numbers it is chance


@pytest.mark.parametrize("mesh", [None, "seq=2"])
def test_bfloat16(wide, tokens, mesh, interpreted_calls):
    """They are attended by one, too, and sublayers meet in one: in the same arithmetic, so that sums' order differs."""
    computed = chunked(wide, tokens, "bfloat16", mesh)
    plain, plain_choices = computed()
    with interpreted():
        kernels, choices = computed()
    of_each = [*4 * ["cross"], "best_entries", "attend_picked"]
    assert sorted(interpreted_calls) == sorted([*of_each, *2 * ["window_attention"], *of_each, *2 * ["step"]])
    a, b = jax.nn.log_softmax(plain), jax.nn.log_softmax(kernels)
    divergence = np.sum(np.exp(a) * (a - b), axis=-1)
    alike = np.all([np.all(x == y, axis=-1) for x, y in zip(choices, plain_choices, strict=True)], axis=0)
    assert np.mean(~alike) <= CHOOSE_OTHERWISE
    assert np.median(divergence) < MEDIAN and np.mean(divergence[alike]) < MEAN
