"""Hybrid attention: a sliding window, joined by sparsely picked (CSA) or all (HCA) compressed entries, with sinks.

Technical report, section 2.3. One key/value head serves all query heads. Work goes by blocks of queries: each block
projects its own queries, sees its window and its entries, and writes its own output, so that nothing of size
sequence x heads or sequence x entries is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.cache import Cache, Entries, Ring, Rows
from v4_jax.compressor import Compressor
from v4_jax.config import Config, Layer
from v4_jax.layout import Blocks, Layout
from v4_jax.lightning_indexer import LightningIndexer, index_queries, select
from v4_jax.linear import linear
from v4_jax.norm import rms_norm
from v4_jax.number_formats import BlockScaled, dequantise, fake_quant_kv
from v4_jax.parameters import Module
from v4_jax.policy import Policy, einsum
from v4_jax.rotary import inverse_frequencies, rotate

QUERY_BLOCK = 128  # queries of a row that are attended together,
BATCH_BLOCK = 512  # and of all rows, which bounds the memory of a large batch
ENTRY_BLOCK = 128  # entries that HCA attends at once

Choose = Callable[[dict[str, Array]], Array]

_MASKED = -1e30  # finite, so that a row with nothing to see stays free of NaN


class Partial(NamedTuple):
    """Softmax over some of the keys, in a form that can be merged with the rest (all float32).

    Attributes:
      maximum: [B, Q, H] largest logit.
      total: [B, Q, H] sum of exp(logit - maximum).
      weighted: [B, Q, H, C] sum of exp(logit - maximum) * value.
    """

    maximum: Array
    total: Array
    weighted: Array


def attend(queries: Array, keys: Array, mask: Array) -> Partial:
    """Attention over one set of keys, which are also the values.

    Args:
      queries: [B, Q, H, C].
      keys: [B, K, C] shared by the queries, or [B, Q, K, C] with each query's own.
      mask: [B, Q, K] True where visible.
    """
    letters = "bkc" if keys.ndim == 3 else "bqkc"
    logits = einsum(f"bqhc,{letters}->bqhk", queries, keys, dtype=queries.dtype, accumulate=jnp.float32)
    mask = mask[:, :, None, :]
    logits = jnp.where(mask, logits * queries.shape[-1] ** -0.5, _MASKED)
    maximum = jnp.max(logits, axis=-1)
    shares = jnp.where(mask, jnp.exp(logits - maximum[..., None]), 0.0)
    weighted = einsum(f"bqhk,{letters}->bqhc", shares, keys, dtype=keys.dtype, accumulate=jnp.float32)
    return Partial(maximum, jnp.sum(shares, axis=-1), weighted)


def merge(a: Partial, b: Partial) -> Partial:
    """Joins the softmaxes of two disjoint sets of keys."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    of_a, of_b = jnp.exp(a.maximum - maximum), jnp.exp(b.maximum - maximum)
    return Partial(
        maximum,
        a.total * of_a + b.total * of_b,
        a.weighted * of_a[..., None] + b.weighted * of_b[..., None],
    )


def finish(partial: Partial, sink: Array) -> Array:
    """The attention output [B, Q, H, C] float32; the sink logit [H] takes part in the denominator alone."""
    maximum = jnp.maximum(partial.maximum, sink)
    rescale = jnp.exp(partial.maximum - maximum)
    total = partial.total * rescale + jnp.exp(sink - maximum)
    return partial.weighted * (rescale / total)[..., None]


def attend_range(queries: Array, entries: Entries, low: Array, high: Array) -> Partial:
    """Attention over every entry in [low, high) [B, Q], by blocks of entries; blocks nobody sees are skipped."""
    size = min(ENTRY_BLOCK, entries.count)

    def block(wanted: Array) -> Partial:
        first = jnp.minimum(wanted, entries.count - size)  # the last block may reach back over the one before
        number = first + jnp.arange(size)
        mask = (number >= wanted) & (number >= low[..., None]) & (number < high[..., None])
        return attend(queries, entries.block(first, size), mask)

    if size == entries.count:
        return block(jnp.int32(0))

    def step(partial: Partial, wanted: Array) -> tuple[Partial, None]:
        seen = jnp.any((high > wanted) & (low < wanted + size))
        return jax.lax.cond(seen, lambda p, w: merge(p, block(w)), lambda p, w: p, partial, wanted), None

    shape = queries.shape[:3]
    empty = Partial(jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros(queries.shape))
    return jax.lax.scan(step, empty, jnp.arange(0, entries.count, size, dtype=jnp.int32))[0]


class Attention(Module):
    """One attention sublayer of any role; `prefix` ends in `attn.`."""

    config: Config
    policy: Policy
    roles: Layer

    @nn.compact
    def __call__(
        self, y: Array, layout: Layout, cache: Cache | None, layer: Any, slot: Any, picks: Array | None
    ) -> tuple[Array, Cache | None, Array | None]:
        """Attends.

        Args:
          y: [B, S, D] normed, collapsed input.
          layout: where its tokens stand.
          cache: the whole cache, of which this layer's part is read and written; None without one.
          layer: the layer's number, its place in the window cache.
          slot: its number among the layers of its role, its place in the role's cache.
          picks: [B, S, K] entries to attend instead of the indexer's choice (CSA), or None.

        Returns:
          Output [B, S, D], the cache after the chunk, and the entries picked [B, S, K] (CSA) or None.
        """
        c, dtype = self.config, self.policy.compute_dtype
        heads, size = c.num_attention_heads, c.head_dim
        frequencies = inverse_frequencies(c, self.roles)
        wq_a = self.linear("wq_a", (c.q_lora_rank, c.hidden_size), ("q_lora", "embed"), config=c)
        wq_b = self.linear("wq_b", (heads * size, c.q_lora_rank), ("heads", "q_lora"), config=c)
        wkv = self.linear("wkv", (size, c.hidden_size), ("head_dim", "embed"), config=c)
        wo_a = self.linear(
            "wo_a", (c.o_groups * c.o_lora_rank, heads * size // c.o_groups), ("o_groups", None), config=c
        )
        wo_b = self.linear("wo_b", (c.hidden_size, c.o_groups * c.o_lora_rank), ("embed", "o_groups"), config=c)
        q_norm = self.norm("q_norm", c.q_lora_rank)
        kv_norm = self.norm("kv_norm", size)
        sink = self.declare(
            "attn_sink",
            (heads,),
            ("sinks",),
            released="attn_sink",
            storage="f32",
            group="adamw",
            init=nn.initializers.zeros,
        )

        latent = rms_norm(linear(y, wq_a, dtype), q_norm, c.rms_norm_eps)
        keys = rms_norm(linear(y, wkv, dtype), kv_norm, c.rms_norm_eps)
        keys = rotate(keys, layout.positions, frequencies)
        if self.policy.fake_quant:
            keys = fake_quant_kv(keys, c.qk_rope_head_dim)

        past = c.sliding_window - 1
        if cache is None:
            tail = jnp.zeros((y.shape[0], past, size), dtype)
        else:
            window = Ring(cache.rows["window"], layer, layout.cached, dtype)
            keys = window.rows.stored(keys)
            before, rows = window.advance(keys, layout.counts, past)
            tail, cache = before(), cache.store("window", rows)

        # Expanded once for all query blocks; only this layer's matrices exist in the compute dtype at a time. Plain
        # ones are cast by each block, so that their gradients add up over the blocks in their own dtype.
        wq_b, wo_a, wo_b = (
            dequantise(weight, dtype) if isinstance(weight, BlockScaled) else weight for weight in (wq_b, wo_a, wo_b)
        )
        wo_a = wo_a.reshape(c.o_groups, c.o_lora_rank, -1)
        entries, cache, choose, choice_inputs = self._compress(y, layout, cache, slot, frequencies)
        ratio = self.roles.ratio
        low, high = layout.visible(ratio) if ratio else (layout.first, layout.first)

        def block(tail: Array, x: dict[str, Array]) -> tuple[Array, tuple[Array, Array | None]]:
            queries = linear(x["latent"], wq_b, dtype).reshape(*x["latent"].shape[:2], heads, size)
            queries = rms_norm(queries, None, c.rms_norm_eps)
            queries = rotate(queries, x["positions"], frequencies)
            seen = jnp.concatenate([tail, x["keys"]], axis=1)
            number = x["index"][:1] - past + jnp.arange(seen.shape[1])
            oldest = jnp.maximum(x["first"], x["index"] - past)
            mask = (number >= oldest[..., None]) & (number <= x["index"][:, None])
            partial = attend(queries, seen, mask)
            picked = None
            if choose is not None and entries is not None:
                picked = choose(x) if picks is None else x["picks"]
                partial = merge(partial, attend(queries, entries.gather(picked), picked >= 0))
            elif entries is not None:
                partial = merge(partial, attend_range(queries, entries, x["low"], x["high"]))
            output = rotate(finish(partial, sink).astype(dtype), x["positions"], frequencies, inverse=True)
            output = output.reshape(*output.shape[:2], c.o_groups, -1)
            output = einsum("bqgi,goi->bqgo", output, wo_a, dtype=dtype)
            output = linear(output.reshape(*output.shape[:2], -1), wo_b, dtype)
            return seen[:, -past:], (output, picked)

        inputs = {
            "latent": latent,
            "keys": keys,
            "positions": layout.positions,
            "first": layout.first,
            "low": low,
            "high": high,
            **choice_inputs,
        }
        if picks is not None:
            inputs["picks"] = picks
        output, picked = by_query_blocks(block, tail, inputs)
        return output, cache, picked

    def _compress(
        self, y: Array, layout: Layout, cache: Cache | None, slot: Any, frequencies: Any
    ) -> tuple[Entries | None, Cache | None, Choose | None, dict[str, Array]]:
        """Runs the layer's compressors.

        Returns:
          The entries its queries may see, the cache after the chunk, how a query block picks entries (CSA), and the
          [B, S, ...] inputs which that takes.
        """
        role, ratio, c, dtype = self.roles.attention, self.roles.ratio, self.config, self.policy.compute_dtype
        if role == "sliding":
            return None, cache, None, {}
        make = Compressor(
            config=c,
            policy=self.policy,
            prefix=self.prefix + "compressor.",
            ratio=ratio,
            width=c.head_dim,
            frequencies=frequencies,
            name="compressor",
        )
        state = _state(cache, role, slot, layout)
        fresh, blocks, after = make(y, layout, state)
        entries, cache = _store(fresh, blocks, after, cache, role, slot, dtype)
        if role == "hca":
            return entries, cache, None, {}

        indexer = LightningIndexer(
            config=c, policy=self.policy, prefix=self.prefix + "indexer.", frequencies=frequencies, name="indexer"
        )
        state = _state(cache, "index", slot, layout)
        keys, blocks, after, weights, wq_b = indexer(y, layout, state)
        index, cache = _store(keys, blocks, after, cache, "index", slot, dtype)

        if index is None:
            return None, cache, None, {}

        def choose(x: dict[str, Array]) -> Array:
            queries = index_queries(x["latent"], wq_b, x["positions"], frequencies, c, self.policy)
            return select(queries, x["weights"], index, x["low"], x["high"], c.index_topk)

        return entries, cache, choose, {"weights": weights}


def _state(cache: Cache | None, role: str, slot: Any, layout: Layout) -> Ring | None:
    """The open blocks of one of a layer's compressors."""
    return None if cache is None else Ring(cache.rows[role + " state"], slot, layout.cached, jnp.float32)


def _store(
    fresh: Array, blocks: Blocks, state: Rows | None, cache: Cache | None, role: str, slot: Any, dtype: Any
) -> tuple[Entries | None, Cache | None]:
    """Adds a chunk's entries to the cache and returns all that its queries may see; None when there are none."""
    if cache is None or state is None:
        return (Entries.local(fresh) if fresh.shape[1] else None), None
    entries = Entries(cache.rows[role], slot, dtype).write(blocks.slots, fresh)
    return entries, cache.store(role, entries.rows).store(role + " state", state)


def by_query_blocks(block: Any, carry: Any, inputs: dict[str, Array]) -> tuple[Array, Array | None]:
    """Runs `block(carry, inputs of one block) -> (carry, outputs)` over blocks of at most `QUERY_BLOCK` queries.

    Args:
      block: sees each [B, S, ...] input cut to [B, Q, ...], and "index" [Q], the queries' chunk indices.
      carry: what the first block starts from.
      inputs: [B, S, ...] arrays.

    Returns:
      The outputs, [B, S, ...] again. The backward pass recomputes each block.
    """
    batch, size = next(iter(inputs.values())).shape[:2]
    count = -(-size // min(QUERY_BLOCK, max(16, BATCH_BLOCK // batch)))
    width = -(-size // count)
    if count == 1:
        return block(carry, inputs | {"index": jnp.arange(size)})[1]

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * width - size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, width, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * width, *x.shape[3:])[:, :size]

    blocks = {name: cut(x) for name, x in inputs.items()}
    blocks["index"] = jnp.arange(count * width).reshape(count, width)
    outputs = jax.lax.scan(jax.checkpoint(block), carry, blocks)[1]
    return jax.tree.map(join, outputs)
