"""The key/value cache: windows, compressed entries, index keys and the compressors' open blocks, by role.

Technical report, section 3.5. Per row and layer the cache holds the last `sliding_window` keys, one entry per 4 or 128
tokens where the layer compresses, one index key per CSA entry, and the projections of the few tokens whose block is
still open: constant in size, whatever the length. Arrays are stacked over the layers of a role, so that a scan over
layers carries them and updates them in place. Every row has its own length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from v4_jax.cache.rows import Rows
from v4_jax.config import RATIO_OF_ROLE, Config
from v4_jax.layout import Layout
from v4_jax.number_formats import INDEX_BLOCK, KV_BLOCK
from v4_jax.sharding import collectives
from v4_jax.sharding.axes import Rules, axes_of, resolve, sharding, shards_of
from v4_jax.sharding.collectives import Axes, from_left, rows_at
from v4_jax.sharding.split import Split

CacheDtype = Literal["float32", "bfloat16", "released"]

OVERLAPPING_RATIO = 4

# Tokens for each entry of the roles that grow with the length.
ENTRY_RATIOS = {"csa": RATIO_OF_ROLE["csa"], "index": RATIO_OF_ROLE["csa"], "hca": RATIO_OF_ROLE["hca"]}

PAGE = math.lcm(*ENTRY_RATIOS.values())  # tokens, whose blocks all end where it does

# Slots of a ring beyond the tokens that are ever read back: so that a short chunk can be stored first, and taken back
# later, without having overwritten what came before it.
SPARE = 8

MOST_TAKEN_BACK = SPARE + 1  # tokens; rings also have a slot for the newest token, which is not read back from them


def span(ratio: int) -> int:
    """Tokens that enter one compressed entry: its own block and, where blocks overlap, the one before."""
    return 2 * ratio if ratio == OVERLAPPING_RATIO else ratio


def projection_width(ratio: int, width: int) -> int:
    """Channels of a token's projections for entries of `width`: values and gates, once per block that it enters."""
    return 2 * width * span(ratio) // ratio


class Ring(struct.PyTreeNode):
    """One layer's last tokens, at slot `position mod size`.

    Attributes:
      rows: the role's rows, all layers.
      layer: which of them this is.
      start: [B] int32 tokens stored so far.
      dtype: dtype that is read.
    """

    rows: Rows
    layer: Any
    start: Array
    dtype: Any = struct.field(pytree_node=False)

    def advance(self, tokens: Array, layout: Layout, past: int, split: Split) -> tuple[Callable[[], Array], Rows]:
        """Stores a chunk, and offers what came before it.

        Args:
          tokens: [B, S, C] rows of the chunk, or of this device's shard of it.
          layout: which of them are valid.
          past: how many earlier tokens to read.
          split: how the sequence is split.

        Returns:
          A function that reads the `past` tokens before the chunk (on a split sequence, before this device's shard)
          [B, past, C], oldest first, zeros before a row's first token; and the role's rows with the chunk stored.
        """
        if not split.sequence and tokens.shape[1] + past <= self.rows.shape[2]:
            # Nothing that is read gets overwritten: storing first lets the compiler update the stack in place, where
            # reading first would make it copy all layers' rows in every layer.
            stored = self.replace(rows=self._append(tokens, layout, ()))
            return lambda: stored._history(past), stored.rows
        before = halo(tokens, self._history(past), split)
        return lambda: before, self._append(tokens, layout, split.sequence)

    def _history(self, count: int) -> Array:
        positions = self.start[:, None] - count + jnp.arange(count)
        slots = positions % self.rows.shape[2]
        rows = self.rows.read(self.layer, _batch(self.start, 1), slots, self.dtype)
        # A slot may still hold an earlier row's token: it must not matter, not even if it is NaN.
        return jnp.where(positions[..., None] >= 0, rows, 0)

    def _append(self, tokens: Array, layout: Layout, axes: Axes) -> Rows:
        size, chunk, total = self.rows.shape[2], tokens.shape[1], layout.total[:, None]
        if chunk <= size and not axes:
            index = jnp.broadcast_to(jnp.arange(chunk), tokens.shape[:2])
        else:  # only the last ones survive, and no two may meet in one slot
            index = total - size + jnp.arange(size, dtype=jnp.int32)
            tokens = rows_at(tokens, index, axes)
        slots = jnp.where((index >= 0) & (index < total), (self.start[:, None] + index) % size, size)
        return self.rows.write(self.layer, _batch(self.start, 1), slots, tokens)


def halo(tokens: Array, first: Array, split: Split) -> Array:
    """The tokens [B, n, C] before this device's shard [B, S, C]: its left neighbour's last, or `first` [B, n, C]."""
    return from_left(tokens[:, tokens.shape[1] - first.shape[1] :], first, split.sequence)


class Entries(struct.PyTreeNode):
    """One layer's compressed entries, in order.

    Spread over devices they lie round robin, number n on device n mod devices, so that every device holds the same
    share at any length. Numbers are a row's own count of its entries; slots are a row's count of those on this device.
    A slot lies where the row's table says that its page does; without a table it lies in the row of the same number.

    Attributes:
      rows: the role's rows, all layers: [L, B, slots] without a table, [L, 1, places] with one.
      layer: which of them this is.
      dtype: dtype that is read.
      axes: mesh axes over which the entries are spread.
      table: [B, pages] int32 which page of the rows each page of a row is; -1 for none.
      page: slots of a page.
    """

    rows: Rows
    layer: Any
    dtype: Any = struct.field(pytree_node=False)
    axes: Axes = struct.field(pytree_node=False, default=())
    table: Array | None = None
    page: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def local(cls, entries: Array) -> Entries:
        """Wraps entries [B, E, C] that live in no cache, differentiably.

        They are held in float32, in which the gradients that reach an entry from all query blocks are then added up.
        """
        return cls(Rows((entries[None].astype(jnp.float32),), dtype=jnp.float32), 0, entries.dtype)

    @property
    def count(self) -> int:
        """Entries of a row that this device can hold."""
        return self.rows.shape[2] if self.table is None else self.table.shape[1] * self.page

    def slots(self, numbers: Array) -> Array:
        """Slots of entries on this device; -1 for those that lie elsewhere, and for -1."""
        devices = collectives.size(self.axes)
        return jnp.where((numbers >= 0) & (numbers % devices == collectives.index(self.axes)), numbers // devices, -1)

    def numbers(self, slots: Array) -> Array:
        """Numbers of the entries at this device's slots; -1 for -1."""
        return jnp.where(slots >= 0, slots * collectives.size(self.axes) + collectives.index(self.axes), -1)

    def below(self, number: Array) -> Array:
        """How many of the entries before `number` lie on this device."""
        devices = collectives.size(self.axes)
        return (number + devices - 1 - collectives.index(self.axes)) // devices

    def places(self, rows: Array, slots: Array) -> tuple[Any, Array]:
        """Where slots of batch rows lie in the arrays: rows and places there.

        Args:
          rows: int32, broadcast with `slots`.
          slots: int32; the place of one out of range, or without a page, is the one after the last.
        """
        if self.table is None:
            return rows, jnp.where((slots < 0) | (slots >= self.count), self.count, slots)
        page = self.table[rows, jnp.clip(slots // self.page, 0, self.table.shape[1] - 1)]
        real = (page >= 0) & (slots >= 0) & (slots < self.count)
        return 0, jnp.where(real, page * self.page + slots % self.page, self.rows.shape[2])

    def write(self, numbers: Array, entries: Array) -> Entries:
        """Stores `entries` [B, E, C] as `numbers` [B, E], dropping those out of range or of other devices.

        What is not finite is stored as zero: pages go from row to row, and zero times NaN, or infinity, is not zero. A
        row that has come to it is not cured, as its window has it too.
        """
        entries = jnp.where(jnp.isfinite(entries), entries, 0)
        rows, places = self.places(_batch(numbers, 1), self.slots(numbers))
        return self.replace(rows=self.rows.write(self.layer, rows, places, entries))

    def gather(self, slots: Array) -> Array:
        """Entries at `slots` [B, Q, K] (-1 reads an arbitrary row): [B, Q, K, C]."""
        rows, places = self.places(_batch(slots, 2), jnp.maximum(slots, 0))
        return self.rows.read(self.layer, rows, jnp.minimum(places, self.rows.shape[2] - 1), self.dtype)

    def together(self, limit: Array, everywhere: Axes) -> Entries:
        """The layer's entries of all devices on each, in stored form; numbers are then slots.

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

        def gathered(slots: int) -> Callable[[tuple[Array, ...]], tuple[Array, ...]]:
            def gather(array: Array) -> Array:
                cut = self._cut(array, 0, slots)
                rows = jax.lax.all_gather(cut, self.axes, axis=2)  # numbers rise along devices, then along slots
                rows = rows.reshape(1, cut.shape[0], slots * devices, *cut.shape[2:])
                return jnp.pad(rows, [(0, 0)] * 2 + [(0, (self.count - slots) * devices)] + [(0, 0)] * (cut.ndim - 2))

            return lambda arrays: tuple(gather(array) for array in arrays)

        limit = collectives.pmax(limit, everywhere)
        enough = sum((limit > slots * devices).astype(jnp.int32) for slots in sizes[:-1])
        arrays = jax.lax.switch(enough, [gathered(slots) for slots in sizes], self.rows.arrays)
        return Entries(self.rows.replace(arrays=arrays), 0, self.dtype)

    def block(self, first: Any, size: int) -> Array:
        """Slots [first, first + size) of every row: [B, size, C].

        `first + size` must not exceed `count`; where there are pages, both are multiples of `page`.
        """
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


class Cache(struct.PyTreeNode):
    """Everything a batch of rows carries from one call to the next.

    Attributes:
      lengths: [B] int32 tokens seen by the trunk.
      mtp_lengths: [B] int32 tokens seen by the MTP block.
      rows: stacked rows by role:
        "window" [layers, B, sliding_window + SPARE, head_dim], the last keys/values of every layer; "mtp", the MTP
          block's;
        "csa" and "hca" [layers of the role, B, max_length / ratio, head_dim], compressed entries;
        "index" [CSA layers, B, max_length / 4, index_head_dim], index keys;
          in a paged cache these three are [layers, shards of B, pages of a shard x entries of a page, channels];
        "csa state", "hca state" and "index state", float32 projections of the tokens whose block is open.
      max_length: positions that the entries have room for. Lengths are known only at run time: whoever feeds a cache
        keeps within it, for the entries of tokens beyond it are dropped.
      table: [B, pages of a row] int32 which page of its shard each page of a row is; -1 for none, where entries are
        dropped. Rows may share pages that are complete. None unless the cache is paged.
    """

    lengths: Array
    mtp_lengths: Array
    rows: dict[str, Rows]
    max_length: int = struct.field(pytree_node=False)
    table: Array | None = None

    @property
    def released(self) -> bool:
        """Whether keys are held in the release's number formats."""
        return self.rows["window"].kind == "kv"

    def store(self, role: str, rows: Rows) -> Cache:
        """The cache with other rows for a role."""
        return self.replace(rows=self.rows | {role: rows})

    def entries(self, role: str, layer: Any, dtype: Any, axes: Axes) -> Entries:
        """A layer's entries, or index keys; see `Entries` for the arguments."""
        return Entries(self.rows[role], layer, dtype, axes, self.table, PAGE // ENTRY_RATIOS[role])

    def some(self, rows: Array) -> Cache:
        """A cache of batch rows `rows` [R]; one out of range stands for the last. Pages stay where they are."""

        def take(x: Array, axis: int = 0) -> Array:
            return jnp.take(x, rows, axis=axis, mode="clip")

        own = {role: jax.tree.map(lambda x: take(x, 1), self.rows[role]) for role in self._by_row}
        table = None if self.table is None else take(self.table)
        lengths, mtp_lengths = take(self.lengths), take(self.mtp_lengths)
        return self.replace(lengths=lengths, mtp_lengths=mtp_lengths, rows=self.rows | own, table=table)

    def merged(self, rows: Array, part: Cache) -> Cache:
        """The cache after `part`, which was `some` of its `rows` [R], has changed; one out of range is dropped."""

        def put(x: Array, new: Array) -> Array:
            return x.at[rows].set(new, mode="drop")

        def put_stacked(x: Array, new: Array) -> Array:
            return x.at[:, rows].set(new, mode="drop")

        own = {role: jax.tree.map(put_stacked, self.rows[role], part.rows[role]) for role in self._by_row}
        lengths, mtp_lengths = put(self.lengths, part.lengths), put(self.mtp_lengths, part.mtp_lengths)
        return self.replace(lengths=lengths, mtp_lengths=mtp_lengths, rows=part.rows | own)

    @property
    def _by_row(self) -> list[str]:
        """Roles that hold something for each batch row; pages are anyone's."""
        return [role for role in self.rows if self.table is None or role not in ENTRY_RATIOS]

    def rolled_back(self, *, lengths: Array | None = None, mtp_lengths: Array | None = None) -> Cache:
        """The cache as if the last tokens of each row, `MOST_TAKEN_BACK` at most, had never been fed.

        Only the counts change, for nothing reads beyond them. Tokens fed again take the slots of those taken back, in
        windows and open blocks alike; an entry whose block ended among the latter is out of sight until its block ends
        again, which writes it anew.

        Args:
          lengths: [B] int32 tokens that the trunk's part of each row is to hold; None leaves it as it is.
          mtp_lengths: [B] int32 the same of the MTP block's part.
        """
        counts = {"lengths": lengths, "mtp_lengths": mtp_lengths}
        return self.replace(**{name: value for name, value in counts.items() if value is not None})

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by role; the compressors' states together as "open blocks"."""
        sizes: dict[str, int] = {}
        for role, rows in self.rows.items():
            name = "open blocks" if role.endswith("state") else role
            sizes[name] = sizes.get(name, 0) + rows.nbytes
        return sizes


def cache_specs(cache: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> Any:
    """Where a cache's arrays lie: a tree of `PartitionSpec` like `cache`.

    Windows and open blocks are on every device of a batch row; entries and index keys are spread over "entries".
    """

    batch, entries = (axes_of(name, rules, mesh) or None for name in ("batch", "entries"))

    def spec(role: str) -> PartitionSpec:
        return PartitionSpec(None, batch, entries if role in ENTRY_RATIOS else None)

    rows = {role: jax.tree.map(lambda _, role=role: spec(role), rows) for role, rows in cache.rows.items()}
    row = PartitionSpec(batch)
    return cache.replace(lengths=row, mtp_lengths=row, rows=rows, table=None if cache.table is None else row)


def init_cache(
    config: Config,
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
    config: Config,
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
    config: Config,
    batch: int,
    max_length: int,
    dtype: CacheDtype,
    pages: int | None,
    rules: Rules,
    mesh: Mesh | AbstractMesh | None,
) -> Cache:
    """An empty cache; a row's entries are padded to a multiple of the devices that they are spread over."""
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

    def entries(layers: int, ratio: int) -> tuple[int, int, int]:
        if pages is not None:
            return layers, shards, pages // shards * spread * (PAGE // ratio)
        return layers, batch, -(-max(1, max_length // ratio) // spread) * spread

    def keys(shape: tuple[int, int, int]) -> Rows:
        return Rows.empty(shape, config.head_dim, **key_form)

    def state(layers: int, ratio: int, width: int) -> Rows:
        return Rows.empty((layers, batch, span(ratio) + SPARE), projection_width(ratio, width))

    attention = [layer.attention for layer in config.layers]
    ring = config.sliding_window + SPARE
    rows = {"window": keys((len(attention), batch, ring))}
    for role in ("csa", "hca"):
        if layers := attention.count(role):
            ratio = RATIO_OF_ROLE[role]
            rows[role] = keys(entries(layers, ratio))
            rows[role + " state"] = state(layers, ratio, config.head_dim)
            if role == "csa":
                rows["index"] = Rows.empty(entries(layers, ratio), config.index_head_dim, **index_form)
                rows["index state"] = state(layers, ratio, config.index_head_dim)
    if config.num_nextn_predict_layers:
        rows["mtp"] = keys((config.num_nextn_predict_layers, batch, ring))
    # Two arrays, not one used twice: a donated cache may not hold a buffer in two places.
    lengths, mtp_lengths = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)
    table = None if pages is None else jnp.full((batch, -(-max_length // (PAGE * spread))), -1, jnp.int32)
    return Cache(lengths=lengths, mtp_lengths=mtp_lengths, rows=rows, max_length=max_length, table=table)


def _batch(like: Array, trailing: int) -> Array:
    """Batch row numbers shaped to broadcast against an index with `trailing` more axes."""
    return jnp.arange(like.shape[0]).reshape(-1, *(1,) * trailing)
