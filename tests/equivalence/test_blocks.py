"""Blockwise work equals work in one block: query blocks, entry blocks, tiles; routing replays; gradients agree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import TOLERANCE, make
from v4_jax import Routing, Transformer
from v4_jax.kernels.grouped_matmul import groups
from v4_jax.kernels.indexer import selection
from v4_jax.layers import entry_attention, indexer_loss, query_blocks


@pytest.fixture(scope="module")
def whole(tiny, tokens):
    return tiny(tokens).logits


@pytest.mark.parametrize(("cached", "together"), [(False, 1), (True, 1), (False, 8000)])
def test_small_blocks(tiny, tokens, whole, monkeypatch, cached, together):
    """Query blocks one by one or five at once, several blocks of index keys and of HCA entries, uneven ends, tiles."""
    monkeypatch.setattr(query_blocks, "QUERY_BLOCK", 13)
    monkeypatch.setattr(query_blocks, "TOGETHER", together)
    monkeypatch.setattr(entry_attention, "ENTRY_BLOCK", 2)
    monkeypatch.setattr(indexer_loss, "ENTRY_BLOCK", 2)
    monkeypatch.setattr(selection, "ENTRY_BLOCK", 20)
    monkeypatch.setattr(groups, "TILE", 8)
    arguments = {"cache": tiny.cache(2, 700)} if cached else {}
    small = jax.jit(lambda p, t: tiny.model.apply({"params": p}, t, **arguments).logits)
    if cached:  # 700 positions: five HCA entries and 175 index keys of room, most of them empty
        arguments["cache"] = tiny(tokens[:, :50], cache=arguments["cache"]).cache
        np.testing.assert_allclose(small(tiny.params, tokens[:, 50:]), whole[:, 50:], atol=TOLERANCE, rtol=0)
    else:
        np.testing.assert_allclose(small(tiny.params, tokens), whole, atol=TOLERANCE, rtol=0)


def test_blocks_side_by_side_skip_what_nobody_sees(three, tokens, monkeypatch):
    """A chunk's cost must not grow with the room of its cache: blocks of entries are passed over by a real branch."""

    def branches():
        def chunk(tokens, cache):
            return three.model.apply({"params": three.params}, tokens, cache=cache).logits

        room = 128 * (selection.ENTRY_BLOCK + entry_attention.ENTRY_BLOCK)  # several blocks of either kind
        return str(jax.make_jaxpr(chunk)(tokens[:, :64], three.cache(2, room))).count("cond[")

    together = branches()
    monkeypatch.setattr(query_blocks, "TOGETHER", 1)
    assert together == branches() >= 2  # index keys of the CSA layer, entries of the HCA layer


def test_gradients_do_not_depend_on_blocks(three, tokens, monkeypatch):
    def gradient():
        def loss(params):
            logits = three.model.apply({"params": params}, tokens[:, :150]).logits
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3])

        return jax.jit(jax.grad(loss, allow_int=True))(three.params)

    one = gradient()
    monkeypatch.setattr(query_blocks, "TOGETHER", 8000)
    monkeypatch.setattr(groups, "TILE", 16)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(gradient()), strict=True):
        if a.dtype != jax.dtypes.float0:
            scale = max(1e-3, float(jnp.abs(a).max()))
            np.testing.assert_allclose(a, b, atol=1e-4 * scale, rtol=0, err_msg=jax.tree_util.keystr(path))


def test_gradient_is_the_slope(three, tokens):
    """Directional derivative by finite differences, in every declared float parameter at once."""

    def loss(params):
        logits = three.model.apply({"params": params}, tokens[:1, :140]).logits
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3])

    value = jax.jit(loss)
    gradient = jax.jit(jax.grad(loss, allow_int=True))(three.params)
    # The index branch only picks entries: no gradient may leak into it.
    indexer = gradient["layer_1"]["attn"]["indexer"]
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(indexer))

    head = three.params["head"]
    direction = jax.random.normal(jax.random.key(5), head.shape)
    step = 1e-2
    slope = value(three.params | {"head": head + step * direction}) - value(
        three.params | {"head": head - step * direction}
    )
    np.testing.assert_allclose(jnp.vdot(gradient["head"], direction), slope / (2 * step), rtol=2e-3)


def test_routing_replay(tiny, tokens, whole):
    routing = tiny(tokens, return_routing=True).routing
    assert routing.experts.shape == (6, 2, 300, 2)
    assert routing.entries.shape == (3, 2, 300, 8)
    np.testing.assert_allclose(tiny(tokens, routing=routing).logits, whole, atol=TOLERANCE, rtol=0)
    other = Routing(experts=(routing.experts + 1) % 4)
    assert jnp.abs(tiny(tokens, routing=other).logits - whole).max() > 0.1
    nothing = Routing(entries=jnp.full_like(routing.entries, -1))
    assert jnp.abs(tiny(tokens, routing=nothing).logits - whole).max() > 1e-3


def test_picked_entries_are_visible_and_distinct(tiny, tokens):
    entries = np.asarray(tiny(tokens, return_routing=True).routing.entries)
    visible = (np.arange(300) + 1) // 4
    assert (entries < visible[:, None]).all() and (entries >= -1).all()
    for t in (2, 3, 30, 31, 200, 299):
        picked = entries[:, :, t]
        assert ((picked >= 0).sum(-1) == min(8, visible[t])).all()
        for row in picked.reshape(-1, 8):
            assert len(set(row[row >= 0])) == (row >= 0).sum()


def test_all_entries_when_topk_covers_them(tokens):
    """With topk at least the number of entries, the indexer's weights cannot matter."""
    model = make(index_topk=80)
    other = make(index_topk=80)
    for block in ("layer_1",):
        indexer = other.params[block]["attn"]["indexer"]
        other.params[block]["attn"]["indexer"] = indexer | {"wq_b": -indexer["wq_b"]}
    np.testing.assert_allclose(model(tokens).logits, other(tokens).logits, atol=TOLERANCE, rtol=0)


def test_bfloat16_stays_close(tiny, tokens, whole):
    low = Transformer(tiny.config, policy="bfloat16")
    logits = jax.jit(low.apply)({"params": tiny.params}, tokens).logits
    assert logits.dtype == jnp.float32
    a, b = jax.nn.log_softmax(whole), jax.nn.log_softmax(logits)
    assert float(jnp.mean(jnp.sum(jnp.exp(a) * (a - b), axis=-1))) < 0.05


def test_shifted_positions_change_nothing(tiny, tokens, whole):
    """Rotary embedding is relative, beyond the original context length too."""
    positions = jnp.broadcast_to(jnp.arange(300) + 4096, (2, 300))
    np.testing.assert_allclose(tiny(tokens, positions=positions).logits, whole, atol=5e-3, rtol=0)
