"""Perturbing token t changes nothing before t, for every role, and does change t itself."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import make

ROLES = {"sliding": (0, 0, 0), "csa": (4, 4, 0), "hca": (128, 128, 0), "all": (0, 4, 128, 4, 128, 4, 0)}


@pytest.mark.parametrize("role", ROLES)
def test_causality(role, tokens):
    ratios = ROLES[role]
    model = make(num_hidden_layers=len(ratios) - 1, compress_ratios=ratios, num_hash_layers=1)
    row = tokens[:1, :263]
    before = model(row).logits[0]
    for t in (0, 1, 3, 4, 5, 126, 127, 128, 255, 256, 261):
        after = model(changed(row, t)).logits[0]
        np.testing.assert_array_equal(after[:t], before[:t], err_msg=f"token {t} reached back")
        assert jnp.abs(after[t] - before[t]).max() > 1e-3


@pytest.mark.parametrize(("role", "reach"), [("csa", 260), ("hca", 260)])
def test_compressed_roles_see_beyond_the_window(role, reach, tokens):
    """A first token far outside every window still matters to the last query."""
    ratios = ROLES[role]
    model = make(num_hidden_layers=2, compress_ratios=ratios, num_hash_layers=1, index_topk=80)
    row = tokens[:1, : reach + 1]
    change = model(changed(row, 0)).logits[0] - model(row).logits[0]
    assert jnp.abs(change[reach]).max() > 1e-6


def test_sliding_layers_alone_do_not(tokens):
    model = make(num_hidden_layers=2, compress_ratios=ROLES["sliding"], num_hash_layers=1)
    row = tokens[:1, :200]
    change = model(changed(row, 0)).logits[0] - model(row).logits[0]
    np.testing.assert_array_equal(change[2 * 15 + 1 :], 0)
    assert jnp.abs(change[2 * 15]).max() > 0


def changed(row, t):
    """The row with another token at t."""
    other = row.copy()
    other[0, t] = (row[0, t] + 17) % 64
    return other
