"""Routing, weights and clamps of the experts, against the formulas written out per token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax import Config, Policy
from v4_jax.layers.experts import swiglu
from v4_jax.layers.mixture_of_experts import MixtureOfExperts
from v4_jax.parameters import Parameter

CONFIG = dataclasses.replace(Config.tiny(), hidden_size=16, moe_intermediate_size=12, n_routed_experts=6, vocab_size=40)


def build(role, policy="float32", seed=0):
    layer = MixtureOfExperts(config=CONFIG, policy=Policy.of(policy), role=role)
    y = jax.random.normal(jax.random.key(seed), (2, 9, 16)) * 3
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 40)
    valid = jnp.ones((2, 9), bool)
    boxed = layer.init(jax.random.key(2), y, tokens, valid)["params"]

    def shake(path, box):
        key = jax.random.key(hash(str(path)) % 2**31)
        value = box.value
        return value if value.dtype == jnp.int32 else jax.random.normal(key, value.shape)

    params = jax.tree_util.tree_map_with_path(shake, boxed, is_leaf=lambda node: isinstance(node, Parameter))
    return layer, params, y, tokens, valid


def by_hand(params, y, tokens, role):
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    out, used = np.zeros(y.shape), []

    def ffn(x, w1, w2, w3, scale):
        gate, up = np.minimum(w1 @ x, 10), np.clip(w3 @ x, -10, 10)
        return w2 @ (gate / (1 + np.exp(-gate)) * up * scale)

    for b, s in np.ndindex(*y.shape[:2]):
        x = np.asarray(y[b, s], np.float64)
        affinity = np.sqrt(np.log1p(np.exp(p["gate"] @ x)))
        if role == "hash":
            chosen = p["tid2eid"][tokens[b, s]].astype(int)
        else:
            chosen = np.argsort(-(affinity + p["bias"]), kind="stable")[:2]
        weights = affinity[chosen] / affinity[chosen].sum() * CONFIG.routed_scaling_factor
        for e, weight in zip(chosen, weights, strict=True):
            out[b, s] += ffn(x, p["w1"][e], p["w2"][e], p["w3"][e], weight)
        out[b, s] += ffn(x, p["shared_w1"], p["shared_w2"], p["shared_w3"], 1.0)
        used.append(chosen)
    return out, np.array(used).reshape(*y.shape[:2], 2)


@pytest.mark.parametrize("role", ["hash", "routed"])
def test_by_hand(role):
    layer, params, y, tokens, valid = build(role)
    out, decided = layer.apply({"params": params}, y, tokens, valid)
    expected, used = by_hand(params, y, tokens, role)
    np.testing.assert_array_equal(decided.routing.experts, used)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(decided.statistics.load, np.bincount(used.reshape(-1), minlength=6))


def test_balance_by_hand():
    """Sum over experts of their share of choices times their mean affinity, of each row's valid tokens alone."""
    layer, params, y, tokens, valid = build("routed")
    valid = valid.at[1, 5:].set(False)
    _, decided = layer.apply({"params": params}, y, tokens, valid)
    for row in range(2):
        inside = np.asarray(valid[row])
        shares = np.asarray(decided.statistics.affinities[row])[inside]
        mean = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
        counts = np.bincount(np.asarray(decided.routing.experts[row])[inside].reshape(-1), minlength=6)
        expected = np.sum(6 * counts / (2 * inside.sum()) * mean)
        np.testing.assert_allclose(decided.statistics.balance[row], expected, rtol=1e-5)


def test_the_clamp_is_active_and_one_sided_for_the_gate():
    limit = 10.0
    np.testing.assert_allclose(
        swiglu(jnp.array(50.0), jnp.array(1.0), limit), swiglu(jnp.array(10.0), jnp.array(1.0), limit)
    )
    np.testing.assert_allclose(swiglu(jnp.array(-50.0), jnp.array(1.0), limit), 0, atol=1e-8)
    np.testing.assert_allclose(swiglu(jnp.array(1.0), jnp.array(-50.0), limit), -10 * jax.nn.silu(1.0), rtol=1e-6)
    assert jnp.isclose(swiglu(jnp.array(-12.0), jnp.array(1.0), limit), jax.nn.silu(-12.0))


@pytest.mark.parametrize("which", ["w", "shared_w"])
def test_routed_and_shared_experts_are_clamped_each(which):
    layer, params, y, tokens, valid = build("routed")
    large = params | {which + "1": params[which + "1"] * 100, which + "3": params[which + "3"] * 100}
    larger = params | {which + "1": params[which + "1"] * 1000, which + "3": params[which + "3"] * 1000}
    a, *_ = layer.apply({"params": large}, y, tokens, valid)
    b, *_ = layer.apply({"params": larger}, y, tokens, valid)
    assert jnp.median(jnp.abs(a - b)) < 1e-2 < jnp.abs(a).mean()


def test_the_bias_chooses_but_does_not_weigh():
    layer, params, y, tokens, valid = build("routed")
    biased = params | {"bias": jnp.where(jnp.arange(6) == 4, 100.0, params["bias"])}
    out, decided = layer.apply({"params": biased}, y, tokens, valid)
    assert (decided.routing.experts[..., 0] == 4).all()
    shifted = params | {"bias": biased["bias"] + jnp.where(jnp.arange(6) == 4, 900.0, 0.0)}
    np.testing.assert_array_equal(layer.apply({"params": shifted}, y, tokens, valid)[0], out)


def test_replayed_choice():
    layer, params, y, tokens, valid = build("routed")
    out, decided = layer.apply({"params": params}, y, tokens, valid)
    chosen = decided.routing.experts
    other = (chosen + 1) % 6
    replayed, used = layer.apply({"params": params}, y, tokens, valid, None, other)
    np.testing.assert_array_equal(used.routing.experts, other)
    assert jnp.abs(replayed - out).max() > 1e-2
    np.testing.assert_array_equal(layer.apply({"params": params}, y, tokens, valid, None, chosen)[0], out)


def test_router_is_float32_under_bfloat16():
    """Near ties must fall the same way: affinities do not depend on the compute dtype."""
    low, params, y, tokens, valid = build("routed", "bfloat16")
    high, *_ = build("routed")
    y = y.astype(jnp.bfloat16)
    _, low = low.apply({"params": params}, y, tokens, valid)
    _, high = high.apply({"params": params}, y.astype(jnp.float32), tokens, valid)
    np.testing.assert_array_equal(low.routing.experts, high.routing.experts)
    np.testing.assert_array_equal(low.statistics.affinities, high.statistics.affinities)


def test_gradients_survive_affinities_that_underflow():
    layer, params, y, tokens, valid = build("routed")
    params = params | {"gate": params["gate"].at[3].set(-100 * jnp.sign(y[0, 0]))}

    def loss(y):
        return jnp.sum(layer.apply({"params": params}, y, tokens, valid)[0])

    assert bool(jnp.isfinite(jax.grad(loss)(y)).all())


def test_out_of_range_ids_read_the_table_edge():
    layer, params, y, _, valid = build("hash")
    edge, *_ = layer.apply({"params": params}, y, jnp.full((2, 9), 39), valid)
    far, *_ = layer.apply({"params": params}, y, jnp.full((2, 9), 4000), valid)
    np.testing.assert_array_equal(edge, far)


def test_fresh_hash_tables_use_every_expert_equally():
    _, params, *_ = build("hash")
    table = np.asarray(params["tid2eid"])
    assert (np.sort(table, axis=1)[:, 1:] != np.sort(table, axis=1)[:, :-1]).all()
    counts = np.bincount(table.reshape(-1), minlength=6)
    assert counts.max() - counts.min() <= 2
