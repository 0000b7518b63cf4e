"""Hybrid attention: a sliding window, joined by sparsely picked (CSA) or all (HCA) compressed entries, with sinks.

Technical report, section 2.3. One key/value head serves all query heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.architecture import Architecture, Layer
from v4_jax.cache.cache import Cache, WindowRole
from v4_jax.cache.entries import ENTRY_RATIOS, Entries, EntryRole
from v4_jax.cache.ring import Ring, halo
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels.choose import attends_in_training, norm_rotate, trained_by_kernels
from v4_jax.kernels.indexer.marks import Marks, numbers_of
from v4_jax.kernels.rotary.reference import Projection, Settle, Steps
from v4_jax.layers.balance import exchanged, in_halves
from v4_jax.layers.compressor import Compressed, Compressor
from v4_jax.layers.entry_attention import attend_picked
from v4_jax.layers.indexer_loss import Attended, Scored, indexer_loss
from v4_jax.layers.lightning_indexer import LightningIndexer, index_queries, mark, select
from v4_jax.layers.linear import linear, project
from v4_jax.layers.partial_softmax import log_denominator, merge, merge_devices
from v4_jax.layers.partials import Packed, Partial, separate
from v4_jax.layers.query_blocks import (
    ATTENDED_BYTES,
    WIDE_BLOCK,
    Queries,
    QueryBlock,
    by_query_blocks,
    projects_whole,
)
from v4_jax.layers.rotary import Turn
from v4_jax.layers.stages import SPARSE, Stage, keep
from v4_jax.layers.visible import Visible
from v4_jax.layers.window_attention import (
    attend_ring,
    attend_window,
    attention_end,
    attention_output,
    project_output,
)
from v4_jax.layout import SHORT, Layout
from v4_jax.parameters import Module
from v4_jax.policy import Policy
from v4_jax.sharding.collectives import all_gather, psum
from v4_jax.sharding.platform import platform_of_mesh

FEW_QUERIES = 16  # so many tokens of a row visit the devices that hold its entries; for more, the entries come to them


class Index(NamedTuple):
    """What a CSA layer picks entries by.

    Attributes:
      keys: an index key of every entry.
      weights: [B, S, heads] float32 head weights of every query.
      queries: index queries [B, Q, heads, C] of a block's queries.
    """

    keys: Entries
    weights: Array
    queries: Callable[[Queries], Array]


class AttentionWeights(NamedTuple):
    """What every role has; shapes are those that a device works with.

    Attributes:
      wq_a: [q_lora_rank, D].
      wq_b: [H * C, q_lora_rank].
      wkv: [C, D].
      wo_a: [groups * o_lora_rank, H * C / groups].
      wo_b: [D, groups * o_lora_rank].
      q_norm: [q_lora_rank].
      kv_norm: [C].
      sink: [H].
    """

    wq_a: Any
    wq_b: Any
    wkv: Any
    wo_a: Any
    wo_b: Any
    q_norm: Array
    kv_norm: Array
    sink: Array


class Attention(Module):
    """One attention sublayer of any role; `prefix` ends in `attn.`.

    Attributes:
      config: the architecture.
      policy: precision.
      roles: what the layer is.
      stage: how CSA attends, and whether its indexer learns.
      window: where in the cache the layer's last keys are.
    """

    config: Architecture
    policy: Policy
    roles: Layer
    stage: Stage = SPARSE
    window: WindowRole = "window"

    @nn.compact
    def __call__(
        self, y: Array, layout: Layout, cache: Cache | None, layer: Any, role_index: Any, picks: Array | None
    ) -> tuple[Array, Cache | None, Array | None, Array | None]:
        """Attends.

        Args:
          y: [B, S, D] normed, collapsed input.
          layout: where its tokens stand.
          cache: the whole cache, of which this layer's part is read and written; None without one.
          layer: the layer's number, its place in the window's stack.
          role_index: its number among the layers of its role, its place in the stacks of the role.
          picks: [B, S, K] entries to attend instead of the indexer's choice (CSA), or None.

        Returns:
          Output [B, S, D], the cache after the chunk, the entries picked [B, S, K] or None, and the indexer's loss
          [B, S] or None.
        """
        c, dtype = self.config, self.policy.compute_dtype
        split, heads, size = self.split, c.num_attention_heads, c.head_dim
        turn = layout.turn(self.roles.ratio)
        wq_a, wq_b, wkv, wo_a, wo_b, q_norm, kv_norm, sink = self.weights()
        compressor, indexer = self._compressors()

        with jax.named_scope("attention.project"):
            wanted = [
                Projection(wq_a, dtype, then=Settle(q_norm, None, Steps(c.rms_norm_eps))),
                Projection(wkv, dtype, then=Settle(kv_norm, turn, self.key_steps)),
            ]
            for part in (compressor, indexer):
                wanted += part.projections() if part is not None else []
            alike = split.shared("heads") if cache is not None else ()  # gradients want whole weights
            latent, keys, *projected = project(y, wanted, alike)

        past = c.sliding_window - 1
        ring = None if cache is None else cache.window(self.window, layer, layout.cached, dtype)
        if ring is not None:
            keys = ring.rows.stored(keys)
        few = ring is not None and not split.sequence and layout.size <= SHORT  # they attend the ring itself

        entries, index, cache = self._compress(compressor, indexer, projected, layout, cache, role_index)
        ratio = self.roles.ratio
        shared = split.shared("heads")
        entry_axes = () if entries is None else entries.axes
        low, high = layout.first, layout.first
        if ratio:
            low, high = layout.visible_here(ratio) if entry_axes else layout.visible(ratio)
        visiting = tuple(axis for axis in shared if axis in entry_axes)  # all heads visit what such an axis splits

        def block(x: QueryBlock) -> tuple[Array, Array | None, Array | None, StoredRows | None]:
            with jax.named_scope("attention.queries"):
                projected = x.queries.projected
                if projected is None:
                    projected = linear(x.queries.latent, wq_b, dtype)
                queries = self.queries(projected, x.queries.turn)
            loss = scored = stored = here = None
            picked: Array | Marks | None = None
            at_once = x.keys is not None and entries is not None and not entry_axes
            if index is not None and not self.stage.dense:
                at_once = at_once and cache is None and attends_in_training(queries, x.keys, entries)
            if index is not None and x.queries.index_weights is not None:
                scored = Scored(index.queries(x.queries), x.queries.index_weights, index.keys)
                if not self.stage.dense:
                    picked = x.queries.picks
                    if picked is None and at_once:
                        picked = mark(*scored, x.visible, c.index_topk)
                    elif picked is None:
                        picked, here = select(*scored, x.visible, c.index_topk)
            window: Partial | Packed
            if at_once:
                window = attend_window(queries, x.keys, x.oldest, entries, x.visible, picked=picked)
            elif x.keys is not None:
                window = attend_window(queries, x.keys, x.oldest, cached=cache is not None)
            else:
                assert ring is not None
                window, stored = attend_ring(queries, keys, ring, layout, past)
            partials = [window]
            if entries is not None and not at_once:
                visitors = all_gather(queries, visiting, 2)
                if picked is None:
                    distant = attend_window(visitors, None, None, entries, x.visible, bool(visiting))
                else:
                    distant = attend_picked(visitors, entries, numbers_of(picked), here, bool(visiting))
                partials.append(merge_devices(distant, entry_axes, visiting))
            if entries is not None and scored is not None and self.stage.indexer_loss:
                log_total = log_denominator(functools.reduce(merge, separate(partials)), sink)
                attended = Attended(queries, log_total, entries)
                loss = indexer_loss(attended, scored, picked, x.visible, shared)
            with jax.named_scope("attention.output"):
                if whole:
                    output = attention_output(partials, sink, x.queries.turn, dtype)
                else:
                    output = self.output(partials, sink, x.queries.turn, wo_a, wo_b)
            return output, None if picked is None else numbers_of(picked), loss, stored

        whole = projects_whole(latent.shape[0] * layout.size, wq_b.shape[0], dtype, gradients=cache is None)
        index_weights = None if index is None else index.weights
        indices = jnp.arange(layout.size)[None]
        queries = Queries(latent, turn, indices, layout.first, low, high, index_weights, picks)
        # A chunk behind a long context is no more for the last device than for the first.
        exchanging = split.sequence if cache is None and entries is not None else ()
        with jax.named_scope("attention.balance"):
            queries = exchanged(queries, exchanging)

        def attend(tail: Array, keys: Array, queries: Queries, wide: int) -> tuple[Array, Array | None, Array | None]:
            if whole:
                with jax.named_scope("attention.queries"):
                    queries = queries._replace(projected=linear(queries.latent, wq_b, dtype))
            output, picked, loss, _ = by_query_blocks(block, tail, keys, queries, heads, wide=wide)
            if whole:
                with jax.named_scope("attention.output"):
                    output = project_output(output, (wo_a, wo_b), groups=self.groups, dtype=dtype)
            return output, picked, loss

        if few:
            seen = Visible(low, high, jnp.min(low), jnp.max(high))
            output, picked, loss, rows = block(QueryBlock(queries, None, seen))
        else:
            with jax.named_scope("attention.window_cache"):
                if ring is None:
                    tail, rows = halo(keys, jnp.zeros((y.shape[0], past, size), dtype), split), None
                else:
                    before, rows = ring.advance(keys, layout, past, split)
                    tail = before()
            wide = 0
            if cache is not None and platform_of_mesh() == "tpu":
                wide = max(16, WIDE_BLOCK // y.shape[0])
            elif whole:  # gradients take the forms that hold logits, but where there are kernels for them
                all_queries = jax.ShapeDtypeStruct((*latent.shape[:2], wq_b.shape[0] // size, size), dtype)
                all_keys = jax.ShapeDtypeStruct((y.shape[0], past + layout.size, size), dtype)
                picking = index is not None and not self.stage.dense
                if trained_by_kernels(all_queries, all_keys, entries, picking):
                    wide = max(1, ATTENDED_BYTES * layout.size // (all_queries.size * all_queries.dtype.itemsize))
            attended = in_halves(functools.partial(attend, wide=wide), tail, keys, queries, exchanging)
            with jax.named_scope("attention.balance"):
                output, picked, loss = exchanged(attended, exchanging)
        if cache is not None and rows is not None:
            cache = cache.with_ring(self.window, rows)
        return keep(psum(output, split.shared("o_groups")), "attention"), cache, picked, loss

    # Parts of a sublayer that stages have too, not wrapped: profiles name them by the scopes that callers open.

    @nn.nowrap
    def weights(self) -> AttentionWeights:
        """Declares what every role has."""
        c = self.config
        heads, size = c.num_attention_heads, c.head_dim
        matrix = functools.partial(self.linear, config=c, family="attention")
        wq_a = matrix("wq_a", (c.q_lora_rank, c.hidden_size), ("q_lora", "embed"))
        wq_b = matrix("wq_b", (heads * size, c.q_lora_rank), ("heads", "latent"))
        wkv = matrix("wkv", (size, c.hidden_size), ("head_dim", "embed"))
        grouped = (c.o_groups * c.o_lora_rank, heads * size // c.o_groups)
        wo_a = matrix("wo_a", grouped, ("o_groups", "group_input"), matrices=c.o_groups)
        wo_b = matrix("wo_b", (c.hidden_size, c.o_groups * c.o_lora_rank), ("embed", "o_groups"))
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
            stacked=True,
        )
        return AttentionWeights(wq_a, wq_b, wkv, wo_a, wo_b, q_norm, kv_norm, sink)

    @nn.nowrap
    def keys(self, projected: Array, kv_norm: Array, turn: Turn) -> Array:
        """Keys, which are the values too, [B, S, C] from what `wkv` projects."""
        return norm_rotate(projected, kv_norm, turn, self.key_steps)

    @property
    def key_steps(self) -> Steps:
        """What becomes of projected keys."""
        return Steps(self.config.rms_norm_eps, self.policy.rounding("keys"))

    @nn.nowrap
    def queries(self, projected: Array, turn: Turn) -> Array:
        """[B, Q, H, C] queries from what `wq_b` projects, [B, Q, H * C]."""
        queries = projected.reshape(*projected.shape[:2], -1, self.config.head_dim)
        return norm_rotate(queries, None, turn, Steps(self.config.rms_norm_eps))

    @property
    def groups(self) -> int:
        """Groups of heads whose output this device projects."""
        return self.split.share("o_groups", self.config.o_groups)

    @nn.nowrap
    def output(self, partials: Sequence[Partial | Packed], sink: Array, turn: Turn, wo_a: Any, wo_b: Any) -> Array:
        """[B, Q, D] from what the queries attended, of this device's groups."""
        dtype = self.policy.compute_dtype
        return attention_end(partials, sink, turn, (wo_a, wo_b), groups=self.groups, dtype=dtype)

    def _compressors(self) -> tuple[Compressor | None, LightningIndexer | None]:
        """What the layer's role has: the compressor of its entries, and the indexer that picks them."""
        role, c = self.roles.attention, self.config
        if role == "sliding":
            return None, None
        shared: Any = dict(config=c, policy=self.policy, split=self.split)
        compressor = Compressor(
            prefix=self.prefix + "compressor.",
            ratio=self.roles.ratio,
            width=c.head_dim,
            name="compressor",
            **shared,
        )
        if role == "hca":
            return compressor, None
        return compressor, LightningIndexer(prefix=self.prefix + "indexer.", loss="indexer", name="indexer", **shared)

    def _compress(
        self,
        compressor: Compressor | None,
        indexer: LightningIndexer | None,
        projected: Sequence[Array],
        layout: Layout,
        cache: Cache | None,
        role_index: Any,
    ) -> tuple[Entries | None, Index | None, Cache | None]:
        """Runs the layer's compressors on what was projected for them.

        Returns:
          The entries its queries may see, what they are picked by (CSA), and the cache after the chunk.
        """
        role, c = self.roles.attention, self.config
        if role == "sliding" or compressor is None:
            return None, None, cache
        values, gates, *rest = projected
        earlier = self._earlier(cache, role, role_index, layout)
        entries, cache = self._store(compressor(values, gates, layout, *earlier), layout, cache, role, role_index)
        if indexer is None:
            return entries, None, cache

        weights, values, gates = rest
        earlier = self._earlier(cache, "index", role_index, layout)
        compressed, weights, wq_b = indexer(weights, values, gates, layout, *earlier)
        index_keys, cache = self._store(compressed, layout, cache, "index", role_index)

        def queries(x: Queries) -> Array:
            return index_queries(x.latent, wq_b, x.turn, c, self.policy, self.split)

        return entries, None if index_keys is None else Index(index_keys, weights, queries), cache

    def _entries(self, cache: Cache, role: EntryRole, role_index: Any) -> Entries:
        return cache.entries_of(role, role_index, self.policy.compute_dtype, self.split.axes("entries"))

    def _earlier(
        self, cache: Cache | None, role: EntryRole, role_index: Any, layout: Layout
    ) -> tuple[Ring | None, Entries | None]:
        """The open blocks and the entries of one of the layer's compressors."""
        if cache is None:
            return None, None
        return cache.open_blocks(role, role_index, layout.cached), self._entries(cache, role, role_index)

    @jax.named_scope("attention.store_entries")
    def _store(
        self, compressed: Compressed, layout: Layout, cache: Cache | None, role: EntryRole, role_index: Any
    ) -> tuple[Entries | None, Cache | None]:
        """Adds a chunk's entries to the cache and returns all that its queries may see; None when there are none."""
        split, (fresh, open_blocks, stored) = self.split, compressed
        if cache is not None and open_blocks is not None and stored is not None:
            cache = cache.with_entries(role, stored).with_ring(role, open_blocks)
            return self._entries(cache, role, role_index), cache
        assert fresh is not None
        numbers = layout.blocks(ENTRY_RATIOS[role]).numbers
        if split.sequence:
            fresh, numbers = (all_gather(x, split.sequence, 1) for x in (fresh, numbers))
        if cache is None or open_blocks is None:
            if layout.packed and split.sequence:  # a device's blocks end where its documents let them
                fresh = _in_order(fresh, numbers)
            return (Entries.uncached(fresh) if fresh.shape[1] else None), None
        entries = self._entries(cache, role, role_index).write(numbers, fresh)
        cache = cache.with_entries(role, entries.rows).with_ring(role, open_blocks)
        if split.sequence or layout.size > FEW_QUERIES:
            entries = entries.all_gather(jnp.max(layout.visible(self.roles.ratio)[1]), split.everywhere)
        return entries, cache


def _in_order(entries: Array, numbers: Array) -> Array:
    """Entries [B, E, C] by rising number [B, E]."""
    return jnp.take_along_axis(entries, jnp.argsort(numbers, axis=1)[..., None], axis=1)
