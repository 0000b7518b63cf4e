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
from v4_jax.cache.pages import Parts, entry_numbers, page_sizes, put, resized, ring_places, take
from v4_jax.cache.ring import SPARE
from v4_jax.cache.rows import StoredRows
from v4_jax.config import Config
from v4_jax.infer.engine.drafters import Drafter
from v4_jax.infer.engine.state import State
from v4_jax.infer.prefix_cache.cache import PrefixCache, PrefixCacheOptions
from v4_jax.infer.prefix_cache.hashes import BlockHashes, root_hash
from v4_jax.infer.prefix_cache.store import Item
from v4_jax.placement import Place
from v4_jax.policy import Policy

_FORMAT = 4  # of pages and tails in a directory: those of another are not found


class PageCopies(NamedTuple):
    """Copies from some rows, by role: several pages of each row, one after another, and several tails likewise.

    Attributes:
      pages: [layers, rows, pages x entries of a page, channels] arrays.
      tails: [layers, rows, tails x tokens of a tail, channels] arrays; empty if no tails are kept.
    """

    pages: Parts
    tails: Parts


class _Copied(NamedTuple):
    """Where among some copies something lies that is to be kept.

    Attributes:
      key: the hash that it is kept under.
      row: of the copies.
      number: among the row's pages, or tails.
    """

    key: bytes
    row: int
    number: int


class _PendingSave(NamedTuple):
    """Copies on their way to the host, and what of them is to be kept."""

    pages: list[_Copied]
    tails: list[_Copied]
    copies: PageCopies


class PrefilledChunk(NamedTuple):
    """A chunk of a prompt that has just been read.

    Attributes:
      row: of the chunk's program.
      hashes: of the prompt.
      begin: tokens of the prompt before the chunk.
      end: tokens of the prompt after it.
    """

    row: int
    hashes: BlockHashes
    begin: int
    end: int


class LoadedPrefix(NamedTuple):
    """How much of a prompt a slot holds.

    Attributes:
      tokens: that need not be read.
      sealed: tokens whose entries it holds, of which those beyond `tokens` are read again to refill windows.
      hashes: of the prompt, but for its last token.
    """

    tokens: int
    sealed: int
    hashes: BlockHashes


class Pager:
    """The pages of one engine.

    Args:
      options: what is kept, and where.
      config: the architecture.
      params: its parameters.
      cache: the shapes of the engine's cache.
      chunk: prompt tokens that the engine reads at once, a multiple of `PAGE`.
      drafter: what guesses tokens, perhaps with a part of the cache.
      policy: its precision.
      cache_dtype: its cache's number format.
      place: where it runs.

    Attributes:
      prefix_cache: what is kept.

    Raises:
      OSError: the directory cannot be made or read.
      ValueError: a directory, which several processes would not find alike.
    """

    def __init__(
        self,
        options: PrefixCacheOptions,
        config: Config,
        params: Any,
        cache: Cache,
        *,
        chunk: int,
        drafter: Drafter,
        policy: str | Policy,
        cache_dtype: CacheDtype,
        place: Place,
    ) -> None:
        if options.directory is not None and jax.process_count() > 1:
            raise ValueError(
                f"a directory for the prefix cache, {options.directory}, and {jax.process_count()} processes that run "
                "one engine; expected one process, or the prefix cache in memory alone"
            )
        self._place, self._chunk, self._drafter, self._every = place, chunk, drafter, options.every
        self._pages, self._tails = page_sizes(cache), drafter.tail_sizes(cache, config)
        self._pages_of_chunk = chunk // PAGE
        self._tails_of_chunk = -(-chunk // options.every) if options.every else 0
        settings = [_FORMAT, config.to_hf(), str(Policy.of(policy)), cache_dtype, drafter.kind]
        root = root_hash(settings, None if options.directory is None else params)
        self.prefix_cache = PrefixCache(options, root, drafter.tokens_to_refill(config))
        self._pending: list[_PendingSave] = []
        self._empty_tail = {role: _zeros(cache.rings[role], size) for role, size in self._tails.items()}
        self._empty_pages = {
            role: _zeros(cache.entries[role], size * self._pages_of_chunk) for role, size in self._pages.items()
        }

    # ---- within programs ---------------------------------------------------------------------------------------------

    def widened(self, cache: Cache) -> Cache:
        """Rows in whose rings all tails of a chunk will be readable."""
        return resized(cache, self._chunk, self._tails)

    def copy_chunk(self, cache: Cache, begin: Array) -> tuple[Cache, PageCopies]:
        """Copies of what a chunk completed.

        Args:
          cache: as `widened`, with the chunk read: P rows.
          begin: [P] int32 tokens in each before.

        Returns:
          The rows as they were before they were widened, and the copies.
        """
        rows = jnp.arange(begin.shape[0], dtype=jnp.int32)
        pages = take(
            cache, "entries", rows, entry_numbers(begin // PAGE, self._pages_of_chunk, self._pages), self._place
        )
        tails: Parts = {}
        if self._tails_of_chunk:
            following = 1 + jnp.arange(self._tails_of_chunk, dtype=jnp.int32)
            ends = ((begin // self._every)[:, None] + following) * self._every
            places = ring_places(ends, cache, self._tails)
            index = {role: each.reshape(rows.shape[0], -1) for role, each in places.items()}
            tails = take(cache, "rings", rows, index, self._place)
        return resized(cache, -self._chunk, self._tails), PageCopies(pages, tails)

    # ---- programs ----------------------------------------------------------------------------------------------------

    def compile(self, state: State, places: State | None) -> int:
        """Compiles the programs.

        Args:
          state: the shapes of what the slots hold.
          places: where each of these arrays lies, as shardings; None is the default device.

        Returns:
          How many programs there are.
        """
        place = self._place

        def shapes(tree: Any) -> Any:
            return place.shapes(lambda: jax.tree.map(jnp.asarray, tree))

        scalar, tokens = place.shape((), jnp.int32), place.shape((self._pages_of_chunk * PAGE,), jnp.int32)
        self._run_copy = jax.jit(self._copy, out_shardings=place.replicated)
        self._run_copy.lower(state, scalar, scalar).compile()
        self._run_put_pages = jax.jit(self._put_pages, donate_argnums=0, out_shardings=places)
        self._run_put_pages.lower(state, scalar, scalar, scalar, tokens, shapes(self._empty_pages)).compile()
        self._run_put_tail = jax.jit(self._put_tail, donate_argnums=0, out_shardings=places)
        self._run_put_tail.lower(state, scalar, scalar, shapes(self._empty_tail)).compile()
        return 3

    @jax.named_scope("engine.save_pages")
    def _copy(self, state: State, slot: Array, end: Array) -> PageCopies:
        """Copies of the page of a slot that ends before token `end`, and of its tail."""
        rows, first = slot[None], end[None] // PAGE - 1
        pages = take(state.cache, "entries", rows, entry_numbers(first, 1, self._pages), self._place)
        if not self._every:
            return PageCopies(pages, {})
        index = ring_places(end[None], state.cache, self._tails)
        tails = take(state.cache, "rings", rows, index, self._place)
        return PageCopies(pages, tails)

    @jax.named_scope("engine.load_pages")
    def _put_pages(self, state: State, slot: Array, first: Array, count: Array, tokens: Array, pages: Parts) -> State:
        """Puts pages [first, first + count), which are those of `tokens`, into a slot; page 0 begins it anew."""
        index = entry_numbers(first, self._pages_of_chunk, self._pages, count)
        cache = put(state.cache, "entries", slot, index, pages, self._place)
        history = state.history.read(slot[None], tokens[None], PAGE * count[None], PAGE * first[None])
        return state._replace(cache=cache, history=history)

    @jax.named_scope("engine.load_tail")
    def _put_tail(self, state: State, slot: Array, end: Array, tail: Parts) -> State:
        """Puts the tail that ends before token `end` into a slot, which then holds so many tokens."""
        cache = put(state.cache, "rings", slot, ring_places(end, state.cache, self._tails), tail, self._place)
        lengths = cache.lengths.at[slot].set(end)
        return state._replace(cache=self._drafter.at(cache.replace(lengths=lengths), lengths))

    # ---- on the host -------------------------------------------------------------------------------------------------

    def load_prefix(
        self, state: State, slot: int, prompt: Sequence[int], salt: bytes = b""
    ) -> tuple[State, LoadedPrefix]:
        """Puts into a slot what there is of a prompt; its last token is always left to read. Returns the state too."""
        self.drain()
        prompt_hashes = self.prefix_cache.hashes(prompt[:-1], salt)
        hashes = prompt_hashes.hashes
        loaded = 0  # pages that the slot has
        while True:
            match = self.prefix_cache.match(hashes)
            if not match.tokens:
                return state, LoadedPrefix(0, 0, prompt_hashes)
            tail = self.prefix_cache.tail(match)
            if match.tail is not None and tail is None:
                continue  # it was lost, which the next match knows
            state, loaded = self._load_pages(state, slot, hashes[: match.pages], prompt, loaded)
            if loaded >= match.pages:
                break
            hashes = hashes[:loaded]
        arrays = self._empty_tail if tail is None else _by_role(tail, self._tails)
        inputs = self._place.put((np.int32(slot), np.int32(match.tokens), arrays))
        state = self._run_put_tail(state, *inputs)
        self.prefix_cache.touch(hashes[: match.pages], match.tail)
        return state, LoadedPrefix(match.tokens, PAGE * match.pages, prompt_hashes)

    def _load_pages(
        self, state: State, slot: int, hashes: Sequence[bytes], prompt: Sequence[int], loaded: int
    ) -> tuple[State, int]:
        """Puts pages into a slot that has the first `loaded` already. Returns how many it has, up to a lost one."""
        while loaded < len(hashes):
            found: list[Item] = []
            for key in hashes[loaded : loaded + self._pages_of_chunk]:
                item = self.prefix_cache.page(key)
                if item is None:
                    break
                found.append(item)
            if not found:
                break
            tokens = np.zeros(self._pages_of_chunk * PAGE, np.int32)
            tokens[: len(found) * PAGE] = prompt[loaded * PAGE : (loaded + len(found)) * PAGE]
            inputs = (np.int32(slot), np.int32(loaded), np.int32(len(found)), tokens, self._joined(found))
            state = self._run_put_pages(state, *self._place.put(inputs))
            loaded += len(found)
        return state, loaded

    def _joined(self, items: Sequence[Item]) -> dict[str, tuple[np.ndarray, ...]]:
        """Pages one after another, by role, and zeros in place of those that a chunk has more."""
        pages = [_by_role(item, self._pages) for item in items]
        joined: dict[str, tuple[np.ndarray, ...]] = {}
        for role, zeros in self._empty_pages.items():
            joined[role] = tuple(_filled(whole, [page[role][i] for page in pages]) for i, whole in enumerate(zeros))
        return joined

    def save_chunk(self, copies: PageCopies, chunks: Sequence[PrefilledChunk]) -> None:
        """Keeps the pages and tails that a chunk of each of some prompts completed."""
        pages, tails = [], []
        for row, hashes, begin, end in chunks:
            for number in range(begin // PAGE, end // PAGE):
                key, page_end = hashes.hashes[number], PAGE * (number + 1)
                if self.prefix_cache.wants_page(key):
                    pages.append(_Copied(key, row, number - begin // PAGE))
                if self.prefix_cache.wants_tail(key, page_end):
                    tails.append(_Copied(key, row, page_end // self._every - begin // self._every - 1))
        self._save(_PendingSave(pages, tails, copies))

    def save_generated(self, state: State, slot: int, hashes: BlockHashes) -> None:
        """Keeps the page that a slot has just completed by generating; one more step may have started since."""
        key, end = hashes.hashes[-1], PAGE * len(hashes.hashes)
        # Tokens and drafts that the steps so far may have written, in the trunk's and in the drafter's windows.
        written = len(hashes) + max(1 + self._drafter.depth, self._drafter.reach)
        keeps_tail = self.prefix_cache.wants_tail(key, end) and written <= end + SPARE
        if keeps_tail or self.prefix_cache.wants_page(key):
            copies = self._run_copy(state, *self._place.put((np.int32(slot), np.int32(end))))
            only = _Copied(key, 0, 0)
            self._save(_PendingSave([only], [only] if keeps_tail else [], copies))

    def _save(self, save: _PendingSave) -> None:
        if save.pages or save.tails:
            jax.tree.map(lambda x: x.copy_to_host_async(), save.copies)
            self._pending.append(save)

    def drain(self, in_flight: int = 0) -> None:
        """Takes in what was copied, but for the last `in_flight` saves, which may still be on their way."""
        while len(self._pending) > in_flight:
            save = self._pending.pop(0)
            copies = jax.device_get(save.copies)
            for key, row, number in save.pages:
                self.prefix_cache.put_page(key, _item(copies.pages, self._pages, row, number))
            for key, row, number in save.tails:
                self.prefix_cache.put_tail(key, _item(copies.tails, self._tails, row, number))

    def close(self) -> None:
        """Takes in everything, and waits until it is written."""
        self.drain()
        self.prefix_cache.close()


def _zeros(held: StoredRows, size: int) -> tuple[np.ndarray, ...]:
    """Arrays [layers, size, channels] like those of a role in one row."""
    return tuple(np.zeros((array.shape[0], size, *array.shape[3:]), array.dtype) for array in held.arrays)


def _item(copies: Parts, sizes: Mapping[Any, int], row: int, number: int) -> Item:
    """One page or tail of several, its arrays named by role and place among the role's."""
    item = {}
    for role, size in sizes.items():
        for i, array in enumerate(copies[role]):
            item[f"{role}.{i}"] = np.array(array[:, row, number * size : (number + 1) * size])
    return item


def _by_role(item: Item, sizes: Mapping[Any, int]) -> dict[str, tuple[np.ndarray, ...]]:
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
