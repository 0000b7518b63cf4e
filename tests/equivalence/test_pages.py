"""A paged cache == one in which every row has room of its own, wherever its pages lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import TOLERANCE, OnMesh, make
from v4_jax.placement import Place

SIZES = (130, 1, 1, 128, 26, 1, 1)  # of chunks: over and short of what gathers a row's entries first
LENGTHS = ((130, 1, 0, 128, 13, 1, 1), (77, 0, 1, 51, 26, 0, 1))  # of two rows in them


@pytest.fixture(scope="module")
def three():
    """One layer of each role, of sizes that the released formats can hold."""
    layers = dict(num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1)
    return make(**layers, head_dim=72, index_head_dim=32)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(3).integers(0, 64, (2, sum(SIZES)))


def given_pages(cache, table):
    """The cache with a table, and in all pages large numbers that others might have left."""

    def used(array):
        many = np.full((*array.shape[:-1], array.shape[-1] * array.dtype.itemsize), 0x77, np.uint8)
        return jax.device_put(many.view(array.dtype), array.sharding)

    table = jax.device_put(np.array(table, np.int32), cache.table.sharding)
    return cache.replace(entries=jax.tree.map(used, cache.entries), table=table)


def fed(model, cache, tokens):
    """Logits of ragged chunks, one after another, where there are tokens."""
    logits = []
    for size, lengths in zip(SIZES, zip(*LENGTHS, strict=True), strict=True):
        begin = np.asarray(cache.lengths)[:, None]
        chunk = np.take_along_axis(tokens, np.minimum(begin + np.arange(size), tokens.shape[1] - 1), axis=1)
        output = model(chunk, cache=cache, lengths=np.array(lengths, np.int32))
        cache = output.cache
        logits += [output.logits[row, :count] for row, count in enumerate(lengths)]
    return np.concatenate(logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "released"])
def test_rows_in_any_pages(three, tokens, dtype):
    model = three if dtype != "released" else three._replace(model=three.model.clone(policy="released"))
    cache = Place().cache(three.config, 2, 384, dtype, pages=7)
    assert cache.nbytes()["csa"] == model.cache(1, 7 * 128, dtype).nbytes()["csa"]
    one, other = (
        fed(model, given_pages(cache, table), tokens) for table in ([[4, 0, 6], [2, 5, -1]], [[0, 1, 2], [3, 4, 5]])
    )
    np.testing.assert_array_equal(one, other)
    own = fed(model, model.cache(2, 384, dtype), tokens)
    if dtype == "float32":
        np.testing.assert_allclose(one, own, atol=TOLERANCE)
    assert np.abs(one - own).mean() < 1e-3  # what rounds stored keys may round a few of them the other way


@pytest.mark.parametrize(
    ("mesh", "table"),
    [
        ("seq=2,expert=2", [[4, 0], [2, -1]]),  # pages of 512 tokens
        ("data=2,tensor=2", [[1, 0], [1, -1]]),  # each row's numbers are those of its own devices
    ],
)
def test_on_a_mesh(three, tokens, mesh, table):
    spread = OnMesh(three, mesh, "decode")
    place = Place(spread.mesh, spread.preset)
    cache = place.cache(three.config, 2, 2 * place.page, "float32", pages=6)
    assert cache.table.shape == (2, 2) and int(cache.table.max()) == -1
    expected = fed(three, three.cache(2, 384), tokens)
    np.testing.assert_allclose(fed(spread, given_pages(cache, table), tokens), expected, atol=TOLERANCE)


def test_rows_without_pages_leave_those_of_others_alone(three, tokens):
    """A row beyond its pages loses its entries, and nobody else does."""
    cache = given_pages(Place().cache(three.config, 2, 384, "float32", pages=7), [[2, 0, 1], [-1, -1, -1]])
    expected = fed(three, three.cache(2, 384), tokens)
    firsts = np.concatenate([np.repeat([True, False], pair) for pair in zip(*LENGTHS, strict=True)])
    found = fed(three, cache, tokens)
    np.testing.assert_allclose(found[firsts], expected[firsts], atol=TOLERANCE)
    assert np.isfinite(found).all() and not np.allclose(found[~firsts][-1], expected[~firsts][-1], atol=TOLERANCE)


def test_what_is_not_finite_stays_with_its_row(three, tokens):
    """A row whose activations overflow leaves nothing in its pages that another row would notice."""
    expected = fed(three, three.cache(2, 384), tokens)
    table = [[1, 0, 2], [3, 4, -1]]
    cache = given_pages(Place().cache(three.config, 2, 384, "float32", pages=7), table)
    broken = three.params | {"embed": jnp.full_like(three.params["embed"], jnp.nan)}
    output = three._replace(params=broken)(tokens[:, :256], cache=cache)
    assert np.isnan(output.logits).all()
    used = cache.replace(entries=output.cache.entries)
    np.testing.assert_allclose(fed(three, used, tokens), expected, atol=TOLERANCE)
