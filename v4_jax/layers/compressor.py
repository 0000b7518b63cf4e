"""The compressor: pools every 4 (with overlap) or 128 tokens into one entry, by a learned per-channel softmax.

Technical report, section 2.3.1 and 2.3.2. The same module makes the CSA entries, the HCA entries and the indexer's
keys; they differ in ratio and width only. Projections and pooling are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.cache.entries import Entries, span
from v4_jax.cache.ring import Ring, halo
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels import choose
from v4_jax.kernels.choose import norm_rotate
from v4_jax.kernels.compressor.tpu import CompressorWeights
from v4_jax.kernels.rotary.reference import Projection, Steps
from v4_jax.layer_stack import uncut
from v4_jax.layout import SHORT, Blocks, Layout
from v4_jax.natural import remainder
from v4_jax.parameters import Module
from v4_jax.policy import Policy


class Compressed(NamedTuple):
    """What comes of a chunk.

    Attributes:
      fresh: [B, E, width] entries of the blocks that end in it (`Layout.blocks`); None where they are stored already.
      open_blocks: the open blocks after it; None without a cache.
      stored: the entries of all layers, with those of a short chunk among them; None otherwise.
    """

    fresh: Array | None
    open_blocks: StoredRows | None
    stored: StoredRows | None = None


class Compressor(Module):
    """Entries from a layer's normed input; `prefix` ends in `compressor.`.

    Attributes:
      config: the architecture.
      policy: precision.
      ratio: tokens per entry, 4 or 128.
      width: channels of an entry.
      index: whether the entries are index keys (which the release rounds to E2M1) or keys/values (E4M3).
    """

    config: Architecture
    policy: Policy
    ratio: int
    width: int
    index: bool = False

    def setup(self) -> None:  # noqa: D102 called by Linen
        c = self.config
        shape, axes = (self.blocks_per_token * self.width, c.hidden_size), ("compressed", "embed")
        # With overlap, one matrix serves the block after a token's own, another the token's own block.
        self.value_weight, self.gate_weight = (
            self.linear(
                name,
                shape,
                axes,
                config=c,
                storage="bf16",
                matrices=self.blocks_per_token,
                family="indexer" if self.index else "compressor",
            )
            for name in ("wkv", "wgate")
        )
        self.place_gates = self.declare(
            "ape",
            (self.ratio, shape[0]),
            (None, "compressed"),
            released="ape",
            storage="f32",
            group="adamw",
            init=nn.initializers.zeros,
            stacked=True,
        )
        self.norm_weight = self.norm("norm", self.width)

    @property
    def blocks_per_token(self) -> int:
        """Blocks that a token is part of: 2 where they overlap."""
        return span(self.ratio) // self.ratio

    def projections(self) -> list[Projection]:
        """What makes values and gates of the layer's input; no gradient flows from index keys to it."""
        weights = self.value_weight, self.gate_weight
        return [Projection(weight, jnp.float32, detached=self.index) for weight in weights]

    def __call__(
        self,
        values: Array,
        gates: Array,
        layout: Layout,
        open_blocks: Ring | None,
        stored: Entries | None,
    ) -> Compressed:
        """Compresses a chunk.

        Args:
          values: [B, S, P] float32 projections of the layer's normed input.
          gates: likewise.
          layout: where its tokens stand.
          open_blocks: projections of the last tokens of each row, or None without a cache.
          stored: earlier entries, to which those of a short chunk are added; None without a cache.
        """
        c, ratio, norm, ape = self.config, self.ratio, self.norm_weight, self.place_gates
        blocks, past = layout.blocks(ratio), span(ratio) - 1
        steps = Steps(c.rms_norm_eps, self.policy.rounding("index" if self.index else "keys"))

        def in_one(values: Array, gates: Array, open_blocks: Ring | None) -> tuple[Array, StoredRows | None]:
            """All entries at once, and the open blocks after them."""
            before = after = None
            with jax.named_scope("compressor.project"):
                shifted = gates + uncut(ape)[remainder(layout.phase, ratio)]
                projections = jnp.concatenate([values, shifted], axis=-1)
            if open_blocks is not None:
                before, after = open_blocks.advance(projections, layout, past, self.split)
            elif self.split.sequence:
                first = jnp.zeros((values.shape[0], past, projections.shape[-1]), projections.dtype)
                before = lambda: halo(projections, first, self.split)  # noqa: E731

            @jax.named_scope("compressor.pool")
            def compress() -> Array:
                own, previous = _gather(projections, before() if before else None, blocks, ratio)
                entries = _pool(own, previous if self.blocks_per_token == 2 else None, blocks)
                return norm_rotate(entries.astype(self.policy.compute_dtype), norm, blocks.turn, steps)

            if open_blocks is None or values.shape[1] >= ratio:
                return compress(), after
            # In most decoding steps no block ends, and entries that do not exist are never stored.
            nothing = jax.eval_shape(compress)
            ends = jnp.any(blocks.complete)
            return jax.lax.cond(ends, compress, lambda: jnp.zeros(nothing.shape, nothing.dtype)), after

        if open_blocks is None or stored is None or self.split.sequence or layout.size > SHORT:
            fresh, after = in_one(values, gates, open_blocks)
            return Compressed(fresh, after)

        def at_once(values: Array, gates: Array, open_blocks: Ring, stored: Entries) -> tuple[StoredRows, StoredRows]:
            fresh, after = in_one(values, gates, open_blocks)
            assert after is not None
            with jax.named_scope("attention.store_entries"):
                return after, stored.write(blocks.numbers, fresh).rows

        operands = (values, gates), CompressorWeights(ape, norm), open_blocks, stored, layout, steps
        with jax.named_scope("compressor.step"):
            return Compressed(None, *choose.compress(at_once, *operands))


def _gather(projections: Array, history: Array | None, blocks: Blocks, ratio: int) -> tuple[Array, Array]:
    """Projections [B, S, C] of each block's tokens and of the block's before: two [B, E, ratio, C] arrays."""
    batch, _, channels = projections.shape
    count = blocks.first_token.shape[1]
    if not blocks.aligned:
        index = blocks.first_token[..., None] + jnp.arange(ratio)
        if history is not None:
            projections, index = jnp.concatenate([history, projections], axis=1), index + history.shape[1]
        rows = jnp.arange(batch)[:, None, None]
        return projections[rows, index], projections[rows, jnp.maximum(index - ratio, 0)]
    # Aligned rows are contiguous: one slice each, from the block before the first.
    size = (count + 1) * ratio
    lead = jnp.zeros((batch, ratio, channels), projections.dtype)
    if history is None:  # every row begins with its document's first token
        aligned = jnp.concatenate([lead, projections], axis=1)[:, :size]
    else:
        # A block that stays open reaches past the chunk, and one without overlap has less history than `lead`; neither
        # part is ever pooled into an entry that exists.
        extended = jnp.concatenate([lead, history, projections, lead], axis=1)
        begin = blocks.first_token[:, 0] + history.shape[1]
        aligned = jax.vmap(lambda tokens, start: jax.lax.dynamic_slice_in_dim(tokens, start, size))(extended, begin)
    grouped = aligned.reshape(batch, count + 1, ratio, channels)
    return grouped[:, 1:], grouped[:, :-1]


def _pool(own: Array, previous: Array | None, blocks: Blocks) -> Array:
    """Softmax-weighted mean over a block's tokens, per channel: [B, E, width].

    With overlap, a token's first half of channels feeds the block after its own and the second half its own.
    """
    values, gates = jnp.split(own, 2, axis=-1)
    if previous is not None:
        width = values.shape[-1] // 2
        old_values, old_gates = jnp.split(previous, 2, axis=-1)
        old_gates = jnp.where(blocks.has_previous[..., None, None], old_gates[..., :width], -jnp.inf)
        values = jnp.concatenate([old_values[..., :width], values[..., width:]], axis=2)
        gates = jnp.concatenate([old_gates, gates[..., width:]], axis=2)
    return jnp.sum(jax.nn.softmax(gates, axis=2) * values, axis=2)
