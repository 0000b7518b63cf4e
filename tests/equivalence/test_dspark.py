"""DSpark's stages: in chunks, by accepted drafts, in rows of different length and on meshes == from the whole text."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import models
from tests.models import TOLERANCE, OnMesh
from v4_jax import Config, Transformer
from v4_jax.architecture import Architecture, Period

ROWS = 4
LENGTH = 160  # of the texts, beyond the window (16), its ring (24) and a chunk that is longer than both


@pytest.fixture(scope="module")
def model():
    return models.drafts()


@pytest.fixture(scope="module")
def rows(tokens):
    return jnp.stack([jnp.roll(tokens[0], 31 * i)[:LENGTH] for i in range(ROWS)])


@pytest.fixture(scope="module")
def taps(model, rows):
    return model(rows, return_taps=True).taps


def whole(model, taps, rows, lengths):
    """Drafts behind the first `lengths` tokens, without a cache."""
    lengths = jnp.asarray(lengths)
    anchors = jnp.take_along_axis(rows, lengths[:, None], axis=1)[:, 0]
    return model(taps, anchors, lengths=lengths, method="dspark")


def same(found, expected, rows=slice(None)):
    np.testing.assert_allclose(found.logits[rows], expected.logits[rows], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(found.confidence[rows], expected.confidence[rows], atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(found.tokens[rows], expected.tokens[rows])


def test_chunks_and_accepted_drafts(model, rows, taps):
    """Chunks of any size, then as many tokens at a time as might be accepted, each row at its own pace."""
    cache, rng = model.cache(ROWS, LENGTH), np.random.default_rng(0)
    done = np.zeros(ROWS, int)

    def part(size):
        return jnp.take_along_axis(taps, jnp.minimum(done[:, None] + np.arange(size), LENGTH - 1)[..., None], axis=1)

    for counts in ([40, 7, 0, 23], [1, 40, 3, 16]):
        cache = model(part(40), lengths=jnp.asarray(counts), cache=cache, method="dspark_read")
        done += counts
        assert cache.draft_lengths.tolist() == done.tolist() and cache.lengths.tolist() == [0] * ROWS
    while done.max() < LENGTH - 7:
        counts = rng.integers(0, 7, ROWS)
        anchors = jnp.take_along_axis(rows, jnp.asarray(done + counts)[:, None], axis=1)[:, 0]
        found = model(part(6), anchors, lengths=jnp.asarray(counts), cache=cache, method="dspark")
        done += counts
        cache = found.cache
        assert cache.draft_lengths.tolist() == done.tolist()
        same(found, whole(model, taps, rows, done), np.flatnonzero(counts))
    assert done.min() > 60


@pytest.mark.parametrize("first", [1, 15, 16, 17, 40])
def test_only_the_window_is_seen(model, rows, taps, first):
    """Taps before it may be anything; the oldest in it may not."""
    lengths = jnp.full(ROWS, first + 16)
    expected = whole(model, taps, rows, lengths)
    forgotten = whole(model, taps.at[:, :first].set(7.0), rows, lengths)
    same(forgotten, expected)
    changed = whole(model, taps.at[:, first].set(7.0), rows, lengths)
    assert np.abs(changed.logits - expected.logits).max(axis=(1, 2)).min() > TOLERANCE


def test_choices_enter_the_next_logits(model, rows, taps):
    """What is chosen in one place moves the logits of the next by the Markov head's bias, and none before."""
    lengths = jnp.full(ROWS, 50)
    anchors = jnp.take_along_axis(rows, lengths[:, None], axis=1)[:, 0]

    @functools.partial(jax.jit, static_argnums=0)
    def chosen(token, taps):
        def choose(logits, number):
            return jnp.where(number == 1, token, jnp.argmax(logits, -1)).astype(jnp.int32)

        return model.model.apply(
            {"params": model.params}, taps, anchors, lengths=lengths, choose=choose, method="dspark"
        )

    one, other = chosen(3, taps), chosen(9, taps)
    assert one.tokens[:, 1].tolist() == [3] * ROWS and other.tokens[:, 1].tolist() == [9] * ROWS
    np.testing.assert_array_equal(one.logits[:, :2], other.logits[:, :2])
    w1, w2 = (np.asarray(model.params["dspark"][name]) for name in ("markov_w1", "markov_w2"))
    np.testing.assert_allclose(
        other.logits[:, 2] - one.logits[:, 2], np.tile(w2 @ (w1[9] - w1[3]), (ROWS, 1)), atol=TOLERANCE
    )


def test_taps_of_scanned_layers(tokens, monkeypatch):
    """Those of layers in the repeating period are those of the same layers unrolled."""
    values = dict(compress_ratios=(0, 4, 128, 4, 128, 4, 0), dspark_target_layer_ids=(0, 2, 4, 5))
    scanned = models.make(**models.DSPARK | values)
    period = scanned.config.period
    assert period.repeats == 2
    found = scanned(tokens[:, :80], return_taps=True).taps
    params = dict(scanned.params)
    stacked = params.pop("period")
    for repeat in range(period.repeats):
        for place, layer in enumerate(period.layers(repeat)):
            params[f"layer_{layer}"] = jax.tree.map(lambda x, repeat=repeat: x[repeat], stacked[f"block_{place}"])
    monkeypatch.setattr(Architecture, "period", property(lambda c: Period(c.num_hidden_layers, 1, 0)))
    unrolled = Transformer(dataclasses.replace(scanned.config, initializer_range=0.5), policy="float32")
    output = jax.jit(lambda params: unrolled.apply({"params": params}, tokens[:, :80], return_taps=True))(params)
    np.testing.assert_allclose(found, output.taps, atol=TOLERANCE, rtol=0)
    last = np.asarray(output.streams).mean(axis=2)
    np.testing.assert_allclose(output.taps[..., -last.shape[-1] :], last, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mesh", ["seq=2,expert=2,tensor=2", "data=4,tensor=2"])
def test_on_a_mesh(model, mesh, preset="long-context"):
    """A prompt that is split over the sequence's devices is read; then few tokens, which are not."""
    spread = OnMesh(model, mesh, preset)
    length = 1024 + 8
    rows = jax.random.randint(jax.random.key(3), (4, length + 1), 0, 64)
    lengths = jnp.asarray([1024, 1000, 130, 3])
    cache, expected_cache = (one.cache(4, length) for one in (spread, model))
    output = spread(rows[:, :1024], lengths=lengths, cache=cache, return_taps=True, logits="none")
    expected = model(rows[:, :1024], lengths=lengths, cache=expected_cache, return_taps=True, logits="none")
    for row, count in enumerate(lengths):
        np.testing.assert_allclose(output.taps[row, :count], expected.taps[row, :count], atol=TOLERANCE, rtol=0)
    anchors = jnp.take_along_axis(rows, lengths[:, None], axis=1)[:, 0]
    draft = spread(output.taps, anchors, lengths=lengths, cache=output.cache, method="dspark")
    same(draft, model(expected.taps, anchors, lengths=lengths, cache=expected.cache, method="dspark"))
    cache = spread(output.taps, lengths=lengths, cache=output.cache, method="dspark_read")
    expected_cache = model(expected.taps, lengths=lengths, cache=expected.cache, method="dspark_read")
    index = lengths[:, None] + jnp.arange(3)
    chunk, counts = jnp.take_along_axis(rows, index, axis=1), jnp.asarray([3, 1, 2, 3])
    found = []
    for one, read in ((spread, cache), (model, expected_cache)):
        output = one(chunk, lengths=counts, cache=read, return_taps=True)
        found.append(one(output.taps, anchors, lengths=counts, cache=output.cache, method="dspark"))
    same(*found)


ANCHORS = [[1, 7, 16, 17 + 6, 140], [9, 30, 60, 120, 154]]


def with_drafts(model, taps, rows, anchors):
    """What is drafted at each anchor, rows one after another; and the rows with those drafts in place of their own."""
    batch, blocks = anchors.shape
    repeated = (jnp.repeat(x, blocks, axis=0) for x in (taps, rows))
    found = whole(model, *repeated, anchors.reshape(-1))
    at = anchors[..., None] + 1 + jnp.arange(found.tokens.shape[1])
    drafted = rows.at[jnp.arange(batch)[:, None, None], at].set(found.tokens.reshape(at.shape), mode="drop")
    return found, drafted


def flat(draft):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), draft)


def test_known_rows(model, rows, taps):
    """Blocks at many places of a row at once, given the drafts: each as if its context were all that there is."""
    anchors = jnp.asarray(ANCHORS)
    expected, drafted = with_drafts(model, taps[:2], rows[:2], anchors)
    same(flat(model(taps[:2], drafted, anchors, method="dspark_known")), expected)


@pytest.fixture(scope="module")
def packed():
    """Rows of three documents, the last of which is padding, and blocks in both others."""
    rows = jax.random.randint(jax.random.key(4), (2, 256), 0, 64)
    at = jnp.arange(256)
    segments = jnp.stack([jnp.where(at < 250, 1 + (at > 130), 0), jnp.where(at < 200, 1 + (at > 7), 0)])
    return rows, segments, jnp.asarray([[1, 120, 132, 140, 240, -1], [3, 9, 126, 136, -1, 190]])


@pytest.mark.parametrize("mesh", [None, "data=2,seq=2,tensor=2"])
def test_known_rows_of_packed_documents(model, packed, mesh):
    """Each as in its own document alone, also where a block's context begins on another device."""
    rows, segments, anchors = packed
    spread = model if mesh is None else OnMesh(model, mesh, "train")
    taps = spread(rows, segment_ids=segments, return_taps=True, logits="none").taps
    found = spread(taps, rows, anchors, segment_ids=segments, method="dspark_known")
    for row, start, stop in ((0, 0, 131), (0, 131, 250), (1, 0, 8), (1, 8, 200)):
        blocks = np.flatnonzero((anchors[row] > start) & (anchors[row] < stop))
        alone, own = rows[row : row + 1, start:stop], anchors[row : row + 1, blocks] - start
        length = alone.shape[1]  # padded, so that all documents share a program
        alone = jnp.pad(alone, [(0, 0), (0, 200 - length)])
        own_taps = model(alone, lengths=jnp.asarray([length]), return_taps=True, logits="none").taps
        for block, anchor in zip(blocks, own[0], strict=True):
            expected = model(own_taps, alone, anchor[None, None], method="dspark_known")
            if anchor + 5 >= length:  # what is behind a document is no draft of it
                expected = jax.tree.map(lambda x: x[:, :, :1], expected)
            size = expected.logits.shape[2]
            one = jax.tree.map(lambda x, at=(row, block), n=size: x[at][None, None, :n], found)
            same(one, expected)


def test_refusals(model, rows):
    plain = models.three()
    with pytest.raises(ValueError, match="no DSpark stages"):
        plain(rows, return_taps=True)
    with pytest.raises(ValueError, match="no DSpark stages"):
        plain(jnp.zeros((1, 4, 96)), jnp.zeros(1, jnp.int32), method="dspark")
    with pytest.raises(ValueError, match=r"expected \[B, S, 96\] and \[B\]"):
        model(jnp.zeros((1, 4, 48)), jnp.zeros(1, jnp.int32), method="dspark")
    with pytest.raises(ValueError, match=r"expected \[B, S\] and \[B, A\]"):
        model(jnp.zeros((1, 4, 96)), jnp.zeros((1, 4), jnp.int32), jnp.zeros(1, jnp.int32), method="dspark_known")
    assert Config.flash_0731().dspark_stages == 3
