"""The key/value cache: windows, compressed entries, index keys and the compressors' open blocks, by role.

Technical report, section 3.5. Per row and layer the cache holds the last `sliding_window` keys, one entry per 4 or 128
tokens where the layer compresses, one index key per CSA entry, and the projections of the few tokens whose block is
still open: constant in size, whatever the length. Arrays are stacked over the layers of a role, so that a scan over
layers carries them and updates them in place. Every row has its own length.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from v4_jax.architecture import Architecture
from v4_jax.cache.entries import ENTRY_RATIOS, PAGE, Entries, EntryRole, projection_width, span
from v4_jax.cache.ring import SPARE, Ring
from v4_jax.cache.rows import WORD_CHANNELS, StoredRows
from v4_jax.number_formats import INDEX_BLOCK, KV_BLOCK
from v4_jax.sharding.axes import Rules, axes_of, resolve, sharding, shards_of
from v4_jax.sharding.collectives import Axes

CacheDtype = Literal["float32", "bfloat16", "released"]

ENTRY_TILE = 16  # of a row's entries there are so many or a multiple: a TPU kernel stores one by its tile, of 16 bits

# The last keys of the trunk's layers and of the drafter's, and the open blocks of the compressors that make a role's
# entries.
WindowRole = Literal["window", "draft"]
RingRole = Literal["window", "draft", "csa", "index", "hca"]


class Cache(struct.PyTreeNode):
    """Everything a batch of rows carries from one call to the next.

    Attributes:
      lengths: [B] int32 tokens seen by the trunk.
      draft_lengths: [B] int32 tokens seen by what drafts: the MTP block, or DSpark's stages.
      entries: compressed entries by role, stacked over its layers: "csa" and "hca" [layers, B, max_length / ratio,
        head_dim], "index", the index keys, [CSA layers, B, max_length / 4, index_head_dim]; in a paged cache [layers,
        shards of B, pages of a shard x entries of a page, channels].
      rings: last tokens by role, stacked over its layers: "window" [layers, B, sliding_window + SPARE, head_dim], the
        keys/values of every layer, "draft" those of the drafter's layers; "csa", "index" and "hca", float32 projections
        of the tokens whose block is open.
      max_length: positions that the entries have room for. Lengths are known only at run time: whoever feeds a cache
        keeps within it, for the entries of tokens beyond it are dropped.
      table: [B, pages of a row] int32 which page of its shard each page of a row is; -1 for none, where entries are
        dropped. Rows may share pages that are complete. None unless the cache is paged.
    """

    lengths: Array
    draft_lengths: Array
    entries: dict[EntryRole, StoredRows]
    rings: dict[RingRole, StoredRows]
    max_length: int = struct.field(pytree_node=False)
    table: Array | None = None

    @property
    def released(self) -> bool:
        """Whether keys are held in the release's number formats."""
        return self.rings["window"].kind == "kv"

    def window(self, role: WindowRole, role_index: Any, start: Array, dtype: Any) -> Ring:
        """A layer's last keys; see `Ring` for the arguments."""
        return Ring(self.rings[role], role_index, start, dtype)

    def open_blocks(self, role: EntryRole, role_index: Any, start: Array) -> Ring:
        """The projections of the tokens from which a layer's next entry is made; see `Ring` for the arguments."""
        return Ring(self.rings[role], role_index, start, jnp.float32)

    def entries_of(self, role: EntryRole, role_index: Any, dtype: Any, axes: Axes) -> Entries:
        """A layer's entries, or index keys; see `Entries` for the arguments."""
        return Entries(self.entries[role], role_index, dtype, axes, self.table, PAGE // ENTRY_RATIOS[role])

    def with_ring(self, role: RingRole, rows: StoredRows) -> Cache:
        """The cache with another ring for a role."""
        return self.replace(rings=self.rings | {role: rows})

    def with_entries(self, role: EntryRole, rows: StoredRows) -> Cache:
        """The cache with other entries for a role."""
        return self.replace(entries=self.entries | {role: rows})

    def take_rows(self, rows: Array) -> Cache:
        """A cache of batch rows `rows` [R]; one out of range stands for the last. Pages stay where they are."""

        def take(x: Array, axis: int = 0) -> Array:
            return jnp.take(x, rows, axis=axis, mode="clip")

        def take_stacked(x: Array) -> Array:
            return take(x, 1)

        return Cache(
            lengths=take(self.lengths),
            draft_lengths=take(self.draft_lengths),
            entries=self.entries if self.paged else jax.tree.map(take_stacked, self.entries),
            rings=jax.tree.map(take_stacked, self.rings),
            max_length=self.max_length,
            table=None if self.table is None else take(self.table),
        )

    def put_rows(self, rows: Array, taken: Cache) -> Cache:
        """The cache after `taken`, its rows [R] by `take_rows`, has changed; a row out of range is dropped."""

        def put(x: Array, new: Array) -> Array:
            return x.at[rows].set(new, mode="drop")

        def put_stacked(x: Array, new: Array) -> Array:
            return x.at[:, rows].set(new, mode="drop")

        return self.replace(
            lengths=put(self.lengths, taken.lengths),
            draft_lengths=put(self.draft_lengths, taken.draft_lengths),
            entries=taken.entries if self.paged else jax.tree.map(put_stacked, self.entries, taken.entries),
            rings=jax.tree.map(put_stacked, self.rings, taken.rings),
        )

    @property
    def paged(self) -> bool:
        """Whether entries lie in pages, which any row may have."""
        return self.table is not None

    def rolled_back(self, *, lengths: Array | None = None, draft_lengths: Array | None = None) -> Cache:
        """The cache as if the last tokens of each row, `MOST_ROLLED_BACK` at most, had never been fed.

        Only the counts change, for nothing reads beyond them. Tokens fed again take the places of those rolled back, in
        windows and open blocks alike; an entry whose block ended among the latter is out of sight until its block ends
        again, which writes it anew.

        Args:
          lengths: [B] int32 tokens that the trunk's part of each row is to hold; None leaves it as it is.
          draft_lengths: [B] int32 the same of the drafter's part.
        """
        return self.replace(
            lengths=self.lengths if lengths is None else lengths,
            draft_lengths=self.draft_lengths if draft_lengths is None else draft_lengths,
        )

    def nbytes(self) -> dict[str, int]:
        """Bytes held: of the entries by role, "window", "draft" (the drafter's), and all "open blocks" together."""
        sizes: dict[str, int] = {role: rows.nbytes for role, rows in self.entries.items()}
        for role, rows in self.rings.items():
            name = role if role in ("window", "draft") else "open blocks"
            sizes[name] = sizes.get(name, 0) + rows.nbytes
        return sizes


def cache_specs(cache: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> Any:
    """Where a cache's arrays lie: a tree of `PartitionSpec` like `cache`.

    Windows and open blocks are on every device of a batch row; entries and index keys are spread over "entries".
    """
    batch, entries = (axes_of(name, rules, mesh) or None for name in ("batch", "entries"))
    row, spread = PartitionSpec(batch), PartitionSpec(None, batch, entries)
    return cache.replace(
        lengths=row,
        draft_lengths=row,
        entries=jax.tree.map(lambda _: spread, cache.entries),
        rings=jax.tree.map(lambda _: PartitionSpec(None, batch, None), cache.rings),
        table=None if cache.table is None else row,
    )


def init_cache(
    config: Architecture,
    batch: int,
    max_length: int,
    *,
    dtype: CacheDtype = "bfloat16",
    pages: int | None = None,
    mesh: Mesh | None = None,
    rules: Rules | str | None = None,
) -> Cache:
    """An empty cache for `batch` rows of up to `max_length` tokens each.

    Args:
      config: the architecture.
      batch: rows.
      max_length: tokens (prompt and continuation) that a row may reach.
      dtype: "released" keeps keys/values in E4M3 with bfloat16 rotary channels and index keys in E2M1, which needs a
        policy that fake-quantises; "bfloat16" or "float32" keep them plain.
      pages: pages of a paged cache, all rows together, of which none has any yet; each is of `PAGE` tokens for every
        device that a row's entries are spread over. None: every row has room of its own for `max_length`.
      mesh: devices to place it on; None is the default device.
      rules: which mesh axes split which logical axes ("batch", "entries"), a `Rules` or a preset's name.

    Raises:
      ShardingError: rows or pages that do not split evenly over the mesh.
      ValueError: an unknown dtype, a length out of range, or head sizes that the released formats cannot hold.
    """
    build = functools.partial(_empty, config, batch, max_length, dtype, pages, resolve(rules), mesh)
    if mesh is None:
        return build()
    shapes = cache_shapes(config, batch, max_length, dtype=dtype, pages=pages, mesh=mesh, rules=rules)
    return jax.jit(build, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))()


def cache_shapes(
    config: Architecture,
    batch: int,
    max_length: int,
    *,
    dtype: CacheDtype = "bfloat16",
    pages: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    rules: Rules | str | None = None,
) -> Any:
    """What `init_cache` makes, as `jax.ShapeDtypeStruct`s that say where each array lies; for a mesh of none too.

    Raises:
      ShardingError, ValueError: as `init_cache`.
    """
    table = resolve(rules)
    shapes = jax.eval_shape(lambda: _empty(config, batch, max_length, dtype, pages, table, mesh))
    if mesh is None:
        return shapes
    for count, name in ((batch, "the cache"), (pages or 0, "the cache's pages")):
        sharding(mesh, ("batch",), (count,), table, name=name)
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs(shapes, table, mesh))
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def _empty(
    config: Architecture,
    batch: int,
    max_length: int,
    dtype: CacheDtype,
    pages: int | None,
    rules: Rules,
    mesh: Mesh | AbstractMesh | None,
) -> Cache:
    """An empty cache; a row's entries are padded to whole tiles on each of the devices that they are spread over."""
    if dtype not in ("float32", "bfloat16", "released"):
        raise ValueError(f"unknown cache dtype {dtype!r}, expected 'float32', 'bfloat16' or 'released'")
    if batch < 1 or not 0 < max_length <= config.max_position_embeddings:
        raise ValueError(
            f"a cache of {batch} rows of {max_length} tokens is out of range: expected at least one row and "
            f"1 to {config.max_position_embeddings} tokens"
        )
    if dtype == "released" and (config.nope_head_dim % KV_BLOCK or config.index_head_dim % INDEX_BLOCK):
        raise ValueError(
            f"the released cache formats need multiples of {KV_BLOCK} non-rotary and {INDEX_BLOCK} index channels, "
            f"found {config.nope_head_dim} and {config.index_head_dim}: use dtype='bfloat16'"
        )

    if pages is not None and pages < 1:
        raise ValueError(f"a cache of {pages} pages is out of range: expected at least one")

    spread, shards = (shards_of(name, rules, mesh) for name in ("entries", "batch"))
    released = dtype == "released"
    plain = {"kind": "plain", "dtype": jnp.dtype("bfloat16" if released else dtype)}
    key_form = {"kind": "kv", "rotary": config.qk_rope_head_dim} if released else plain
    index_form = {"kind": "index"} if released else plain
    picked_form = {"kind": "words"} if dtype == "bfloat16" and config.head_dim % WORD_CHANNELS == 0 else key_form

    def entries_shape(layers: int, ratio: int) -> tuple[int, int, int]:
        if pages is not None:
            return layers, shards, pages // shards * spread * (PAGE // ratio)
        return layers, batch, -(-max(1, max_length // ratio) // (spread * ENTRY_TILE)) * spread * ENTRY_TILE

    def window(layers: int) -> StoredRows:
        return StoredRows.empty((layers, batch, config.sliding_window + SPARE), config.head_dim, **key_form)

    def open_blocks(layers: int, ratio: int, width: int) -> StoredRows:
        return StoredRows.empty((layers, batch, span(ratio) + SPARE), projection_width(ratio, width))

    attention = [layer.attention for layer in config.layers]
    entries: dict[EntryRole, StoredRows] = {}
    rings: dict[RingRole, StoredRows] = {"window": window(len(attention))}
    if layers := attention.count("csa"):
        ratio = ENTRY_RATIOS["csa"]
        entries["csa"] = StoredRows.empty(entries_shape(layers, ratio), config.head_dim, **picked_form)
        entries["index"] = StoredRows.empty(entries_shape(layers, ratio), config.index_head_dim, **index_form)
        rings["csa"] = open_blocks(layers, ratio, config.head_dim)
        rings["index"] = open_blocks(layers, ratio, config.index_head_dim)
    if layers := attention.count("hca"):
        ratio = ENTRY_RATIOS["hca"]
        entries["hca"] = StoredRows.empty(entries_shape(layers, ratio), config.head_dim, **key_form)
        rings["hca"] = open_blocks(layers, ratio, config.head_dim)
    if config.draft_blocks:
        rings["draft"] = window(config.draft_blocks)
    # Two arrays, not one used twice: a donated cache may not hold a buffer in two places.
    lengths, draft_lengths = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)
    table = None if pages is None else jnp.full((batch, -(-max_length // (PAGE * spread))), -1, jnp.int32)
    return Cache(lengths, draft_lengths, entries, rings, max_length, table)
