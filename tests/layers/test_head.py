"""The loss block by block, its gradients beside it, against the whole array of logits differentiated by JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from v4_jax.layers import head

TOKENS, WIDTH, VOCABULARY = 37, 16, 50


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = 3 * jax.random.normal(keys[0], (TOKENS, WIDTH))
    table = jax.random.normal(keys[1], (VOCABULARY, WIDTH))
    weights = jax.random.normal(keys[2], (TOKENS,)).at[::5].set(0)
    return hidden, table, jax.random.randint(keys[3], (TOKENS,), 0, VOCABULARY), weights


def plain(hidden, table, tokens, weights):
    logits = jnp.einsum("td,vd->tv", *(x.astype(jnp.float32) for x in (hidden, table)), precision="highest")
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, tokens))


def close(found, wanted, tolerance):
    np.testing.assert_allclose(
        *(np.asarray(x, np.float32) for x in (found, wanted)), atol=tolerance * float(jnp.abs(wanted).max()), rtol=0
    )


@pytest.mark.parametrize("tokens", [4, 8, 36, 37, 1000])
def test_blocks(inputs, monkeypatch, tokens):
    monkeypatch.setattr(head, "LOGITS", tokens * VOCABULARY)
    wanted, gradients = jax.value_and_grad(plain, argnums=(0, 1))(*inputs)
    program = jax.jit(jax.value_and_grad(lambda *x: 0.7 * head.cross_entropy(*x), argnums=(0, 1)))
    found, found_gradients = program(*inputs)
    np.testing.assert_allclose(found, 0.7 * wanted, rtol=1e-6)
    np.testing.assert_allclose(head.cross_entropy(*inputs), wanted, rtol=1e-6)
    for a, b in zip(found_gradients, gradients, strict=True):
        close(a, 0.7 * b, 2e-6)


def test_no_array_of_tokens_and_vocabulary(inputs, monkeypatch):
    """Neither logits nor their gradients, of which the largest are those of one block."""
    monkeypatch.setattr(head, "LOGITS", 8 * VOCABULARY)
    program = jax.jit(jax.value_and_grad(lambda *x: head.cross_entropy(*x), argnums=(0, 1))).lower(*inputs).as_text()
    assert f"tensor<{VOCABULARY}x8xf32>" in program
    for rows, columns in ((TOKENS, VOCABULARY), (VOCABULARY, TOKENS)):
        assert f"tensor<{rows}x{columns}x" not in program
    for rows, columns in ((8, VOCABULARY), (VOCABULARY, 8)):
        assert f"tensor<5x{rows}x{columns}x" not in program


@pytest.mark.parametrize("of_table", [jnp.bfloat16, jnp.float32])
def test_sixteen_bits(inputs, of_table):
    """Tokens that the model is sure of keep their small gradients, which are differences of what is nearly equal."""
    hidden, table, tokens, _ = inputs
    hidden, table = hidden.at[:, 0].set(16).astype(jnp.bfloat16), table.at[:, 0].set(0).at[7, 0].set(1).astype(of_table)
    tokens, weights = tokens.at[::2].set(7), jnp.ones(TOKENS)
    wanted = jax.grad(plain, argnums=(0, 1))(hidden.astype(jnp.float32), table.astype(jnp.float32), tokens, weights)
    found = jax.grad(head.cross_entropy, argnums=(0, 1))(hidden, table, tokens, weights)
    assert [x.dtype for x in found] == [jnp.bfloat16, of_table]
    for row in range(0, TOKENS, 2):
        close(found[0][row], wanted[0][row], 2**-7)
    close(found[1], wanted[1], 2**-7)


def test_log_probability(inputs):
    hidden, table, tokens, _ = inputs
    logits = hidden @ table.T
    wanted = -optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    np.testing.assert_allclose(head.log_probability(logits, tokens), wanted, atol=2e-5)


@pytest.mark.parametrize("tokens", [8, 1000])
def test_log_probabilities(inputs, monkeypatch, tokens):
    """Of each token, and their gradient, whatever is made of them."""
    monkeypatch.setattr(head, "LOGITS", tokens * VOCABULARY)
    hidden, table, ids, weights = inputs

    def plainly(hidden, table):
        logits = jnp.einsum("td,vd->tv", hidden, table, precision="highest")
        return jnp.sum(weights * jnp.exp(-optax.softmax_cross_entropy_with_integer_labels(logits, ids) / 9))

    def by_blocks(hidden, table):
        return jnp.sum(weights * jnp.exp(head.log_probabilities(hidden, table, ids) / 9))

    wanted, gradients = jax.value_and_grad(plainly, argnums=(0, 1))(hidden, table)
    found, found_gradients = jax.jit(jax.value_and_grad(by_blocks, argnums=(0, 1)))(hidden, table)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for a, b in zip(found_gradients, gradients, strict=True):
        close(a, b, 1e-5)
