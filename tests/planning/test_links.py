"""How long collectives keep the links between chips."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from v4_jax.planning.hlo import Shape
from v4_jax.planning.hlo_collectives import Collective
from v4_jax.planning.links import Links
from v4_jax.sharding.chips import Topology

MB = Shape("s8", (1_000_000,), 1)  # a megabyte
TAKES = 1e6 / 100e9  # seconds that a link of v5p, v6e and tpu7x takes for it: half of that of v5e


def slice_of(name: str) -> tuple[Links, np.ndarray]:
    """A slice whose devices are numbered by place, the last axis of the wires and the halves of a chip innermost; and
    those numbers as they lie."""
    topology = Topology.parse(name)
    places = list(itertools.product(*map(range, topology.shape)))
    devices = [SimpleNamespace(coords=(*place, 0, 0)[:3]) for place in places for _ in range(topology.chip.devices)]
    numbers = np.arange(topology.devices).reshape(*topology.shape, topology.chip.devices)
    return Links.between(devices, topology), numbers


def links_taken(name: str, kind: str, along: tuple[int, ...]) -> float:
    """Time for a megabyte of results, of groups that lead along some axes, as megabytes over one link."""
    links, numbers = slice_of(name)
    groups = np.moveaxis(numbers, along, range(-len(along), 0)).reshape(-1, np.prod([numbers.shape[n] for n in along]))
    return links.seconds(Collective(kind, (MB,), tuple(map(tuple, groups.tolist())), 1, False, "")) / TAKES


@pytest.mark.parametrize(
    ("name", "kind", "along", "expected"),
    [
        # In a ring half of what others hold comes from either side; in a row all of it from one to the end.
        ("v5p:4x4x8", "all-gather", (2,), 7 / 8 / 2),
        ("v5p:4x4x8", "all-gather", (0, 1, 2), 127 / 128 / 6),
        ("v5p:4x4x8", "all-reduce", (0, 1), 2 * 15 / 16 / 4),
        ("v5p:2x2x2", "all-gather", (0, 1, 2), 7 / 8 / 3),
        ("v6e:2x4", "all-reduce", (0, 1), 2 * 7 / 8 / 2),
        ("v6e:16x16", "reduce-scatter", (0,), 15 / 2),  # results of a sixteenth
        ("v5e:4x8", "all-gather", (1,), 2 * 7 / 8),
        # To each of 8 in a ring, two hops on the mean, on two links; in a row half of all chips send half of theirs
        # over the link in the middle.
        ("v5p:4x4x8", "all-to-all", (2,), 1.0),
        ("v5p:4x4x8", "ragged-all-to-all", (0, 1, 2), 1.0),
        ("v5p:4x4x4", "all-to-all", (0, 1, 2), 0.5),
        ("v6e:4x4", "all-to-all", (0, 1), 1.0),
        ("v5e:4x8", "all-to-all", (1,), 2 * 2.0),
        # Halves of a chip share its links, and have more between them.
        ("tpu7x:2x2x1", "all-gather", (2, 3), 1 / 2 / 6),
        ("tpu7x:2x2x1", "all-gather", (0, 1, 3), 7 / 8 / 2),
        ("tpu7x:2x2x1", "all-gather", (0, 1), 2 * 3 / 4 / 2),
        ("tpu7x:4x4x8", "all-to-all", (2,), 2.0),
    ],
)
def test_the_busiest_link(name, kind, along, expected):
    assert links_taken(name, kind, along) == pytest.approx(expected)


def test_groups_with_gaps_share_the_links_between():
    """Every other chip of a ring of 8: two groups, each hop over two links."""
    links, numbers = slice_of("v5p:4x4x8")
    even, odd = (tuple(map(tuple, numbers[..., first::2, 0].reshape(-1, 4).tolist())) for first in (0, 1))
    gather = Collective("all-gather", (MB,), even + odd, 1, False, "")
    exchange = Collective("all-to-all", (MB,), even + odd, 1, False, "")
    assert links.seconds(gather) == pytest.approx(3 / 4 / (2 / 2) * TAKES)
    assert links.seconds(exchange) == pytest.approx(2 * 4 / 8 * TAKES)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(n, (n + 1) % 8) for n in range(8)], 1.0),
        ([(n, (n + 7) % 8) for n in range(8)], 1.0),
        ([(n, (n + 4) % 8) for n in range(8)], 2.0),  # half of it each way
        ([(n, 7 - n) for n in range(8)], 2.0),  # those at both ends meet over the wire between them
        ([(n, n) for n in range(8)], 0.0),
    ],
)
def test_a_permute_takes_the_shortest_way(pairs, expected):
    links, _ = slice_of("v5p:4x4x8")
    permute = Collective("collective-permute", (MB,), tuple(pairs), 1, False, "")
    assert links.seconds(permute) == pytest.approx(expected * TAKES)


def test_a_slice_lies_anywhere_in_a_pod():
    topology = Topology.parse("v6e:2x4")
    devices = [SimpleNamespace(coords=(4 + x, 8 + y, 0)) for x in range(2) for y in range(4)]
    assert Links.between(devices, topology) == slice_of("v6e:2x4")[0]


def test_where_a_slice_wraps():
    for name, expected in (
        ("v5p:4x4x8", (True,) * 3),
        ("v5p:2x4x4", (False,) * 3),
        ("v5e:8x16", (False, True)),
        ("v6e:4x8", (False, False)),
    ):
        assert Topology.parse(name).wraps == expected
