"""Pages: a row of the cache in pieces of 128 tokens, which can be taken out, kept anywhere, and put into another row.

Technical report, section 3.6. 128 tokens are whole blocks of every layer, whatever its ratio: where a page ends, no
block is open. A row is therefore its pages, which hold what its layers' entries and index keys are and never change
again, and the tail of the last one: the windows and, where blocks overlap, the last block's projections. Tails are the
larger part (of DeepSeek-V4-Flash seven times a page), and each holds for its own page's end alone.

Parts of a row are dictionaries by role, of arrays in stored form [layers, rows, n, channels] as `cache.Rows` holds.

Layers are indexed one by one: slices through all of them would have the TPU compiler turn the whole pool around.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from v4_jax.cache.cache import ENTRY_RATIOS, PAGE, Cache, Entries, cache_specs, span
from v4_jax.cache.rows import Rows
from v4_jax.config import Config
from v4_jax.placement import Place
from v4_jax.sharding import collectives
from v4_jax.sharding.axes import axes_of, resolve
from v4_jax.sharding.collectives import Axes

Parts = dict[str, tuple[Array, ...]]


def page_sizes(cache: Cache) -> dict[str, int]:
    """What a page holds: entries by role."""
    return {role: PAGE // ratio for role, ratio in ENTRY_RATIOS.items() if role in cache.rows}


def tail_sizes(cache: Cache, config: Config, *, mtp: bool) -> dict[str, int]:
    """What a tail holds: tokens by role.

    Args:
      cache: of the model, or its shapes.
      config: the architecture.
      mtp: whether the multi-token-prediction block's window is of use. Its last row was read together with the token
        after the page, which another row may not share: its first draft is then made with that one in sight.
    """
    windows = {"window": config.sliding_window} | ({"mtp": config.sliding_window} if mtp else {})
    # A block that overlaps the one before needs that one's projections; one that does not needs nothing closed.
    overlaps = {role + " state": span(ratio) - ratio for role, ratio in ENTRY_RATIOS.items()}
    return {role: size for role, size in (windows | overlaps).items() if size and role in cache.rows}


def tokens_to_refill(config: Config, *, mtp: bool) -> int:
    """How many tokens to read again until every window is what it was, whatever it held before, a multiple of `PAGE`.

    Each layer's keys are right one window later than those of the layer before it.
    """
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return -(-config.sliding_window * layers // PAGE) * PAGE


def entries_of(first: Array, pages: int, sizes: dict[str, int], count: Any = None) -> dict[str, Array]:
    """Numbers of the entries of pages in a row, by role.

    Args:
      first: [...] int32 each first page.
      pages: how many follow each, itself included.
      sizes: see `page_sizes`.
      count: [...] int32 how many of them are real; the others' numbers are -1. None: all.

    Returns:
      [..., pages * size] each.
    """

    def numbers(size: int) -> Array:
        offsets = jnp.arange(pages * size, dtype=jnp.int32)
        found = first[..., None] * size + offsets
        return found if count is None else jnp.where(offsets < count[..., None] * size, found, -1)

    return {role: numbers(size) for role, size in sizes.items()}


def slots_of(ends: Array, cache: Cache, sizes: dict[str, int]) -> dict[str, Array]:
    """Slots of the tails that end before the tokens `ends` [...], in rings of the cache's size: [..., size] by role."""
    return {
        role: (ends[..., None] - size + jnp.arange(size, dtype=jnp.int32)) % cache.rows[role].shape[2]
        for role, size in sizes.items()
    }


def take(cache: Cache, rows: Array, index: dict[str, Array], place: Place) -> Parts:
    """Copies of parts of some rows, whole on every device.

    Args:
      cache: on `place`.
      rows: [R] int32; of those out of range come zeros.
      index: [R, n] int32 by role, entries' numbers or slots of rings.
      place: where the cache lies.

    Returns:
      [layers, R, n, C] arrays.
    """

    def on_device(cache: Cache, rows: Array, index: dict[str, Array]) -> Parts:
        def part(array: Array, at: tuple[Any, Array], axes: Axes) -> Array:
            layers = jnp.arange(array.shape[0])[:, None, None]
            return _from_its_device(array.at[layers, *at].get(mode="fill", fill_value=0), axes)

        taken = {}
        for role, numbers in index.items():
            at, axes = _where(cache, role, rows[:, None], numbers, place)
            taken[role] = tuple(part(array, at, axes) for array in cache.rows[role].arrays)
        return taken

    return _on_devices(place, cache, on_device, PartitionSpec())(cache, rows, index)


def put(cache: Cache, row: Array, index: dict[str, Array], parts: Parts, place: Place) -> Cache:
    """The cache with parts of one row replaced.

    Args:
      cache: on `place`.
      row: [] int32.
      index: [n] int32 by role, entries' numbers (-1 stores nothing) or slots of rings.
      parts: [layers, n, C] arrays by role, whole on every device.
      place: where the cache lies.
    """

    def on_device(cache: Cache, row: Array, index: dict[str, Array], parts: Parts) -> Cache:
        for role, numbers in index.items():
            held, (at, _) = cache.rows[role], _where(cache, role, row, numbers, place)
            layers = jnp.arange(held.shape[0])[:, None]
            arrays = zip(held.arrays, parts[role], strict=True)
            stored = tuple(array.at[layers, *at].set(part, mode="drop") for array, part in arrays)
            cache = cache.store(role, held.replace(arrays=stored))
        return cache

    return _on_devices(place, cache, on_device, None)(cache, row, index, parts)


def resized(cache: Cache, by: int, sizes: dict[str, int]) -> Cache:
    """The cache with `by` slots more or fewer in the rings of some roles, and their newest tokens in place.

    In larger rings tails stay readable that end up to `by` tokens back.
    """

    def ring(role: str) -> Rows:
        rows, length = cache.rows[role], cache.mtp_lengths if role == "mtp" else cache.lengths
        old, size = rows.shape[2], rows.shape[2] + by
        newest = length[:, None] - 1
        positions = newest - (newest - jnp.arange(size, dtype=jnp.int32)) % size
        batch = jnp.arange(length.shape[0])[:, None]
        return rows.replace(arrays=tuple(array[:, batch, positions % old] for array in rows.arrays))

    return cache.replace(rows=cache.rows | {role: ring(role) for role in sizes})


def _where(cache: Cache, role: str, rows: Array, numbers: Array, place: Place) -> tuple[tuple[Any, Array], Axes]:
    """Where entries' numbers, or slots of a ring, of batch rows lie in this device's arrays: rows and places there.

    Places are out of range for those that lie nowhere here. Returns also the mesh axes over which the role is spread.
    """
    batch: Axes = ()
    spread: Axes = ()
    if place.mesh is not None:
        batch = axes_of("batch", resolve(place.rules), place.mesh)
        spread = axes_of("entries", resolve(place.rules), place.mesh) if role in ENTRY_RATIOS else ()
    entries = cache.entries(role, 0, None, spread) if role in ENTRY_RATIOS else Entries(cache.rows[role], 0, None)
    own = rows - collectives.index(batch) * cache.lengths.shape[0]
    here = (own >= 0) & (own < cache.lengths.shape[0])
    return entries.places(jnp.where(here, own, 0), jnp.where(here, entries.slots(numbers), -1)), batch + spread


def _from_its_device(x: Array, axes: Axes) -> Array:
    """On all devices, what one of them has and the others hold zeros for, bit by bit."""
    if not axes:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) if x.dtype.itemsize == 4 else x.astype(jnp.uint32)
    whole = collectives.psum(bits, axes)
    return jax.lax.bitcast_convert_type(whole, x.dtype) if x.dtype.itemsize == 4 else whole.astype(x.dtype)


def _on_devices(place: Place, cache: Cache, call: Callable[..., Any], out: PartitionSpec | None) -> Callable[..., Any]:
    """`call(cache, *others)` on every device, with its shard of the cache; `out` None: it returns the cache."""
    if place.mesh is None:
        return call
    specs = cache_specs(cache, resolve(place.rules), place.mesh)

    def mapped(cache: Cache, *others: Any) -> Any:
        whole = jax.tree.map(lambda _: PartitionSpec(), others)
        run = jax.shard_map(
            call,
            mesh=place.mesh,
            in_specs=(specs, *whole),
            out_specs=specs if out is None else out,
            check_vma=False,
        )
        return run(cache, *others)

    return mapped
