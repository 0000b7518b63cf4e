"""Which pages of the cache belong to which slot: allocated when a request is admitted, freed when it ends.

A request gets all pages that it may come to need, so that no other can keep it from going on. Samples of one prompt
share the pages that it fills, as far as their slots share a shard of the cache; a page goes back when its last owner
ends. Rows are split over shards (of a mesh's data axis), each with pages of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from v4_jax.cache.cache import CacheDtype
from v4_jax.config import Config
from v4_jax.infer.engine.history import History
from v4_jax.placement import Place, bytes_per_device


class PageTable:
    """The pages of one engine's cache.

    Args:
      slots: rows of the cache.
      pages: pages of the cache, all shards together.
      longest: pages that a row can have.
      shards: shards that rows and pages are split into.

    Attributes:
      array: [slots, longest] int32: the number of each page of each slot in its shard; -1 for none.
      changed: whether it is another one since somebody set this to False.
    """

    def __init__(self, slots: int, pages: int, longest: int, shards: int) -> None:
        self.array = np.full((slots, longest), -1, np.int32)
        self.changed = True
        self._owners = np.zeros((shards, pages // shards), int)
        self._slots = slots // shards  # of a shard

    def shard(self, slot: int) -> int:
        """Where a slot is."""
        return slot // self._slots

    @property
    def used(self) -> int:
        """Pages that belong to someone."""
        return int((self._owners > 0).sum())

    def choose(self, slots: Sequence[int], samples: int, pages: int, shared: int, *, empty: bool = False) -> list[int]:
        """Slots for the samples of a prompt: those of the fullest shard first, which then share the more.

        Args:
          slots: those that are free.
          samples: how many are wanted.
          pages: pages of each sample.
          shared: how many of these they can share.
          empty: as if no page belonged to anyone.

        Returns:
          The slots; [] if there are not enough slots or pages.
        """
        room = ((self._owners == 0) | empty).sum(axis=1).tolist()
        chosen: list[int] = []
        by_shard = [[slot for slot in slots if self.shard(slot) == shard] for shard in range(len(room))]

        def most(shard: int) -> int:
            own = pages - shared
            within = (room[shard] - shared) // own if own else len(by_shard[shard])
            return min(len(by_shard[shard]), within) if room[shard] >= pages else 0

        for shard in sorted(range(len(room)), key=most, reverse=True):
            chosen += by_shard[shard][: min(most(shard), samples - len(chosen))]
        return chosen if len(chosen) == samples else []

    def allocate(self, slots: Sequence[int], pages: int, shared: int) -> None:
        """Gives slots that were chosen `pages` each; those in one shard share the first `shared` of them."""
        owners: dict[int, int] = {}
        for slot in slots:
            owner = owners.setdefault(self.shard(slot), slot)
            if owner == slot:
                self.give(slot, pages)
            else:
                self.share(owner, slot, pages, shared)

    def give(self, slot: int, pages: int) -> None:
        """Gives a slot pages, to begin with."""
        self._hold(slot, 0, pages)

    def share(self, source: int, slot: int, pages: int, shared: int) -> None:
        """Gives a slot the first `shared` pages of another one of its shard, and free ones for the rest."""
        self.array[slot, :shared] = self.array[source, :shared]
        self._owners[self.shard(slot), self.array[slot, :shared]] += 1
        self._hold(slot, shared, pages)

    def free(self, slot: int) -> None:
        """Ends a slot's claim to its pages."""
        held = self.array[slot]
        self._owners[self.shard(slot), held[held >= 0]] -= 1
        self.array[slot] = -1
        self.changed = True

    def _hold(self, slot: int, begin: int, end: int) -> None:
        """Makes free pages those of a slot from number `begin` to `end`."""
        owners = self._owners[self.shard(slot)]
        free = np.flatnonzero(owners == 0)[: end - begin]
        owners[free] = 1
        self.array[slot, begin:end] = free
        self.changed = True


def pages_within(
    config: Config,
    slots: int,
    max_length: int,
    dtype: CacheDtype,
    budget: int,
    place: Place = Place(),  # noqa: B008 (frozen)
) -> int:
    """How many pages fit into `budget` bytes per device beside what each slot takes, at most those that slots can fill.

    A slot takes its windows, its open blocks and the counts that penalties look at.

    Args:
      config: the architecture.
      slots: rows.
      max_length: tokens that a row may reach.
      dtype: number format of the cache.
      budget: bytes of each device.
      place: the mesh.

    Raises:
      ValueError: no row could reach that length; the message has the numbers.
    """
    shards, longest = place.row_shards, place.pages(max_length)
    history = place.shapes(lambda: History.empty(slots, config.vocab_size))

    def size(pages: int) -> int:
        cache = place.cache_shapes(config, slots, max_length, dtype, pages=pages * shards)
        return bytes_per_device((cache, history))

    least, each = size(longest), size(longest + 1) - size(longest)
    if least > budget:
        raise ValueError(
            f"a cache of {budget:,} bytes per device has no room for {max_length:,} tokens: "
            f"{slots} slots with pages for one text of that length take {least:,} bytes; expected as much, fewer "
            "slots, or a shorter length"
        )
    more = (budget - least) // each if each else slots
    return shards * min(longest + more, longest * (slots // shards))
