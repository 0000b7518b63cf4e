"""What training adds to the forward pass changes nothing else: recomputation, likelihoods, the indexer's loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models import TOPK, jitted, make
from v4_jax import Transformer, declarations
from v4_jax.layers.indexer_loss import divergence
from v4_jax.layers.stages import Stage
from v4_jax.parameters import is_parameter

# Of a leaf's largest element: programs that sum in another order; gradients of gates are small sums of large terms.
GRADIENT = 1e-4
LENGTH = 300  # past 4 * topk, two HCA blocks and three query blocks


@pytest.fixture(scope="module")
def tiny():
    return make(num_hidden_layers=4, compress_ratios=(4, 128, 4, 128, 0), num_hash_layers=1)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(5), (2, LENGTH), 0, 64)


def pull(model, params, tokens, indexer=0.0):
    """Loss, its parts, and gradients."""

    def loss(params):
        output = model.apply({"params": params}, tokens, return_routing=True)
        total = cross_entropy(model, params, output.streams, tokens)
        if indexer:
            total = total + indexer * jnp.mean(output.statistics.indexer_loss)
        return total, output

    (value, output), grads = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))(params)
    return value, output, grads


def cross_entropy(model, params, streams, tokens):
    """The mean over all positions; the last one's next token is the first."""
    weights = jnp.full(tokens.shape, 1 / tokens.size)
    return model.apply({"params": params}, streams, jnp.roll(tokens, -1, 1), weights, method="cross_entropy")


def leaves(config, *trees):
    """(declaration, leaves of each tree) of the float parameters."""
    declared = jax.tree.leaves(declarations(config), is_leaf=is_parameter)
    for parameter, *values in zip(declared, *map(jax.tree.leaves, trees), strict=True):
        if parameter.storage != "i64":
            yield parameter, *values


@pytest.fixture(scope="module")
def plain(tiny, tokens):
    return pull(tiny.model, tiny.params, tokens)


def test_cross_entropy_is_that_of_the_logits(plain, tokens):
    value, output, _ = plain
    wanted = optax.softmax_cross_entropy_with_integer_labels(output.logits, jnp.roll(tokens, -1, 1))
    np.testing.assert_allclose(value, jnp.mean(wanted), rtol=1e-6)


@pytest.mark.parametrize("remat", ["sublayers", "layers"])
def test_recomputation_changes_no_gradient(tiny, tokens, plain, remat):
    value, _, grads = pull(tiny.model.clone(remat=remat), tiny.params, tokens)
    np.testing.assert_allclose(value, plain[0], rtol=1e-6)
    for parameter, found, wanted in leaves(tiny.config, grads, plain[2]):
        size = max(1e-3, float(jnp.abs(wanted).max()))
        np.testing.assert_allclose(found, wanted, atol=GRADIENT * size, rtol=0, err_msg=parameter.released)


def test_unknown_recomputation_is_refused(tiny, tokens):
    with pytest.raises(ValueError, match="unknown remat policy 'all', expected one of"):
        tiny.model.clone(remat="all").apply({"params": tiny.params}, tokens)


@pytest.mark.parametrize("dense", [False, True])
def test_the_indexer_learns_from_its_own_loss_alone(tiny, tokens, plain, dense):
    model = tiny.model.clone(stage=Stage(dense=dense, indexer_loss=True))
    _, output, grads = pull(model, tiny.params, tokens, indexer=1.0)
    loss = output.statistics.indexer_loss
    assert loss.shape == (2, 2, LENGTH)
    np.testing.assert_allclose(loss[:, :, :7], 0, atol=1e-6)  # one entry or none: nothing to tell apart
    assert (loss[:, :, 64:] > 0).all()
    for parameter, found, wanted in leaves(tiny.config, grads, plain[2]):
        if parameter.loss == "indexer":
            assert float(jnp.abs(wanted).max()) == 0, parameter.released
            assert float(jnp.abs(found).max()) > 1e-6, parameter.released
        elif not dense:
            size = max(1e-3, float(jnp.abs(wanted).max()))
            np.testing.assert_allclose(found, wanted, atol=GRADIENT * size, rtol=0, err_msg=parameter.released)


def test_divergence_by_hand():
    rng = np.random.default_rng(0)
    scores, mass = rng.normal(0, 3, (1, 2, 5)), rng.uniform(0, 2, (1, 2, 5))
    visible = np.array([[[True, True, False, True, True], [False] * 5]])
    share, guess = mass[0, 0, visible[0, 0]], np.exp(scores[0, 0, visible[0, 0]])
    share, guess = share / share.sum(), guess / guess.sum()
    found = divergence(*map(jnp.asarray, (scores, mass, visible)))
    np.testing.assert_allclose(found, [[np.sum(share * np.log(share / guess)), 0]], rtol=1e-5)


def test_both_stages_agree_where_all_entries_are_picked(tiny, tokens):
    length = 4 * TOPK
    sparse, dense = (
        jitted(tiny.model.clone(stage=Stage(dense=dense, indexer_loss=True)))(
            tiny.params, tokens[:, :length], return_routing=True
        )
        for dense in (False, True)
    )
    assert dense.routing.entries is None
    np.testing.assert_allclose(sparse.logits, dense.logits, atol=1e-5)
    np.testing.assert_allclose(sparse.statistics.indexer_loss, dense.statistics.indexer_loss, atol=1e-5)


def test_dense_attention_sees_every_entry(tiny, tokens):
    """As many picks as there are entries make sparse attention dense."""
    all_of_them = make(
        num_hidden_layers=4, compress_ratios=(4, 128, 4, 128, 0), num_hash_layers=1, index_topk=LENGTH // 4
    )
    dense = jitted(tiny.model.clone(stage=Stage(dense=True)))(tiny.params, tokens)
    np.testing.assert_allclose(all_of_them(tokens).logits, dense.logits, atol=1e-4)


def test_bfloat16_gradients_point_the_same_way(tiny, tokens, plain):
    """No path loses its gradient in 16 bits, such as that through the compressed entries."""
    low = Transformer(tiny.config, policy="bfloat16", remat="sublayers")
    routing = plain[1].routing

    def loss(model, params):
        output = model.apply({"params": params}, tokens, routing=routing, logits="none")
        return cross_entropy(model, params, output.streams, tokens)

    gradient = jax.jit(jax.grad(loss, argnums=1, allow_int=True), static_argnums=0)
    for parameter, found, wanted in leaves(tiny.config, gradient(low, tiny.params), plain[2]):
        if parameter.loss == "indexer" or not float(jnp.abs(wanted).max()):
            continue
        cosine = float(jnp.vdot(found, wanted) / (jnp.linalg.norm(found) * jnp.linalg.norm(wanted)))
        if parameter.storage in ("fp8", "bf16", "expert"):
            assert cosine > 0.95, parameter.released


def test_the_indexers_loss_needs_whole_rows(tiny, tokens):
    model = tiny.model.clone(stage=Stage(indexer_loss=True))
    with pytest.raises(ValueError, match="expected a call without a cache"):
        model.apply({"params": tiny.params}, tokens[:, :8], cache=tiny.cache(2, 16))
