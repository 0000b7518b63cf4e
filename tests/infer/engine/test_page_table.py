"""Pages given out and taken back."""

import numpy as np
import pytest

from v4_jax.infer.engine.page_table import PageTable


def test_shared_pages_go_back_with_their_last_owner():
    table = PageTable(slots=3, pages=6, longest=4, shards=1)
    table.give(0, 3)
    table.share(0, 1, 4, 2)
    assert table.used == 5 and table.array[2].tolist() == [-1] * 4
    assert table.array[1, :2].tolist() == table.array[0, :2].tolist()
    assert len({*table.array[0, 2:3], *table.array[1, 2:], *table.array[0, :2]}) == 5
    table.free(0)
    assert table.used == 4
    table.give(2, 2)
    assert not {*table.array[2, :2]} & {*table.array[1]}
    table.free(1)
    table.free(2)
    table.free(2)
    assert table.used == 0 and (table.array == -1).all()


@pytest.mark.parametrize(
    ("slots", "samples", "pages", "shared", "chosen"),
    [
        ([0, 1, 2, 3], 2, 2, 0, [0, 1]),
        ([1, 2, 3], 2, 2, 0, [2, 3]),  # in one shard, where they would share
        ([1, 3], 2, 2, 0, [1, 3]),
        ([0, 1, 2, 3], 3, 2, 0, [0, 1, 2]),
        ([0, 1, 2, 3], 4, 3, 0, []),  # a shard has room for one such sample
        ([0, 1, 2, 3], 4, 3, 2, [0, 1, 2, 3]),
        ([0, 1, 2, 3], 4, 3, 1, []),
        ([0, 1, 2, 3], 2, 3, 0, [0, 2]),
        ([0, 1, 2, 3], 1, 5, 4, []),
        ([0, 1, 2, 3], 2, 4, 4, [0, 1]),
        ([], 1, 1, 0, []),
    ],
)
def test_slots_are_chosen_where_there_are_pages(slots, samples, pages, shared, chosen):
    """Two shards of two slots and four pages each."""
    table = PageTable(slots=4, pages=8, longest=4, shards=2)
    assert table.choose(slots, samples, pages, shared) == chosen
    assert table.used == 0


def test_what_others_have_is_not_given():
    """A random history: nobody ever holds a page of another's, but for those that were shared."""
    rng, table, held = np.random.default_rng(0), PageTable(slots=8, pages=24, longest=6, shards=2), {}
    for _ in range(200):
        free = [slot for slot in range(8) if slot not in held]
        pages, samples = int(rng.integers(1, 7)), int(rng.integers(1, 4))
        shared = int(rng.integers(0, pages))
        chosen = table.choose(free, samples, pages, shared)
        if chosen:
            table.allocate(chosen, pages, shared)
            held |= dict.fromkeys(chosen, (pages, shared))
        else:
            assert not table.choose(free, samples, pages, 0)
        for slot in [slot for slot in held if rng.random() < 0.3]:
            del held[slot]
            table.free(slot)
        counts = (table.array >= 0).sum(axis=1)
        assert {slot: int(counts[slot]) for slot in np.flatnonzero(counts)} == {
            slot: pages for slot, (pages, _) in held.items()
        }
        everyones = [(table.shard(slot), page) for slot in held for page in set(table.array[slot].tolist()) - {-1}]
        own = [
            (table.shard(slot), page)
            for slot, (pages, shared) in held.items()
            for page in table.array[slot, shared:pages].tolist()
        ]
        assert len(own) == len(set(own)) and table.used == len(set(everyones)) <= 24
