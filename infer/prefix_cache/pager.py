"""Moves pages between the engine's slots and the prefix cache: what to copy, by which programs, and when.

Pages leave the devices while the next step runs, and are taken in by the host a round later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from v4_jax.cache.cache import Cache, CacheDtype
from v4_jax.cache.entries import PAGE
from v4_jax.cache.pages import (
    Parts,
    entries_of,
    page_sizes,
    put,
    resized,
    ring_places,
    tail_sizes,
    take,
    tokens_to_refill,
)
from v4_jax.cache.ring import SPARE
from v4_jax.cache.rows import StoredRows
from v4_jax.config import Config
from v4_jax.infer.prefix_cache.cache import Keeping, PrefixCache, Trail, root_of
from v4_jax.infer.prefix_cache.store import Item
from v4_jax.placement import Place
from v4_jax.policy import Policy

_FORMAT = 2  # of pages and tails in a directory: those of another are not found


class Kept(NamedTuple):
    """Copies from some rows: several pages of each, one after another, and several tails."""

    pages: Parts
    tails: Parts


class _Copied(NamedTuple):
    """What of `kept`, still on the devices, is to be kept under which key.

    Attributes:
      pages: (key, row, number among the row's pages).
      tails: likewise.
      kept: the copies.
    """

    pages: list[tuple[bytes, int, int]]
    tails: list[tuple[bytes, int, int]]
    kept: Kept


class Beginning(NamedTuple):
    """How much of a prompt a slot holds.

    Attributes:
      begin: tokens that it has read, as it were.
      sealed: tokens whose entries it holds.
      trail: the hashes of the prompt, but for its last token.
    """

    begin: int
    sealed: int
    trail: Trail


class Pager:
    """The pages of one engine.

    Args:
      keeping: what is kept, and where.
      config: the architecture.
      params: its parameters.
      cache: the shapes of the engine's cache.
      chunk: prompt tokens that the engine reads at once, a multiple of `PAGE`.
      draft: tokens that it drafts.
      policy: its precision.
      cache_dtype: its cache's number format.
      place: where it runs.

    Raises:
      OSError: the directory cannot be made or read.
      ValueError: a directory, which several processes would not find alike.
    """

    def __init__(
        self,
        keeping: Keeping,
        config: Config,
        params: Any,
        cache: Cache,
        *,
        chunk: int,
        draft: int,
        policy: str | Policy,
        cache_dtype: CacheDtype,
        place: Place,
    ) -> None:
        if keeping.directory is not None and jax.process_count() > 1:
            raise ValueError(
                f"a directory for the prefix cache, {keeping.directory}, and {jax.process_count()} processes that run "
                "one engine; expected one process, or the prefix cache in memory alone"
            )
        self._place, self._chunk, self._draft, self._every = place, chunk, draft, keeping.every
        self._pages, self._tails = page_sizes(cache), tail_sizes(cache, config, draft=draft > 0)
        self._at_once = chunk // PAGE  # pages
        self._windows = -(-chunk // keeping.every) if keeping.every else 0  # tails of a chunk
        parts = [_FORMAT, config.to_hf(), str(Policy.of(policy)), cache_dtype, draft > 0]
        root = root_of(parts, None if keeping.directory is None else params)
        self.store = PrefixCache(keeping, root, tokens_to_refill(config, draft=draft > 0))
        self._copied: list[_Copied] = []
        self._empty_tail = {role: self._zeros(cache.rings[role], size) for role, size in self._tails.items()}
        self._empty_pages = {
            role: self._zeros(cache.entries[role], size * self._at_once) for role, size in self._pages.items()
        }

    @staticmethod
    def _zeros(held: StoredRows, size: int) -> tuple[np.ndarray, ...]:
        return tuple(np.zeros((array.shape[0], size, array.shape[3]), array.dtype) for array in held.arrays)

    # ---- within programs ---------------------------------------------------------------------------------------------

    def widened(self, cache: Cache) -> Cache:
        """Rows in whose rings all tails of a chunk will be readable."""
        return resized(cache, self._chunk, self._tails)

    def read(self, cache: Cache, begin: Array) -> tuple[Cache, Kept]:
        """Copies of what a chunk completed.

        Args:
          cache: as `widened`, with the chunk read: P rows.
          begin: [P] int32 tokens in each before.

        Returns:
          The rows as they were before they were widened, and the copies.
        """
        rows = jnp.arange(begin.shape[0], dtype=jnp.int32)
        pages = take(cache, "entries", rows, entries_of(begin // PAGE, self._at_once, self._pages), self._place)
        tails: Parts = {}
        if self._windows:
            ends = ((begin // self._every)[:, None] + 1 + jnp.arange(self._windows, dtype=jnp.int32)) * self._every
            index = ring_places(ends, cache, self._tails)
            index = {role: slots.reshape(rows.shape[0], -1) for role, slots in index.items()}
            tails = take(cache, "rings", rows, index, self._place)
        return resized(cache, -self._chunk, self._tails), Kept(pages, tails)

    # ---- programs ----------------------------------------------------------------------------------------------------

    def compile(self, state: Any, places: Any) -> int:
        """Compiles the programs for slots like `state`, which lie on `places`. Returns how many there are."""
        place = self._place

        def shapes(tree: Any) -> Any:
            return place.shapes(lambda: jax.tree.map(jnp.asarray, tree))

        scalar, tokens = place.shape((), jnp.int32), place.shape((self._at_once * PAGE,), jnp.int32)
        copy = jax.jit(self._copy, out_shardings=place.replicated)
        put_pages = jax.jit(self._put_pages, donate_argnums=0, out_shardings=places)
        put_tail = jax.jit(self._put_tail, donate_argnums=0, out_shardings=places)
        for program, arguments in (
            (copy, (state, scalar, scalar)),
            (put_pages, (state, scalar, scalar, scalar, tokens, shapes(self._empty_pages))),
            (put_tail, (state, scalar, scalar, shapes(self._empty_tail))),
        ):
            program.lower(*arguments).compile()
        self._run_copy, self._run_put_pages, self._run_put_tail = copy, put_pages, put_tail
        return 3

    def _copy(self, state: Any, slot: Array, end: Array) -> Kept:
        """Copies of the page of a slot that ends before token `end`, and of its tail."""
        rows, first = slot[None], end[None] // PAGE - 1
        pages = take(state.cache, "entries", rows, entries_of(first, 1, self._pages), self._place)
        if not self._every:
            return Kept(pages, {})
        return Kept(
            pages, take(state.cache, "rings", rows, ring_places(end[None], state.cache, self._tails), self._place)
        )

    def _put_pages(self, state: Any, slot: Array, first: Array, count: Array, tokens: Array, parts: Parts) -> Any:
        """Puts pages [first, first + count), which are those of `tokens`, into a slot; page 0 begins it anew."""
        cache = put(
            state.cache, "entries", slot, entries_of(first, self._at_once, self._pages, count), parts, self._place
        )
        history = state.history.read(slot[None], tokens[None], PAGE * count[None], PAGE * first[None])
        return state._replace(cache=cache, history=history)

    def _put_tail(self, state: Any, slot: Array, end: Array, tail: Parts) -> Any:
        """Puts the tail that ends before token `end` into a slot, which then holds so many tokens."""
        cache = put(state.cache, "rings", slot, ring_places(end, state.cache, self._tails), tail, self._place)
        lengths, draft_lengths = (x.at[slot].set(end) for x in (cache.lengths, cache.draft_lengths))
        return state._replace(cache=cache.replace(lengths=lengths, draft_lengths=draft_lengths))

    # ---- on the host -------------------------------------------------------------------------------------------------

    def begin(self, state: Any, slot: int, prompt: Sequence[int]) -> tuple[Any, Beginning]:
        """Puts into a slot what there is of a prompt; its last token is always left to read. Returns the state too."""
        self.settle()
        trail = self.store.trail(prompt[:-1])
        keys, held = trail.keys, 0
        while True:
            plan = self.store.plan(keys)
            if not plan.begin:
                return state, Beginning(0, 0, trail)
            tail = self.store.tail(plan)
            if plan.tail is not None and tail is None:
                continue  # it was lost, which the next plan knows
            state, held = self._put(state, slot, keys[: plan.pages], prompt, held)
            if held >= plan.pages:
                break
            keys = keys[:held]
        parts = self._empty_tail if tail is None else _parts(tail, self._tails)
        numbers = (np.int32(slot), np.int32(plan.begin))
        state = self._run_put_tail(state, *self._place.put((*numbers, parts)))
        self.store.used(keys[: plan.pages])
        return state, Beginning(plan.begin, PAGE * plan.pages, trail)

    def _put(self, state: Any, slot: int, keys: Sequence[bytes], prompt: Sequence[int], held: int) -> tuple[Any, int]:
        """Puts pages into a slot that has the first `held` already. Returns how many it has, up to one that is lost."""
        while held < len(keys):
            found: list[Item] = []
            for key in keys[held : held + self._at_once]:
                item = self.store.page(key)
                if item is None:
                    break
                found.append(item)
            if not found:
                break
            tokens = np.zeros(self._at_once * PAGE, np.int32)
            tokens[: len(found) * PAGE] = prompt[held * PAGE : (held + len(found)) * PAGE]
            parts = {}
            for role, empty in self._empty_pages.items():
                columns = zip(empty, *(_parts(item, self._pages)[role] for item in found), strict=True)
                parts[role] = tuple(_filled(whole, pieces) for whole, *pieces in columns)
            numbers = tuple(np.int32(x) for x in (slot, held, len(found)))
            state = self._run_put_pages(state, *self._place.put((*numbers, tokens, parts)))
            held += len(found)
        return state, held

    def chunk_read(self, kept: Kept, rows: Sequence[tuple[int, Trail, int, int]]) -> None:
        """Keeps what a chunk completed.

        Args:
          kept: copies from its rows.
          rows: (row, its trail, tokens before the chunk, tokens after it).
        """
        copied = _Copied([], [], kept)
        for row, trail, begin, end in rows:
            for number in range(begin // PAGE, end // PAGE):
                key, ends = trail.keys[number], PAGE * (number + 1)
                if self.store.wants_page(key):
                    copied.pages.append((key, row, number - begin // PAGE))
                if self.store.wants_tail(key, ends):
                    copied.tails.append((key, row, ends // self._every - begin // self._every - 1))
        self._keep(copied)

    def generated(self, state: Any, slot: int, trail: Trail) -> None:
        """Keeps the page that a slot has just completed by generating; one more step may have started since."""
        key, ends = trail.keys[-1], PAGE * len(trail.keys)
        # Tokens and drafts that the steps so far may have written, in the trunk's and in the block's windows.
        reach = len(trail) + max(1 + self._draft, 2 * self._draft)
        tail = self.store.wants_tail(key, ends) and reach <= ends + SPARE
        if tail or self.store.wants_page(key):
            kept = self._run_copy(state, *self._place.put((np.int32(slot), np.int32(ends))))
            self._keep(_Copied([(key, 0, 0)], [(key, 0, 0)] if tail else [], kept))

    def _keep(self, copied: _Copied) -> None:
        if copied.pages or copied.tails:
            jax.tree.map(lambda x: x.copy_to_host_async(), copied.kept)
            self._copied.append(copied)

    def settle(self, leaving: int = 0) -> None:
        """Takes in what was copied, but for the last `leaving`, which may still be on their way."""
        while len(self._copied) > leaving:
            pages, tails, kept = self._copied.pop(0)
            kept = jax.device_get(kept)
            for key, row, number in pages:
                self.store.put_page(key, _item(kept.pages, self._pages, row, number))
            for key, row, number in tails:
                self.store.put_tail(key, _item(kept.tails, self._tails, row, number))

    def close(self) -> None:
        """Takes in everything, and waits until it is written."""
        self.settle()
        self.store.close()


def _item(parts: Parts, sizes: Mapping[Any, int], row: int, number: int) -> Item:
    """One page or tail of several."""

    def cut(array: Any, size: int) -> np.ndarray:
        return np.array(array[:, row, number * size : (number + 1) * size])

    return {f"{role}.{i}": cut(array, size) for role, size in sizes.items() for i, array in enumerate(parts[role])}


def _parts(item: Item, sizes: Mapping[Any, int]) -> dict[str, tuple[np.ndarray, ...]]:
    """Inverse of `_item`."""
    found: dict[str, tuple[np.ndarray, ...]] = {}
    for role in sizes:
        names = sorted(name for name in item if name.rpartition(".")[0] == role)
        found[role] = tuple(item[name] for name in names)
    return found


def _filled(whole: np.ndarray, pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Pages one after another, and zeros in place of those that are missing."""
    used = np.concatenate(pieces, axis=1)
    return used if used.shape == whole.shape else np.concatenate([used, whole[:, used.shape[1] :]], axis=1)
