"""Decisions that an engine keeps, piece by piece as tokens are read, for whoever replays them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from v4_jax.outputs import Routing


def piece(routing: Routing, row: int, count: int) -> Routing:
    """Decisions [layers, count, ...] for the first tokens of a row of [layers, B, S, ...], on the host."""

    def cut(x: Any) -> Any:
        return None if x is None else np.asarray(x[:, row, :count])

    return Routing(cut(routing.experts), cut(routing.entries))


def joined(pieces: Sequence[Routing]) -> Routing:
    """Pieces one after another; of entries as many columns as the widest has, with -1 where there is none."""
    experts: Any = np.concatenate([one.experts for one in pieces], axis=1)
    entries: Any = None
    if pieces[0].entries is not None:
        found: list[Any] = [one.entries for one in pieces]
        width = max(x.shape[-1] for x in found)
        padded = [np.pad(x, [(0, 0), (0, 0), (0, width - x.shape[-1])], constant_values=-1) for x in found]
        entries = np.concatenate(padded, axis=1)
    return Routing(experts, entries)
