"""Pages: a row of the cache in pieces of 128 tokens, which can be taken out, kept anywhere, and put into another row.

Technical report, section 3.6. 128 tokens are whole blocks of every layer, whatever its ratio: where a page ends, no
block is open. A row is therefore its pages, which hold what its layers' entries and index keys are and never change
again, and the tail of the last one: the windows and, where blocks overlap, the last block's projections. Tails are the
larger part (of DeepSeek-V4-Flash seven times a page), and each holds for its own page's end alone.

Parts of a row are dictionaries by role, of arrays in stored form [layers, rows, n, channels] as `StoredRows` holds.

Layers are indexed one by one: slices through all of them would have the TPU compiler turn the whole pool around.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from v4_jax.cache.cache import Cache, RingRole, cache_specs
from v4_jax.cache.entries import ENTRY_RATIOS, PAGE, Entries, EntryRole, span
from v4_jax.cache.rows import StoredRows
from v4_jax.config import Config
from v4_jax.placement import Place
from v4_jax.sharding import collectives
from v4_jax.sharding.axes import axes_of, resolve
from v4_jax.sharding.collectives import Axes

Parts = dict[str, tuple[Array, ...]]

# What of a row: pages are parts of its entries, tails of its rings.
Kind = Literal["entries", "rings"]


def page_sizes(cache: Cache) -> dict[EntryRole, int]:
    """What a page holds: entries by role."""
    return {role: PAGE // ENTRY_RATIOS[role] for role in cache.entries}


def tail_sizes(cache: Cache, config: Config, *, draft: bool) -> dict[RingRole, int]:
    """What a tail holds: tokens by role.

    Args:
      cache: of the model, or its shapes.
      config: the architecture.
      draft: whether the drafter's window is of use. Its last row was read together with the token after the page, which
        another row may not share: its first draft is then made with that one in sight.
    """
    sizes: dict[RingRole, int] = {"window": config.sliding_window}
    if draft and "draft" in cache.rings:
        sizes["draft"] = config.sliding_window
    # A block that overlaps the one before needs that one's projections; one that does not needs nothing closed.
    for role in cache.entries:
        if overlap := span(ENTRY_RATIOS[role]) - ENTRY_RATIOS[role]:
            sizes[role] = overlap
    return sizes


def tokens_to_refill(config: Config, *, draft: bool) -> int:
    """How many tokens to read again until every window is what it was, whatever it held before, a multiple of `PAGE`.

    Each layer's keys are right one window later than those of the layer before it. What drafts counts as one: several
    stages all make their keys from what the trunk returns.
    """
    layers = config.num_hidden_layers + (1 if draft else 0)
    return -(-config.sliding_window * layers // PAGE) * PAGE


def entry_numbers(
    first: Array, pages: int, sizes: dict[EntryRole, int], count: Array | None = None
) -> dict[EntryRole, Array]:
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


def ring_places(ends: Array, cache: Cache, sizes: dict[RingRole, int]) -> dict[RingRole, Array]:
    """Places in the cache's rings of the tails that end before the tokens `ends` [...]: [..., size] by role."""
    return {
        role: (ends[..., None] - size + jnp.arange(size, dtype=jnp.int32)) % cache.rings[role].shape[2]
        for role, size in sizes.items()
    }


def take(cache: Cache, kind: Kind, rows: Array, index: dict[Any, Array], place: Place) -> Parts:
    """Copies of parts of some rows, whole on every device.

    Args:
      cache: on `place`.
      kind: what to copy of.
      rows: [R] int32; of those out of range come zeros.
      index: [R, n] int32 by role, entries' numbers or places of rings.
      place: where the cache lies.

    Returns:
      [layers, R, n, C] arrays.
    """

    def on_device(cache: Cache, rows: Array, index: dict[Any, Array]) -> Parts:
        def part(array: Array, at: tuple[Any, Array], axes: Axes) -> Array:
            layers = jnp.arange(array.shape[0])[:, None, None]
            return _from_its_device(array.at[layers, *at].get(mode="fill", fill_value=0), axes)

        taken = {}
        for role, numbers in index.items():
            held = _held(cache, kind, role, place)
            at, axes = _where(cache, held, rows[:, None], numbers, place)
            taken[role] = tuple(part(array, at, axes) for array in held.rows.arrays)
        return taken

    return _on_devices(place, cache, on_device, PartitionSpec())(cache, rows, index)


def put(cache: Cache, kind: Kind, row: Array, index: dict[Any, Array], parts: Parts, place: Place) -> Cache:
    """The cache with parts of one row replaced.

    Args:
      cache: on `place`.
      kind: what to replace of.
      row: [] int32.
      index: [n] int32 by role, entries' numbers (-1 stores nothing) or places of rings.
      parts: [layers, n, C] arrays by role, whole on every device.
      place: where the cache lies.
    """

    def on_device(cache: Cache, row: Array, index: dict[Any, Array], parts: Parts) -> Cache:
        stored = {}
        for role, numbers in index.items():
            held = _held(cache, kind, role, place)
            at, _ = _where(cache, held, row, numbers, place)
            layers = jnp.arange(held.rows.shape[0])[:, None]
            arrays = zip(held.rows.arrays, parts[role], strict=True)
            stored[role] = held.rows.replace(
                arrays=tuple(array.at[layers, *at].set(part, mode="drop") for array, part in arrays)
            )
        return cache.replace(**{kind: getattr(cache, kind) | stored})

    return _on_devices(place, cache, on_device, None)(cache, row, index, parts)


def resized(cache: Cache, by: int, sizes: dict[RingRole, int]) -> Cache:
    """The cache with `by` places more or fewer in the rings of some roles, and their newest tokens in place.

    In larger rings tails stay readable that end up to `by` tokens back.
    """

    def ring(role: RingRole) -> StoredRows:
        rows, length = cache.rings[role], cache.draft_lengths if role == "draft" else cache.lengths
        old, size = rows.shape[2], rows.shape[2] + by
        newest = length[:, None] - 1
        positions = newest - (newest - jnp.arange(size, dtype=jnp.int32)) % size
        batch = jnp.arange(length.shape[0])[:, None]
        return rows.replace(arrays=tuple(array[:, batch, positions % old] for array in rows.arrays))

    return cache.replace(rings=cache.rings | {role: ring(role) for role in sizes})


def _held(cache: Cache, kind: Kind, role: Any, place: Place) -> Entries:
    """What a role holds; a ring is addressed as entries without pages are."""
    if kind == "rings":
        return Entries(cache.rings[role], 0, None)
    axes = () if place.mesh is None else axes_of("entries", resolve(place.rules), place.mesh)
    return cache.entries_of(role, 0, None, axes)


def _where(cache: Cache, held: Entries, rows: Array, numbers: Array, place: Place) -> tuple[tuple[Any, Array], Axes]:
    """Where entries' numbers, or places of a ring, of batch rows lie in this device's arrays: rows and places there.

    Places are out of range for those that lie nowhere here. Returns also the mesh axes over which all of it is split.
    """
    batch = () if place.mesh is None else axes_of("batch", resolve(place.rules), place.mesh)
    own = rows - collectives.index(batch) * cache.lengths.shape[0]
    here = (own >= 0) & (own < cache.lengths.shape[0])
    at = held.places(jnp.where(here, own, 0), jnp.where(here, held.local(numbers), -1))
    return at, batch + held.axes


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
