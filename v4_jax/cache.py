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

from sharding import collectives
from sharding.axes import Rules, resolve, sharding
from sharding.collectives import Axes, from_left, rows_at
from sharding.split import Split
from v4_jax.config import RATIO_OF_ROLE, Config
from v4_jax.layout import Layout
from v4_jax.number_formats import E2M1, E4M3, E8M0, INDEX_BLOCK, KV_BLOCK, bytes_of, decode_rows, encode_rows

CacheDtype = Literal["float32", "bfloat16", "released"]

OVERLAPPING_RATIO = 4

LANES = 128  # elements in a row of a TPU's memory tile

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


class Rows(struct.PyTreeNode):
    """Rows [L, B, N, C] in one storage format, held as bit patterns.

    Where a backend lacks a small float type, it updates one row of an array by converting the whole array to a type
    that it has, and back. Integers of the same width are updated in place everywhere, so floats become bits.

    A "kv" row is one run of bytes: codes, scales, rotary channels, and zeros up to a multiple of 128, the width of a
    TPU's memory tile. Rows of any other width would be laid out across, and copied around every gather.

    Attributes:
      arrays: the stored parts: one array; for "index" codes and scales.
      kind: "plain"; "kv", the first channels in E4M3 and the rotary rest in bfloat16; or "index", E2M1.
      dtype: number format of plain rows.
      channels: channels of a row.
      rotary: how many of a "kv" row's, the last ones, are kept in bfloat16.
    """

    arrays: tuple[Array, ...]
    kind: Literal["plain", "kv", "index"] = struct.field(pytree_node=False, default="plain")
    dtype: Any = struct.field(pytree_node=False, default=jnp.float32)
    channels: int = struct.field(pytree_node=False, default=0)
    rotary: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def empty(cls, shape: tuple[int, int, int], channels: int, **form: Any) -> Rows:
        """Zeros [L, B, N] x channels in the format that the keyword arguments say."""
        template = cls((), channels=channels, **form)
        parts = jax.eval_shape(template.encode, jax.ShapeDtypeStruct((channels,), jnp.float32))
        # The bits of zero are zero in every format; an E8M0 scale of zero bits is 2^-127, which scales zeros.
        return template.replace(arrays=tuple(jnp.zeros((*shape, *part.shape), part.dtype) for part in parts))

    @property
    def shape(self) -> tuple[int, ...]:
        """(L, B, N)."""
        return self.arrays[0].shape[:3]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(bytes_of(array) for array in self.arrays)

    @property
    def padding(self) -> int:
        """How many of them fill rows up."""
        return 0 if self.kind != "kv" else math.prod(self.shape) * (self.arrays[0].shape[-1] - self._ends[-1])

    @property
    def _ends(self) -> tuple[int, int, int]:
        """Where codes, scales and rotary channels end in the bytes of a "kv" row."""
        codes = self.channels - self.rotary
        scales = codes + codes // KV_BLOCK
        return codes, scales, scales + 2 * self.rotary

    def encode(self, rows: Array) -> tuple[Array, ...]:
        """[..., C] rows as this format's parts."""
        if self.kind == "plain":
            return (_bits(rows.astype(self.dtype)),)
        if self.kind == "index":
            codes, scales = encode_rows(rows, E2M1, INDEX_BLOCK)
            return _bits(codes), _bits(scales)
        split = self.channels - self.rotary
        codes, scales = encode_rows(rows[..., :split], E4M3, KV_BLOCK)
        rotary = jax.lax.bitcast_convert_type(rows[..., split:].astype(jnp.bfloat16), jnp.uint8)
        row = [_bits(codes), _bits(scales), rotary.reshape(*rows.shape[:-1], 2 * self.rotary)]
        room = jnp.zeros((*rows.shape[:-1], -self._ends[-1] % LANES), jnp.uint8)
        return (jnp.concatenate([*row, room], axis=-1),)

    def decode(self, parts: tuple[Array, ...], dtype: Any) -> Array:
        """Inverse of `encode`: [..., C] of `dtype`."""
        if self.kind == "plain":
            return _float(parts[0], self.dtype).astype(dtype)
        if self.kind == "index":
            return decode_rows(_float(parts[0], E2M1), _float(parts[1], E8M0), dtype)
        codes, scales, rotary, _ = jnp.split(parts[0], self._ends, axis=-1)
        nope = decode_rows(_float(codes, E4M3), _float(scales, E8M0), dtype)
        rotary = rotary.reshape(*rotary.shape[:-1], self.rotary, 2)
        return jnp.concatenate([nope, jax.lax.bitcast_convert_type(rotary, jnp.bfloat16).astype(dtype)], axis=-1)

    def stored(self, rows: Array) -> Array:
        """[..., C] rows as they read back once stored, so that a chunk's own rows equal what later chunks will see."""
        return self.decode(self.encode(rows), rows.dtype)

    def read(self, layer: Any, rows: Array, index: Array, dtype: Any) -> Array:
        """Rows `index` [B, ...] of batch rows `rows` (broadcast with `index`): [B, ..., C]."""
        return self.decode(tuple(array[layer, rows, index] for array in self.arrays), dtype)

    def write(self, layer: Any, rows: Array, index: Array, values: Array) -> Rows:
        """Stores `values` [B, n, C] at `index` [B, n]; an index out of range stores nothing."""
        parts = self.encode(values)
        arrays = tuple(
            array.at[layer, rows, index].set(part, mode="drop") for array, part in zip(self.arrays, parts, strict=True)
        )
        return self.replace(arrays=arrays)


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
    share at any length. Numbers are a row's own count of its entries; slots are places on this device.

    Attributes:
      rows: the role's rows, all layers.
      layer: which of them this is.
      dtype: dtype that is read.
      axes: mesh axes over which the entries are spread.
    """

    rows: Rows
    layer: Any
    dtype: Any = struct.field(pytree_node=False)
    axes: Axes = struct.field(pytree_node=False, default=())

    @classmethod
    def local(cls, entries: Array) -> Entries:
        """Wraps entries [B, E, C] that live in no cache, differentiably.

        They are held in float32, in which the gradients that reach an entry from all query blocks are then added up.
        """
        return cls(Rows((entries[None].astype(jnp.float32),), dtype=jnp.float32), 0, entries.dtype)

    @property
    def count(self) -> int:
        """Entries of a row that this device can hold."""
        return self.rows.shape[2]

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

    def write(self, numbers: Array, entries: Array) -> Entries:
        """Stores `entries` [B, E, C] as `numbers` [B, E], dropping those out of range or of other devices."""
        slots = self.slots(numbers)
        slots = jnp.where(slots < 0, self.count, slots)
        return self.replace(rows=self.rows.write(self.layer, _batch(slots, 1), slots, entries))

    def gather(self, slots: Array) -> Array:
        """Entries at `slots` [B, Q, K] (-1 reads an arbitrary row): [B, Q, K, C]."""
        return self.rows.read(self.layer, _batch(slots, 2), jnp.maximum(slots, 0), self.dtype)

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
        devices = collectives.size(self.axes)
        sizes = sorted({-(-self.count // 16), -(-self.count // 4), self.count})

        def gathered(slots: int) -> Callable[[tuple[Array, ...]], tuple[Array, ...]]:
            def gather(array: Array) -> Array:
                cut = jax.lax.dynamic_slice(
                    array, (self.layer, *(0,) * (array.ndim - 1)), (1, array.shape[1], slots, *array.shape[3:])
                )
                rows = jax.lax.all_gather(cut, self.axes, axis=3)  # numbers rise along devices, then along slots
                rows = rows.reshape(*cut.shape[:2], slots * devices, *cut.shape[3:])
                room = [(0, 0)] * 2 + [(0, (self.count - slots) * devices)] + [(0, 0)] * (array.ndim - 3)
                return jnp.pad(rows, room)

            return lambda arrays: tuple(gather(array) for array in arrays)

        limit = collectives.pmax(limit, everywhere)
        enough = sum((limit > slots * devices).astype(jnp.int32) for slots in sizes[:-1])
        arrays = jax.lax.switch(enough, [gathered(slots) for slots in sizes], self.rows.arrays)
        return Entries(self.rows.replace(arrays=arrays), 0, self.dtype)

    def block(self, first: Any, size: int) -> Array:
        """Slots [first, first + size) of every row: [B, size, C]. `first + size` must not exceed `count`."""

        def cut(array: Array) -> Array:
            starts = (self.layer, 0, first, *(0,) * (array.ndim - 3))
            return jax.lax.dynamic_slice(array, starts, (1, array.shape[1], size, *array.shape[3:]))[0]

        return self.rows.decode(tuple(cut(array) for array in self.rows.arrays), self.dtype)


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
        "csa state", "hca state" and "index state", float32 projections of the tokens whose block is open.
      max_length: positions that the entries have room for. Lengths are known only at run time: whoever feeds a cache
        keeps within it, for the entries of tokens beyond it are dropped.
    """

    lengths: Array
    mtp_lengths: Array
    rows: dict[str, Rows]
    max_length: int = struct.field(pytree_node=False)

    @property
    def released(self) -> bool:
        """Whether keys are held in the release's number formats."""
        return self.rows["window"].kind == "kv"

    def store(self, role: str, rows: Rows) -> Cache:
        """The cache with other rows for a role."""
        return self.replace(rows=self.rows | {role: rows})

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

    def place(name: str) -> tuple[str, ...] | None:
        return tuple(axis for axis in rules[name] if axis in mesh.shape) or None

    def spec(role: str) -> PartitionSpec:
        return PartitionSpec(None, place("batch"), place("entries") if role in ("csa", "hca", "index") else None)

    rows = {role: jax.tree.map(lambda _, role=role: spec(role), rows) for role, rows in cache.rows.items()}
    lengths = PartitionSpec(place("batch"))
    return cache.replace(lengths=lengths, mtp_lengths=lengths, rows=rows)


def init_cache(
    config: Config,
    batch: int,
    max_length: int,
    *,
    dtype: CacheDtype = "bfloat16",
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
      mesh: devices to place it on; None is the default device.
      rules: which mesh axes split which logical axes ("batch", "entries"), a `sharding.axes.Rules` or a preset's name.

    Raises:
      ShardingError: rows that do not split evenly over the mesh.
      ValueError: an unknown dtype, a length out of range, or head sizes that the released formats cannot hold.
    """
    build = functools.partial(_empty, config, batch, max_length, dtype, _spread(mesh, resolve(rules)))
    if mesh is None:
        return build()
    sharding(mesh, ("batch",), (batch,), resolve(rules), name="the cache")
    shapes = cache_shapes(config, batch, max_length, dtype=dtype, mesh=mesh, rules=rules)
    return jax.jit(build, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))()


def cache_shapes(
    config: Config,
    batch: int,
    max_length: int,
    *,
    dtype: CacheDtype = "bfloat16",
    mesh: Mesh | AbstractMesh | None = None,
    rules: Rules | str | None = None,
) -> Any:
    """What `init_cache` makes, as `jax.ShapeDtypeStruct`s that say where each array lies; for a mesh of none too."""
    table = resolve(rules)
    shapes = jax.eval_shape(lambda: _empty(config, batch, max_length, dtype, _spread(mesh, table)))
    if mesh is None:
        return shapes
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs(shapes, table, mesh))
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def _spread(mesh: Mesh | AbstractMesh | None, rules: Rules) -> int:
    """Devices that a row's entries are spread over."""
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in rules["entries"])


def _empty(config: Config, batch: int, max_length: int, dtype: CacheDtype, spread: int) -> Cache:
    """An empty cache; entries are padded to a multiple of the devices that they are spread over."""
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

    released = dtype == "released"
    plain = {"kind": "plain", "dtype": jnp.dtype("bfloat16" if released else dtype)}
    key_form = {"kind": "kv", "rotary": config.qk_rope_head_dim} if released else plain
    index_form = {"kind": "index"} if released else plain

    def keys(layers: int, count: int) -> Rows:
        return Rows.empty((layers, batch, count), config.head_dim, **key_form)

    def index_keys(layers: int, count: int) -> Rows:
        return Rows.empty((layers, batch, count), config.index_head_dim, **index_form)

    def state(layers: int, ratio: int, width: int) -> Rows:
        return Rows.empty((layers, batch, span(ratio) + SPARE), projection_width(ratio, width))

    attention = [layer.attention for layer in config.layers]
    ring = config.sliding_window + SPARE
    rows = {"window": keys(len(attention), ring)}
    for role in ("csa", "hca"):
        if layers := attention.count(role):
            ratio = RATIO_OF_ROLE[role]
            count = -(-max(1, max_length // ratio) // spread) * spread
            rows[role] = keys(layers, count)
            rows[role + " state"] = state(layers, ratio, config.head_dim)
            if role == "csa":
                rows["index"] = index_keys(layers, count)
                rows["index state"] = state(layers, ratio, config.index_head_dim)
    if config.num_nextn_predict_layers:
        rows["mtp"] = keys(config.num_nextn_predict_layers, ring)
    # Two arrays, not one used twice: a donated cache may not hold a buffer in two places.
    lengths, mtp_lengths = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)
    return Cache(lengths=lengths, mtp_lengths=mtp_lengths, rows=rows, max_length=max_length)


def _batch(like: Array, trailing: int) -> Array:
    """Batch row numbers shaped to broadcast against an index with `trailing` more axes."""
    return jnp.arange(like.shape[0]).reshape(-1, *(1,) * trailing)


def _bits(x: Array) -> Array:
    """Floats narrower than 32 bits as unsigned integers; two 4-bit ones to a byte, along the last axis."""
    if x.dtype == E2M1:
        # By arithmetic: XLA:CPU has been seen to make invalid code of bitcasts that involve 4-bit types.
        values = x.astype(jnp.float32)
        size = jnp.abs(values)
        code = jnp.where(size <= 2, 2 * size, 5 + (size > 3) + (size > 4)).astype(jnp.uint8)
        code |= jnp.where(values < 0, 8, 0).astype(jnp.uint8)
        return code[..., 0::2] | (code[..., 1::2] << 4)
    width = x.dtype.itemsize
    return x if width >= 4 else jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}[width])


def _float(x: Array, dtype: Any) -> Array:
    """Inverse of `_bits`; E2M1 comes as float32."""
    if x.dtype == dtype:
        return x
    if jnp.dtype(dtype) == E2M1:
        code = jnp.stack([x & 15, x >> 4], axis=-1).reshape(*x.shape[:-1], 2 * x.shape[-1])
        step = (code & 7).astype(jnp.float32)
        size = jnp.where(step <= 4, step / 2, step - 2 + (step > 6))
        return jnp.where(code >= 8, -size, size)
    return jax.lax.bitcast_convert_type(x, dtype)
