"""Which entries a query picked, a bit each: for kernels that attend all entries and hide those that were not picked.

The entries of one step of the choice, at most 4,096, fit the bits of a row of words. To write them takes next to no
time, where to pack numbers together takes half of the choice's, and they are a quarter of the bytes.

Bit 8 r + s of word l is entry s * columns + 128 r + l, as scores lie in the registers that are compared (`cut.py`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.experimental import pallas as pl

from v4_jax.kernels.indexer.cut import LANES, SUBLANES, Cut, cut_of, entry_numbers
from v4_jax.kernels.indexer.threshold import kept


def supports(queries: int, entries: int) -> bool:
    """Whether there are bits for so many entries."""
    return cut_of(queries, entries).steps == 1


def bit_of(entry: Any, columns: int) -> Any:
    """The bit of an entry in its word, which is that of its lane."""
    return SUBLANES * (entry % columns // LANES) + entry // columns


class Marks(struct.PyTreeNode):
    """Picked entries of queries.

    Attributes:
      bits: [B, Q, 128] int32.
      count: entries in all.
      top: how many a query picks at most.
    """

    bits: Array
    count: int = struct.field(pytree_node=False)
    top: int = struct.field(pytree_node=False)

    @classmethod
    def of_numbers(cls, numbers: Array, count: int) -> Marks:
        """Those of [B, Q, K] int32 numbers of entries, -1 for none."""
        batch, queries, top = numbers.shape
        columns = cut_of(queries, count).columns
        bit = jnp.where(numbers < 0, 0, 1 << bit_of(jnp.maximum(numbers, 0), columns))
        row, query = jnp.arange(batch)[:, None, None], jnp.arange(queries)[:, None]
        bits = jnp.zeros((batch, queries, LANES), jnp.int32).at[row, query, numbers % LANES].add(bit)
        return cls(bits, count, top)

    def numbers(self) -> Array:
        """[B, Q, min(top, count)] int32 their numbers in order, -1 after the last."""
        columns = cut_of(self.bits.shape[1], self.count).columns
        places = bit_of(jnp.arange(0, SUBLANES * columns, LANES), columns)
        marked = (self.bits[:, :, None, :] >> places[:, None]) & 1
        marked = marked.reshape(*self.bits.shape[:2], -1)[..., : self.count] == 1
        found = jnp.sort(jnp.where(marked, jnp.arange(self.count, dtype=jnp.int32), self.count), axis=-1)
        return jnp.where(found < self.count, found, -1)[..., : self.top]


def numbers_of(picked: Array | Marks) -> Array:
    """[B, Q, K] int32 numbers of picked entries, -1 for none, given in whichever form."""
    return picked.numbers() if isinstance(picked, Marks) else picked


def mark(t: Any, ranks: Any, thresholds: Any, limits: Any, bits: Any, cut: Cut) -> None:
    """Writes the words of what query t keeps, of one step; see `packing.pack`."""
    words = jnp.zeros((SUBLANES, LANES), jnp.int32)
    for register in range(cut.columns // LANES):
        lanes = slice(register * LANES, (register + 1) * LANES)
        rank, number = ranks[t, :, lanes], entry_numbers(LANES, cut) + register * LANES
        words |= kept(rank, number, thresholds[t], limits[t]).astype(jnp.int32) << (SUBLANES * register)
    words = words << jax.lax.broadcasted_iota(jnp.int32, words.shape, 0)
    bits[pl.ds(t, 1), :] = jnp.sum(words, axis=0, keepdims=True)
