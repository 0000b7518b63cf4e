"""Any mesh == one device: each axis alone and several together, in every way of running."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import TOLERANCE, OnMesh, three
from v4_jax import Config, init
from v4_jax.layers.stages import Stage
from v4_jax.parameter_tree import placements
from v4_jax.sharding.axes import PRESETS, ShardingError
from v4_jax.sharding.mesh import make_mesh

MESHES = {
    "seq=8": "long-context",
    "expert=8": "long-context",
    "tensor=2": "prefill",
    "data=2,seq=4": "train",
    "seq=2,expert=2,tensor=2": "train",
    "seq=4,tensor=2": "long-context",
    "data=2,expert=2,tensor=2": "decode",
}
# Gradients in `make test`: these split what the single axes do, and `make meshes` has each of those alone.
COMPOSITE = ("data=2,seq=4", "seq=2,expert=2,tensor=2")
GRADIENTS = [pytest.param(mesh, marks=() if mesh in COMPOSITE else pytest.mark.by_axis) for mesh in MESHES]
LENGTH = 1024  # 128 tokens on each of eight devices
LENGTHS = np.array([LENGTH, 389])  # valid tokens of ragged rows
DOCUMENTS = (131, 5, 388, 260, 30, 130, 70)  # most straddle shards, one covers several


@pytest.fixture(scope="module")
def tiny():
    """One layer of each role and an MTP block; experts enough for eight devices."""
    return three()


@pytest.fixture(scope="module")
def tokens():
    """Tokens whose decisions are clear: no index score or gate within 3e-5 of the next at the edge of a top-k.

    Nor is an index head's product of a picked entry within 4e-5 of zero, where ReLU's gradient jumps. Another order of
    summing moves them by 1e-6, so that what another machine computes differs by rounding alone.
    """
    return np.asarray(jax.random.randint(jax.random.key(6), (2, 1700), 0, 64))


@pytest.fixture(scope="module", params=list(MESHES))
def spread(request, tiny):
    return OnMesh(tiny, request.param, MESHES[request.param])


@pytest.fixture(scope="module")
def segments():
    row = jnp.repeat(jnp.arange(1, len(DOCUMENTS) + 1), jnp.array(DOCUMENTS))
    row = jnp.pad(row, (0, LENGTH - sum(DOCUMENTS)))
    return jnp.stack([row, jnp.roll(row, 77)])


@pytest.fixture(scope="module")
def packed(tiny, tokens, segments):
    return pull(tiny.model, tiny.params, tokens[:, :LENGTH], segments)


@pytest.fixture(scope="module")
def one_shot(tiny, tokens):
    return tiny(tokens).logits


def pull(model, params, tokens, segments):
    """The gradient of every parameter, of all that training minimises; trunk and MTP logits."""
    weights = jax.random.normal(jax.random.key(3), tokens.shape)
    model = model.clone(stage=Stage(indexer_loss=True), remat="sublayers")

    @functools.partial(jax.grad, allow_int=True, has_aux=True)
    def gradient(params, tokens):
        def call(*inputs, **arguments):
            return model.apply({"params": params}, *inputs, segment_ids=segments, return_routing=True, **arguments)

        def loss_of(streams, ahead):
            targets, mtp = jnp.roll(tokens, -ahead, 1), ahead == 2
            return model.apply({"params": params}, streams, targets, weights, mtp=mtp, method="cross_entropy")

        output = call(tokens)
        mtp = call(output.streams, jnp.roll(tokens, -1, 1), method="mtp")
        loss = loss_of(output.streams, 1) + loss_of(mtp.streams, 2)
        balance = jnp.sum(output.statistics.balance) + jnp.sum(mtp.statistics.balance)
        divergence = jnp.sum(jnp.where(segments > 0, output.statistics.indexer_loss, 0))
        return loss / 10 + balance + divergence, (output.logits, mtp.logits)

    return jax.jit(gradient)(params, tokens)


def same(a, b, what=""):
    np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0, err_msg=what)


def test_ragged_rows_and_decisions(tiny, spread, tokens, one_shot):
    """Logits, streams and every routing decision of rows of different lengths; the last token's logits alone."""
    lengths = jnp.asarray(LENGTHS)
    expected = tiny(tokens[:, :LENGTH], lengths=lengths, return_routing=True)
    output = spread(tokens[:, :LENGTH], lengths=lengths, return_routing=True)
    for row, length in enumerate(LENGTHS):
        same(output.logits[row, :length], one_shot[row, :length])
        same(output.streams[row, :length], expected.streams[row, :length])
        for name in ("experts", "entries"):
            found, wanted = (np.asarray(getattr(o.routing, name))[:, row, :length] for o in (output, expected))
            np.testing.assert_array_equal(np.sort(found, -1), np.sort(wanted, -1), err_msg=name)
    np.testing.assert_array_equal(output.statistics.load, expected.statistics.load)
    assert output.statistics.load.sum(axis=1).tolist() == [LENGTHS.sum() * tiny.config.num_experts_per_tok] * 3
    last = spread(tokens[:, :LENGTH], lengths=lengths, logits="last").logits
    same(last[:, 0], jnp.stack([one_shot[row, length - 1] for row, length in enumerate(LENGTHS)]))


def test_packed_documents(spread, tokens, segments, packed):
    """Documents that straddle devices, through the trunk and the MTP block."""
    output = spread(tokens[:, :LENGTH], segment_ids=segments, return_routing=True)
    following = np.roll(tokens[:, :LENGTH], -1, 1)
    mtp = spread(output.streams, following, segment_ids=segments, return_routing=True, method="mtp")
    valid = np.asarray(segments) > 0
    for found, wanted in zip((output.logits, mtp.logits), packed[1], strict=True):
        same(np.asarray(found)[valid], np.asarray(wanted)[valid])


@pytest.mark.parametrize("spread", GRADIENTS, indirect=True)
def test_gradients_of_packed_documents(spread, tokens, segments, packed):
    """Forward and backward, through the trunk and the MTP block."""
    gradient, logits = pull(spread.model, spread.params, tokens[:, :LENGTH], segments)
    valid = np.asarray(segments) > 0
    for found, wanted in zip(logits, packed[1], strict=True):
        same(np.asarray(found)[valid], np.asarray(wanted)[valid])
    pairs = zip(jax.tree_util.tree_flatten_with_path(packed[0])[0], jax.tree.leaves(gradient), strict=True)
    for (path, wanted), found in pairs:
        if wanted.dtype != jax.dtypes.float0:
            size = max(1.0, float(jnp.abs(wanted).max()))
            np.testing.assert_allclose(found, wanted, atol=2e-4 * size, rtol=0, err_msg=jax.tree_util.keystr(path))


def test_chunks_then_tokens(spread, tokens, one_shot):
    """Rows in different phases: long chunks (split over the sequence), short ones (on all devices), single tokens."""
    cache, done = spread.cache(2, 1700), np.zeros(2, int)
    for size, counts in ((1024, (389, 1024)), (64, (64, 3)), (1024, (500, 260)), (1, (1, 1)), (3, (3, 0)), (1, (1, 1))):
        chunk = np.zeros((2, size), np.int32)
        for row, count in enumerate(counts):
            chunk[row, :count] = tokens[row, done[row] : done[row] + count]
        output = spread(chunk, lengths=jnp.array(counts), cache=cache)
        cache = output.cache
        for row, count in enumerate(counts):
            same(
                output.logits[row, :count], one_shot[row, done[row] : done[row] + count], f"chunk of {size}, row {row}"
            )
        done += counts
    assert cache.lengths.tolist() == done.tolist()


def test_fresh_parameters():
    """Drawn in their shards, they are those of one device."""
    config = Config.tiny()
    mesh = make_mesh("seq=2,expert=2,tensor=2")
    one, spread = init(config, jax.random.key(1)), init(config, jax.random.key(1), mesh=mesh, rules="train")
    for a, b, place in zip(*map(jax.tree.leaves, (one, spread, placements(config, mesh, "train"))), strict=True):
        np.testing.assert_array_equal(a, b)
        assert b.sharding.is_equivalent_to(place, b.ndim)


def test_sequences_that_do_not_split(tiny, tokens):
    spread = OnMesh(tiny, "seq=8", "long-context")
    with pytest.raises(ShardingError, match=r"1100 tokens do not split over 8 devices .* expected a multiple of 1024"):
        spread(tokens[:, :1100])
    with pytest.raises(ShardingError, match="'batch' of size 2 cannot be split 8 ways over data"):
        OnMesh(tiny, "data=8", "train")(tokens[:, :128])
    with pytest.raises(ShardingError, match=r"'vocab' is split over \['data'\], which also split the batch"):
        OnMesh(tiny, "data=2", PRESETS["decode"].replace(vocab="data"))(tokens[:, :128])
