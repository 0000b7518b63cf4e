"""Compressed entries and index keys: what a layer keeps for good, one for every few tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from v4_jax.architecture import RATIO_OF_ROLE
from v4_jax.cache.rows import LANES, StoredRows, batch_rows
from v4_jax.natural import quotient, remainder
from v4_jax.sharding import collectives
from v4_jax.sharding.collectives import Axes

# The entries of CSA layers, their index keys, and the entries of HCA layers.
EntryRole = Literal["csa", "index", "hca"]

# Tokens for each entry.
ENTRY_RATIOS: dict[EntryRole, int] = {
    "csa": RATIO_OF_ROLE["csa"],
    "index": RATIO_OF_ROLE["csa"],
    "hca": RATIO_OF_ROLE["hca"],
}

PAGE = math.lcm(*ENTRY_RATIOS.values())  # tokens, whose blocks all end where it does

OVERLAPPING_RATIO = 4

TILE = 8, LANES  # of words in a TPU's memory


def span(ratio: int) -> int:
    """Tokens that enter one compressed entry: its own block and, where blocks overlap, the one before."""
    return 2 * ratio if ratio == OVERLAPPING_RATIO else ratio


def projection_width(ratio: int, width: int) -> int:
    """Channels of a token's projections for entries of `width`: values and gates, once per block that it enters."""
    return 2 * width * span(ratio) // ratio


def here(number: Array, axes: Axes) -> Array:
    """How many of the entries before `number` lie on this device, if they are spread over `axes`; see `Entries`."""
    devices = collectives.size(axes)
    return number if devices == 1 else quotient(number + devices - 1 - collectives.index(axes), devices)


class Entries(struct.PyTreeNode):
    """One layer's compressed entries, in order.

    Spread over devices they lie round robin, number n on device n mod devices, so that every device holds the same
    share at any length. A number is a row's own count of its entries, a local number a row's count of those on this
    device. An entry lies where the row's table says that its page does; without a table, at its local number.

    Attributes:
      rows: the role's rows, all layers: [L, B, local numbers] without a table, [L, 1, places] with one.
      layer: which of them this is.
      dtype: dtype that is read.
      axes: mesh axes over which the entries are spread.
      table: [B, pages] int32 which page of the rows each page of a row is; -1 for none.
      page: entries of a page, on this device.
      parts: of how many devices the rows hold the entries, one device's after another's; 1 holds them in order.
      each: int32 places of such a part.
    """

    rows: StoredRows
    layer: Any
    dtype: Any = struct.field(pytree_node=False)
    axes: Axes = struct.field(pytree_node=False, default=())
    table: Array | None = None
    page: int = struct.field(pytree_node=False, default=0)
    parts: int = struct.field(pytree_node=False, default=1)
    each: Array | None = None

    @classmethod
    def uncached(cls, entries: Array) -> Entries:
        """Wraps entries [B, E, C] that live in no cache, differentiably.

        They are held in float32, in which the gradients that reach an entry from all query blocks are then added up.
        """
        return cls(StoredRows((entries[None].astype(jnp.float32),), dtype=jnp.float32), 0, entries.dtype)

    @property
    def cached(self) -> bool:
        """Whether they live in a cache. Of others, which are whole rows', queries see a half on the mean."""
        alone = self.table is None and isinstance(self.layer, int)
        return not (alone and self.rows.kind == "plain" and self.rows.dtype == jnp.float32)

    @property
    def count(self) -> int:
        """Entries of a row that this device can hold."""
        return self.rows.shape[2] if self.table is None else self.table.shape[1] * self.page

    def local(self, numbers: Array) -> Array:
        """Local numbers of entries; -1 for those that lie on other devices, and for -1."""
        devices = collectives.size(self.axes)
        here = (numbers >= 0) & (remainder(numbers, devices) == collectives.index(self.axes))
        return jnp.where(here, quotient(numbers, devices), -1)

    def numbers(self, local: Array) -> Array:
        """Numbers of the entries with these local numbers; -1 for -1."""
        return jnp.where(local >= 0, local * collectives.size(self.axes) + collectives.index(self.axes), -1)

    def places(self, rows: Array, local: Array) -> tuple[Any, Array]:
        """Where entries of batch rows lie in the arrays: rows and places there.

        Args:
          rows: int32, broadcast with `local`.
          local: int32 local numbers; the place of one out of range, or without a page, is the one after the last.
        """
        if self.table is None:
            place = local
            if self.each is not None:
                place = remainder(local, self.parts) * self.each + quotient(local, self.parts)
            return rows, jnp.where((local < 0) | (local >= self.count), self.count, place)
        page = self.table[rows, jnp.clip(quotient(local, self.page), 0, self.table.shape[1] - 1)]
        real = (page >= 0) & (local >= 0) & (local < self.count)
        return 0, jnp.where(real, page * self.page + remainder(local, self.page), self.rows.shape[2])

    def write(self, numbers: Array, entries: Array) -> Entries:
        """Stores `entries` [B, E, C] as `numbers` [B, E], dropping those out of range or of other devices.

        What is not finite is stored as zero: pages go from row to row, and zero times NaN, or infinity, is not zero. A
        row that has come to it is not cured, as its window has it too.
        """
        entries = jnp.where(jnp.isfinite(entries), entries, 0)
        rows, places = self.places(batch_rows(numbers, 1), self.local(numbers))
        return self.replace(rows=self.rows.write(self.layer, rows, places, entries))

    def gather(self, local: Array) -> Array:
        """Entries with local numbers [B, Q, K] (-1 reads an arbitrary one): [B, Q, K, C]."""
        rows, places = self.places(batch_rows(local, 2), jnp.maximum(local, 0))
        return self.rows.read(self.layer, rows, jnp.minimum(places, self.rows.shape[2] - 1), self.dtype)

    def all_gather(self, limit: Array, everywhere: Axes) -> Entries:
        """The layer's entries of all devices on each, in stored form; numbers are then local numbers.

        Those that are read one by one stay as they come, a device's after another's: to mix them is to copy all.

        Args:
          limit: int32 entries that any row of this device needs.
          everywhere: mesh axes whose devices must agree on how much to send.

        Only as much travels as the fullest row of all devices needs, rounded up to a sixteenth, a quarter or all of
        the room.
        """
        if not self.axes:
            return self
        devices, unit = collectives.size(self.axes), 1 if self.table is None else self.page
        sizes = sorted({-(-self.count // (parts * unit)) * unit for parts in (16, 4, 1)})

        own = self._alone() if self.table is None else self
        mixed = self.rows.kind != "words"

        def gathered(count: int) -> Callable[[tuple[Array, ...]], tuple[Array, ...]]:
            def gather(array: Array) -> Array:
                cut = own._cut(array, 0, count)
                among, (batch, _, *channels) = 2 if mixed else 1, cut.shape
                if not mixed and math.gcd(count, self.count) * math.prod(channels) % math.prod(TILE) == 0:
                    cut = cut.reshape(batch, -1, *TILE)  # whole tiles, which travel without being copied
                # Mixed, numbers rise along devices, then along local ones.
                rows = collectives.all_gather(jnp.expand_dims(cut, among), self.axes, among)
                rows = rows.reshape(1, batch, devices * cut.shape[1], *cut.shape[2:])
                size = *rows.shape[:2], rows.shape[2] * self.count // count, *rows.shape[3:]
                # Of those that are read one by one, what follows is nobody's.
                room = jnp.zeros(size, rows.dtype) if mixed else jax.lax.empty(size, rows.dtype)
                rows = jax.lax.dynamic_update_slice(room, rows, (0,) * rows.ndim)
                return rows.reshape(1, batch, devices * self.count, *channels)

            return lambda arrays: tuple(gather(array) for array in arrays)

        limit = collectives.pmax(limit, everywhere)
        enough = sum((limit > count * devices).astype(jnp.int32) for count in sizes[:-1])
        arrays = jax.lax.switch(enough, [gathered(count) for count in sizes], own.rows.arrays)
        found = Entries(self.rows.replace(arrays=arrays), 0, self.dtype)
        return found if mixed else found.replace(parts=devices, each=jnp.asarray(sizes, jnp.int32)[enough])

    def _alone(self) -> Entries:
        """The layer's entries, without those of other layers; of entries that have no pages.

        Behind the barrier they are laid out anew, where a switch wants that, and not all layers' in each of them.
        """
        arrays = tuple(jax.lax.dynamic_slice_in_dim(array, self.layer, 1) for array in self.rows.arrays)
        return self.replace(rows=self.rows.replace(arrays=jax.lax.optimization_barrier(arrays)), layer=0)

    def block(self, first: Any, size: int) -> Array:
        """Entries with local numbers [first, first + size) of every row: [B, size, C].

        `first + size` must not exceed `count`; where there are pages, both are multiples of `page`.
        """
        if self.each is not None:
            local = first + jnp.arange(size, dtype=jnp.int32)
            return self.gather(jnp.broadcast_to(local, (self.rows.shape[1], 1, size)))[:, 0]
        return self.rows.decode(tuple(self._cut(array, first, size) for array in self.rows.arrays), self.dtype)

    def _cut(self, array: Array, first: Any, size: int) -> Array:
        """The same of one stored part."""
        channels = array.shape[3:]
        if self.table is None:
            starts = (self.layer, 0, first, *(0 for _ in channels))
            return jax.lax.dynamic_slice(array, starts, (1, array.shape[1], size, *channels))[0]
        pages = jax.lax.dynamic_slice_in_dim(self.table, first // self.page, size // self.page, axis=1)
        whole = array.reshape(array.shape[0], -1, self.page, *channels)[self.layer, jnp.maximum(pages, 0)]
        return whole.reshape(pages.shape[0], size, *channels)
