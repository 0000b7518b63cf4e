"""How the work of choosing entries is cut, and which entry lies where.

Scores of a query fill the eight sublanes of its registers, so that counting costs a single query no more than its
share. Entry `(8 * step + sublane) * columns + i` of the visible steps lies in lane `step * columns + i`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

LANES, SUBLANES = 128, 8  # of a vector register
COLUMNS = 512  # keys of a sublane in a step, fewer where there are few keys
FOLD = 16  # entries of a group at most: 16 maxima fill the depth of a matrix unit when the chosen are packed
QUERIES = 16  # of a block
SCORES_BYTES = 34 << 20  # of a block's scores in VMEM
LEAST = -(2**31)  # below every score


class Cut(NamedTuple):
    """How the work is cut."""

    queries: int  # of a block
    columns: int  # keys of a sublane in a step
    steps: int  # for all keys
    group: int  # steps side by side in a chunk of columns: entries of a group lie one in each chunk

    @property
    def keys(self) -> int:
        """Keys of a step."""
        return SUBLANES * self.columns

    @property
    def chunk(self) -> int:
        """Columns of a chunk."""
        return self.group * self.columns

    @property
    def chunks(self) -> int:
        """Chunks of all keys: the chunks that a group has an entry in."""
        return pl.cdiv(self.steps, self.group)

    @property
    def shift(self) -> int:
        """Logarithm of the columns, to divide by: the sign that a division looks at lowers differently by chip."""
        return self.columns.bit_length() - 1


def cut_of(queries: int, entries: int) -> Cut:
    """The cut of the work of so many queries of a row, and so many entries."""
    columns = LANES
    while columns < min(COLUMNS, entries // SUBLANES):
        columns *= 2
    steps = pl.cdiv(entries, SUBLANES * columns)
    block = QUERIES
    while block > 1 and 4 * block * steps * SUBLANES * columns > SCORES_BYTES:
        block //= 2
    return Cut(min(queries, block), columns, steps, pl.cdiv(steps, FOLD))


def entry_numbers(columns: int, cut: Cut) -> Array:
    """Numbers [8, columns] of entries in the first lanes, counted from the first step."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, columns), 1)
    sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, columns), 0)
    return (SUBLANES * (lane >> cut.shift) + sublane) * cut.columns + (lane & (cut.columns - 1))


def rank_of(bits: Array) -> Array:
    """Float32 bits to integers of the same order, above `LEAST`; both zeros are 0. Its own inverse but for -0."""
    return jnp.where(bits < 0, LEAST - bits, bits)
