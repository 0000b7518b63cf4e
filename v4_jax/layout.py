"""Where every token stands: document starts, compression blocks and visible ranges, computed once per forward pass.

Every batch row keeps its own length and position, and packed documents start anywhere; all of that is resolved here
into plain index arrays, so that layers need not know whether a row is cached, ragged or packed.

Chunk index: tokens of this call are numbered 0..S-1 in their row; what came before has negative indices. On a mesh that
splits the sequence, a device sees its own shard as the chunk, and what the devices before it hold has negative indices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.cache.entries import here
from v4_jax.layers.rotary import Turn, inverse_frequencies, turn
from v4_jax.sharding.collectives import Axes

SHORT = 9  # tokens of a chunk that rings store before they are read, and that compressors take one by one


class Blocks(struct.PyTreeNode):
    """The compression blocks that end within this chunk, for one ratio; E is their static upper bound per row.

    Attributes:
      first_token: [B, E] chunk index of each block's first token; negative where it is cached.
      complete: [B, E] whether the block exists.
      has_previous: [B, E] whether a block of the same document precedes it.
      positions: [B, E] rotary position of its first token.
      numbers: [B, E] number of its entry among the row's entries; out of range where there is no such block.
      turn: by how much `positions` turn; None until the layout is `scheduled`.
      aligned: whether a row's blocks follow each other without gaps from `first_token[:, 0]` on.
    """

    first_token: Array
    complete: Array
    has_previous: Array
    positions: Array
    numbers: Array
    aligned: bool = struct.field(pytree_node=False)
    turn: Turn | None = None


class Schedule(struct.PyTreeNode):
    """What follows from a layout and is the same in all layers of a role, by tokens per entry (0 for sliding layers).

    Attributes:
      turns: by how much the tokens' positions turn.
      closing: by how much the entry of the block that a token ends turns, in short chunks.
      total: see `Layout.total`.
      blocks: see `Layout.blocks`.
      visible: see `Layout.visible`.
      here: the same in local numbers of the entries that lie on this device, where devices keep each its own.
    """

    turns: dict[int, Turn]
    closing: dict[int, Turn]
    total: Array
    blocks: dict[int, Blocks]
    visible: dict[int, tuple[Array, Array]]
    here: dict[int, tuple[Array, Array]]


class Layout(struct.PyTreeNode):
    """Positions and document structure of a [B, S] chunk.

    Attributes:
      positions: [B, S] int32, rotary positions.
      first: [B, S] int32, chunk index of the first token of each token's document; negative where it came before.
      valid: [B, S] bool, False for padding.
      start: [B] int32 tokens of each row that came before the chunk; None when there are none (the chunk begins the
        row), and in packed rows.
      packed: whether rows may hold several documents.
      whole: the chunk that this one is a device's shard of; None when the sequence is not split.
      offset: int32 index of its first token in `whole`.
      sealed: [B] int32 tokens whose blocks have their entries already; None is the same as 0.
      schedule: what layers would otherwise compute anew, each for itself; see `scheduled`.
    """

    positions: Array
    first: Array
    valid: Array
    start: Array | None
    packed: bool = struct.field(pytree_node=False)
    whole: Layout | None = None
    offset: Array | int = 0
    sealed: Array | None = None
    schedule: Schedule | None = None

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        *,
        start: Array | None = None,
        lengths: Array | None = None,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        sealed: Array | None = None,
    ) -> Layout:
        """Resolves the optional arguments of a forward pass.

        Args:
          shape: (B, S).
          start: [B] tokens already in the cache.
          lengths: [B] valid tokens of each row in this chunk; the rest is padding on the right.
          segment_ids: [B, S] document of each token, contiguous; 0 is padding. Not with a cache.
          positions: [B, S] rotary positions; by default counted from each document's first token.
          sealed: [B] tokens of each row whose blocks are not compressed anew; not with `segment_ids`.

        Raises:
          ValueError: segment ids together with a cache, or an argument of the wrong shape.
        """
        batch, size = shape
        start = None if start is None else start.astype(jnp.int32)
        for name, value, expected in (
            ("lengths", lengths, (batch,)),
            ("sealed", sealed, (batch,)),
            ("segment_ids", segment_ids, shape),
            ("positions", positions, shape),
        ):
            if value is not None and tuple(value.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected}")
        index = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), shape)
        valid = jnp.ones(shape, bool) if lengths is None else index < lengths[:, None]
        if segment_ids is not None:
            if start is not None:
                raise ValueError(
                    "packed documents (segment_ids) and a cache cannot be combined: a cached row is one document"
                )
            valid &= segment_ids != 0
            changed = jnp.concatenate([jnp.ones((batch, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
            first = jax.lax.cummax(jnp.where(changed, index, 0), axis=1)
        else:
            first = jnp.zeros(shape, jnp.int32) if start is None else jnp.broadcast_to(-start[:, None], shape)
        if positions is None:
            positions = index - first
        return cls(positions, first, valid, start, segment_ids is not None, sealed=sealed)

    def shard(self, offset: Array, size: int) -> Layout:
        """The tokens [offset, offset + size) as a device sees them that holds only these."""

        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, offset, size, axis=1)

        start = None
        if not self.packed:
            start = (0 if self.start is None else self.start) + jnp.full(self.valid.shape[:1], offset, jnp.int32)
        first = cut(self.first) - offset
        return Layout(cut(self.positions), first, cut(self.valid), start, self.packed, self, offset, sealed=self.sealed)

    def scheduled(self, config: Architecture, axes: Axes = ()) -> Layout:
        """The same with its schedule: what a scan over layers would otherwise compute in each.

        Args:
          config: the architecture.
          axes: mesh axes over which caches spread entries.
        """
        ratios = sorted({0, *(layer.ratio for layer in config.layers)})  # what drafts is sliding
        turns = {ratio: turn(self.positions, inverse_frequencies(config, ratio)) for ratio in ratios}
        entries = [ratio for ratio in ratios if ratio]
        blocks = {ratio: self.blocks(ratio) for ratio in entries}
        for ratio, one in blocks.items():
            blocks[ratio] = one.replace(turn=turn(one.positions, inverse_frequencies(config, ratio)))
        closing = {
            ratio: turn(self.positions - (ratio - 1), inverse_frequencies(config, ratio))
            for ratio in (entries if self.size <= SHORT else ())
        }
        visible = {ratio: self.visible(ratio) for ratio in entries}
        local = {ratio: (here(low, axes), here(high, axes)) for ratio, (low, high) in visible.items()}
        return self.replace(schedule=Schedule(turns, closing, self.total, blocks, visible, local))

    def turn(self, ratio: int) -> Turn:
        """By how much the tokens' positions turn in layers of `ratio` tokens per entry; of a layout with a schedule."""
        assert self.schedule is not None
        return self.schedule.turns[ratio]

    def closing_turn(self, ratio: int) -> Turn:
        """By how much the entry of the block that each token ends turns, in a short chunk's layout with a schedule."""
        assert self.schedule is not None
        return self.schedule.closing[ratio]

    @property
    def size(self) -> int:
        """Tokens of the chunk, padding included."""
        return self.positions.shape[1]

    @property
    def cached(self) -> Array:
        """[B] tokens of each row in the cache when the call began."""
        start = (self.whole or self).start
        if start is None:
            raise ValueError("this layout describes rows without a cache")
        return start

    @property
    def phase(self) -> Array:
        """[B, S] tokens of the same document before each token."""
        return jnp.arange(self.size, dtype=jnp.int32) - self.first

    @property
    def counts(self) -> Array:
        """[B] valid tokens of each row in this chunk."""
        return jnp.sum(self.valid, axis=1, dtype=jnp.int32)

    @property
    def total(self) -> Array:
        """[B] valid tokens of each row in the chunk of all devices."""
        if self.schedule is not None:
            return self.schedule.total
        return (self.whole or self).counts

    @property
    def last(self) -> Array:
        """[B] index of each row's last valid token in the chunk of all devices."""
        valid = (self.whole or self).valid
        return jnp.max(jnp.where(valid, jnp.arange(valid.shape[1], dtype=jnp.int32), 0), axis=1)

    def _closes(self, ratio: int) -> Array:
        """[B, S] tokens that end a compression block of their document."""
        return self.valid & (self.phase % ratio == ratio - 1)

    def _closed_before(self, ratio: int) -> Array:
        """[B, 1] blocks that end on earlier devices."""
        if self.whole is None:
            return jnp.zeros((self.valid.shape[0], 1), jnp.int32)
        closes = self.whole._closes(ratio)
        return jnp.sum(closes & (jnp.arange(closes.shape[1]) < self.offset), axis=1, keepdims=True, dtype=jnp.int32)

    def blocks(self, ratio: int) -> Blocks:
        """The compression blocks that end in this chunk (technical report, section 2.3)."""
        if self.schedule is not None:
            return self.schedule.blocks[ratio]
        batch = self.positions.shape[0]
        limit = jnp.iinfo(jnp.int32).max
        if self.packed:
            # At most floor(S / ratio) blocks, anywhere: list the tokens that close one.
            count = self.size // ratio
            closes = self._closes(ratio)
            order = jnp.cumsum(closes, axis=1) - 1
            rows = jnp.arange(batch)[:, None]
            index = jnp.broadcast_to(jnp.arange(self.size, dtype=jnp.int32), closes.shape)
            last = jnp.full((batch, count), limit, jnp.int32)
            last = last.at[rows, jnp.where(closes, order, count)].set(index, mode="drop")
            complete = last < limit
            last = jnp.where(complete, last, ratio - 1)
            first_token = last - (ratio - 1)
            has_previous = complete & (jnp.take_along_axis(self.phase, last, axis=1) >= 2 * ratio - 1)
            positions = jnp.take_along_axis(self.positions, last, axis=1) - (ratio - 1)
            numbers = jnp.where(complete, self._closed_before(ratio) + jnp.arange(count, dtype=jnp.int32), limit)
            return Blocks(first_token, complete, has_previous, positions, numbers, aligned=False)
        # One document per row: blocks follow each other from the one that is open when the chunk begins.
        count = self.size // ratio if self.start is None else -(-self.size // ratio)
        start = jnp.zeros((batch,), jnp.int32) if self.start is None else self.start
        numbers = (start // ratio)[:, None] + jnp.arange(count, dtype=jnp.int32)
        first_token = numbers * ratio - start[:, None]
        complete = first_token + ratio <= self.counts[:, None]
        if self.sealed is not None:
            complete &= numbers * ratio >= self.sealed[:, None]
        positions = self.positions[:, :1] + first_token
        return Blocks(first_token, complete, numbers > 0, positions, jnp.where(complete, numbers, limit), aligned=True)

    def visible(self, ratio: int) -> tuple[Array, Array]:
        """Half-open range [low, high) of entries that each token may see, two [B, S] int32 arrays."""
        if self.schedule is not None:
            return self.schedule.visible[ratio]
        done = (self.phase + 1) // ratio
        if not self.packed:
            return jnp.zeros_like(done), done
        high = self._closed_before(ratio) + jnp.cumsum(self._closes(ratio), axis=1, dtype=jnp.int32)
        return high - done, high

    def visible_here(self, ratio: int) -> tuple[Array, Array]:
        """The same in local numbers of the entries that lie on this device; of a layout with a schedule."""
        assert self.schedule is not None
        return self.schedule.here[ratio]
