"""The compressor: pools every 4 (with overlap) or 128 tokens into one entry, by a learned per-channel softmax.

Technical report, section 2.3.1 and 2.3.2. The same module makes the CSA entries, the HCA entries and the indexer's
keys; they differ in ratio and width only. Projections and pooling are float32.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.cache.entries import span
from v4_jax.cache.ring import Ring, halo
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels.choose import norm_rotate
from v4_jax.kernels.rotary.reference import Steps
from v4_jax.layers.linear import linears
from v4_jax.layout import Blocks, Layout
from v4_jax.natural import remainder
from v4_jax.parameters import Module
from v4_jax.policy import Policy


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

    @nn.compact
    def __call__(self, y: Array, layout: Layout, open_blocks: Ring | None) -> tuple[Array, Blocks, StoredRows | None]:
        """Compresses a chunk.

        Args:
          y: [B, S, D] normed input of the layer.
          layout: where its tokens stand.
          open_blocks: projections of the last tokens of each row, or None without a cache.

        Returns:
          Entries [B, E, width] of the blocks that end in this chunk, those blocks, and the open blocks after them.
        """
        c, ratio, width = self.config, self.ratio, self.width
        blocks_per_token = span(ratio) // ratio
        channels = blocks_per_token * width
        shape, axes = (channels, c.hidden_size), ("compressed", "embed")
        # With overlap, one matrix serves the block after a token's own, another the token's own block.
        wkv, wgate = (
            self.linear(name, shape, axes, config=c, storage="bf16", matrices=blocks_per_token)
            for name in ("wkv", "wgate")
        )
        ape = self.declare(
            "ape",
            (ratio, channels),
            (None, "compressed"),
            released="ape",
            storage="f32",
            group="adamw",
            init=nn.initializers.zeros,
        )
        norm = self.norm("norm", width)

        with jax.named_scope("compressor.project"):
            values, gates = linears(y, [wkv, wgate], jnp.float32)
            projections = jnp.concatenate([values, gates + ape[remainder(layout.phase, ratio)]], axis=-1)

        blocks, before, after, past = layout.blocks(ratio), None, None, span(ratio) - 1
        if open_blocks is not None:
            before, after = open_blocks.advance(projections, layout, past, self.split)
        elif self.split.sequence:
            first = jnp.zeros((y.shape[0], past, projections.shape[-1]), projections.dtype)
            before = lambda: halo(projections, first, self.split)  # noqa: E731

        @jax.named_scope("compressor.pool")
        def compress() -> Array:
            own, previous = _gather(projections, before() if before else None, blocks, ratio)
            entries = _pool(own, previous if blocks_per_token == 2 else None, blocks)
            steps = Steps(c.rms_norm_eps, self.policy.rounding("index" if self.index else "keys"))
            return norm_rotate(entries.astype(self.policy.compute_dtype), norm, blocks.turn, steps)

        if open_blocks is None or y.shape[1] >= ratio:
            return compress(), blocks, after
        # In most decoding steps no block ends, and entries that do not exist are never stored.
        nothing = jax.eval_shape(compress)
        entries = jax.lax.cond(jnp.any(blocks.complete), compress, lambda: jnp.zeros(nothing.shape, nothing.dtype))
        return entries, blocks, after


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
