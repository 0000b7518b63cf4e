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

from v4_jax.cache.cache import Cache, Entries, Ring, halo
from v4_jax.cache.rows import Rows
from v4_jax.config import Config, Layer
from v4_jax.kernels.attention.products import products, weighted
from v4_jax.layers.compressor import Compressor
from v4_jax.layers.lightning_indexer import (
    MASKED,
    LightningIndexer,
    Visible,
    divergence,
    index_queries,
    index_scores,
    select,
)
from v4_jax.layers.linear import linear
from v4_jax.layers.norm import rms_norm
from v4_jax.layers.rotary import inverse_frequencies, rotate
from v4_jax.layers.stages import SPARSE, Stage, keep, recompute
from v4_jax.layout import Blocks, Layout
from v4_jax.number_formats import BlockScaled, dequantise, fake_quant_kv
from v4_jax.outputs import Routing
from v4_jax.parameters import Module
from v4_jax.policy import Policy, einsum
from v4_jax.sharding import collectives
from v4_jax.sharding.collectives import Axes, all_gather, pmax, psum, reduce_scatter

QUERY_BLOCK = 128  # queries of a row that see the same keys of the window,
BATCH_BLOCK = 512  # and of all rows, which bounds the memory of a large batch
TOGETHER = 2**21  # logits of the window, up to which several blocks of queries are attended side by side
ENTRY_BLOCK = 128  # entries that HCA attends at once
FEW_QUERIES = 16  # so many tokens of a row visit the devices that hold its entries; for more, the entries come to them


class Partial(NamedTuple):
    """Softmax over some of the keys, in a form that can be merged with the rest (all float32).

    Attributes:
      maximum: [B, Q, H] largest logit; no gradient flows to it.
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
    mask = mask[:, :, None, :]
    logits = jnp.where(mask, _logits(queries, keys), MASKED)
    # `finish` divides by what was subtracted here: it cancels out of the result, and so would its gradient.
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    shares = jnp.where(mask, jnp.exp(logits - maximum[..., None]), 0.0)
    return Partial(maximum, jnp.sum(shares, axis=-1), weighted(shares, keys))


def mass(queries: Array, keys: Array, mask: Array, log_total: Array) -> Array:
    """The attention [B, Q, K] that each key gets, all heads added up, of softmaxes with known denominators.

    Args:
      queries: [B, Q, H, C].
      keys: as for `attend`.
      mask: [B, Q, K] True where visible.
      log_total: [B, Q, H] logarithm of the softmax's denominator over all keys there are.
    """
    return jnp.sum(jnp.where(mask[:, :, None], jnp.exp(_logits(queries, keys) - log_total[..., None]), 0), axis=2)


def _logits(queries: Array, keys: Array) -> Array:
    return products(queries, keys) * queries.shape[-1] ** -0.5


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
    maximum = jax.lax.stop_gradient(jnp.maximum(partial.maximum, sink))
    rescale = jnp.exp(partial.maximum - maximum)
    total = partial.total * rescale + jnp.exp(sink - maximum)
    return partial.weighted * (rescale / total)[..., None]


def log_denominator(partial: Partial, sink: Array) -> Array:
    """Logarithm [B, Q, H] of the softmax's denominator, the sink logit [H] included."""
    return jnp.logaddexp(partial.maximum + jnp.log(partial.total), sink)


def combine(partial: Partial, axes: Axes, heads: Axes) -> Partial:
    """Joins the softmaxes of all devices along `axes`, which each saw other keys.

    Args:
      partial: this device's, for all heads that any device along `heads` works on.
      axes: mesh axes over which the keys are spread.
      heads: those of them along which the heads' work is shared: a device gets its own heads back.
    """
    if not axes:
        return partial
    maximum = pmax(partial.maximum, axes)
    rescale = jnp.exp(partial.maximum - maximum)
    rest = tuple(axis for axis in axes if axis not in heads)

    def total(x: Array) -> Array:
        return psum(reduce_scatter(x, heads, 2), rest)

    if heads:
        own = partial.maximum.shape[2] // collectives.size(heads)
        mine = collectives.index(heads) * own
        maximum = jax.lax.dynamic_slice_in_dim(maximum, mine, own, axis=2)
    return Partial(maximum, total(partial.total * rescale), total(partial.weighted * rescale[..., None]))


def attend_picked(queries: Array, entries: Entries, picked: Array) -> Partial:
    """Attention of each query over its own entries `picked` [B, Q, K] (-1 for none), as far as they lie here."""
    slots = entries.slots(picked)
    devices, count = collectives.size(entries.axes), slots.shape[-1]
    if devices == 1:
        return attend(queries, entries.gather(slots), slots >= 0)
    # A device holds about one in `devices` of the picks: those first, in blocks, and no work for blocks without any.
    width = min(count, -(-2 * count // devices))
    slots = -jnp.sort(-slots, axis=-1)
    slots = jnp.pad(slots, [(0, 0), (0, 0), (0, -count % width)], constant_values=-1)
    blocks = jnp.moveaxis(slots.reshape(*slots.shape[:2], -1, width), 2, 0)

    def step(partial: Partial, slots: Array) -> tuple[Partial, None]:
        def join(partial: Partial) -> Partial:
            return merge(partial, attend(queries, entries.gather(slots), slots >= 0))

        return jax.lax.cond(jnp.any(slots >= 0), join, lambda partial: partial, partial), None

    return jax.lax.scan(step, _nothing(queries), blocks)[0]


def _nothing(queries: Array) -> Partial:
    """Attention over no keys."""
    shape = queries.shape[:3]
    return Partial(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(queries.shape))


def attend_range(queries: Array, entries: Entries, visible: Visible) -> Partial:
    """Attention over the visible entries that lie here, by blocks; blocks nobody sees are skipped."""
    size, visible = min(ENTRY_BLOCK, entries.count), visible.here(entries)

    def block(wanted: Array) -> Partial:
        first = jnp.minimum(wanted, entries.count - size)  # the last block may reach back over the one before
        return attend(queries, entries.block(first, size), visible.mask(first, size, wanted))

    if size == entries.count:
        return block(jnp.int32(0))

    def step(partial: Partial, wanted: Array) -> tuple[Partial, None]:
        seen = visible.any(wanted, size)
        return jax.lax.cond(seen, lambda p, w: merge(p, block(w)), lambda p, w: p, partial, wanted), None

    return jax.lax.scan(step, _nothing(queries), jnp.arange(0, entries.count, size, dtype=jnp.int32))[0]


class Attended(NamedTuple):
    """How a block of queries attends entries.

    Attributes:
      queries: [B, Q, H, C].
      log_total: [B, Q, H] logarithm of the softmax's denominator over window, entries and sink.
      entries: the entries, all on this device.
    """

    queries: Array
    log_total: Array
    entries: Entries


class Scored(NamedTuple):
    """How the indexer scores the same entries for the same queries.

    Attributes:
      queries: [B, Q, heads, C] index queries.
      weights: [B, Q, heads] float32 head weights.
      keys: the entries' index keys.
    """

    queries: Array
    weights: Array
    keys: Entries


def indexer_loss(attended: Attended, scored: Scored, picked: Array | None, visible: Visible, heads: Axes) -> Array:
    """How far the indexer's scores are from the attention that entries get: a KL divergence per query.

    The technical report does not describe this loss; the form is that of DeepSeek-V3.2 (facts, section 6).

    Args:
      attended: how the entries are attended; no gradient flows back to it.
      scored: how they are scored.
      picked: [B, Q, K] entries to compare over, -1 for none; None compares over all visible ones.
      visible: which entries the queries see.
      heads: mesh axes over which the heads' work is shared.

    Returns:
      [B, Q] float32.
    """
    queries, log_total, entries = jax.lax.stop_gradient(attended)

    def compare(rows: Array, keys: Array, mask: Array) -> tuple[Array, Array]:
        return mass(queries, rows, mask, log_total), index_scores(scored.queries, scored.weights, keys)

    if picked is not None:
        found = picked >= 0
        got, scores = compare(entries.gather(picked), scored.keys.gather(picked), found)
        return divergence(scores, psum(got, heads), found)

    size = min(ENTRY_BLOCK, entries.count)

    def block(wanted: Array) -> tuple[Array, Array, Array]:
        first = jnp.minimum(wanted, entries.count - size)
        mask = visible.mask(first, size, wanted)
        return *compare(entries.block(first, size), scored.keys.block(first, size), mask), mask

    blocks = jax.lax.map(recompute(block), jnp.arange(0, entries.count, size, dtype=jnp.int32))
    got, scores, found = map(_joined, blocks)
    return divergence(scores, psum(got, heads), found)


def _joined(blocks: Array) -> Array:
    """[n, B, Q, size] -> [B, Q, n * size]."""
    joined = jnp.moveaxis(blocks, 0, 2)
    return joined.reshape(*joined.shape[:2], -1)


class Index(NamedTuple):
    """What a CSA layer picks entries by.

    Attributes:
      keys: an index key of every entry.
      weights: [B, S, heads] float32 head weights of every query.
      queries: index queries [B, Q, heads, C] of a block, from its inputs.
    """

    keys: Entries
    weights: Array
    queries: Callable[[dict[str, Array]], Array]


class Attention(Module):
    """One attention sublayer of any role; `prefix` ends in `attn.`."""

    config: Config
    policy: Policy
    roles: Layer
    stage: Stage = SPARSE

    @nn.compact
    def __call__(
        self, y: Array, layout: Layout, cache: Cache | None, layer: Any, slot: Any, picks: Array | None
    ) -> tuple[Array, Cache | None, Routing]:
        """Attends.

        Args:
          y: [B, S, D] normed, collapsed input.
          layout: where its tokens stand.
          cache: the whole cache, of which this layer's part is read and written; None without one.
          layer: the layer's number, its place in the window cache.
          slot: its number among the layers of its role, its place in the role's cache.
          picks: [B, S, K] entries to attend instead of the indexer's choice (CSA), or None.

        Returns:
          Output [B, S, D], the cache after the chunk, and the entries picked with the indexer's loss, without a layer
          axis and as far as there are any.
        """
        c, dtype = self.config, self.policy.compute_dtype
        split, heads, size = self.split, c.num_attention_heads, c.head_dim
        frequencies = inverse_frequencies(c, self.roles)
        wq_a = self.linear("wq_a", (c.q_lora_rank, c.hidden_size), ("q_lora", "embed"), config=c)
        wq_b = self.linear("wq_b", (heads * size, c.q_lora_rank), ("heads", "latent"), config=c)
        wkv = self.linear("wkv", (size, c.hidden_size), ("head_dim", "embed"), config=c)
        wo_a = self.linear(
            "wo_a",
            (c.o_groups * c.o_lora_rank, heads * size // c.o_groups),
            ("o_groups", "group_input"),
            config=c,
            matrices=c.o_groups,
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
            tail = halo(keys, jnp.zeros((y.shape[0], past, size), dtype), split)
        else:
            window = Ring(cache.rows["window"], layer, layout.cached, dtype)
            keys = window.rows.stored(keys)
            before, rows = window.advance(keys, layout, past, split)
            tail, cache = before(), cache.store("window", rows)

        # Expanded once for all query blocks; only this layer's matrices exist in the compute dtype at a time. Plain
        # ones are cast by each block, so that their gradients add up over the blocks in their own dtype.
        wq_b, wo_a, wo_b = (
            dequantise(weight, dtype) if isinstance(weight, BlockScaled) else weight for weight in (wq_b, wo_a, wo_b)
        )
        wo_a = wo_a.reshape(split.share("o_groups", c.o_groups), c.o_lora_rank, -1)
        entries, index, cache = self._compress(y, layout, cache, slot, frequencies)
        ratio = self.roles.ratio
        low, high = layout.visible(ratio) if ratio else (layout.first, layout.first)
        shared = split.shared("heads")
        spread = () if entries is None else entries.axes
        visiting = tuple(axis for axis in shared if axis in spread)  # all heads visit what such an axis spreads

        def block(x: dict[str, Array]) -> tuple[Array, Array | None, Array | None]:
            queries = linear(x["latent"], wq_b, dtype).reshape(*x["latent"].shape[:2], -1, size)
            queries = rms_norm(queries, None, c.rms_norm_eps)
            queries = rotate(queries, x["positions"], frequencies)
            seen = x["keys"]
            number = x["index"][:, :1, None] - past + jnp.arange(seen.shape[1])
            oldest = jnp.maximum(x["first"], x["index"] - past)
            mask = (number >= oldest[..., None]) & (number <= x["index"][..., None])
            partial = attend(queries, seen, mask)
            picked = loss = scored = None
            visible = Visible(x["low"], x["high"], x["least"], x["most"])
            if index is not None:
                scored = Scored(index.queries(x), x["weights"], index.keys)
                if not self.stage.dense:
                    chosen = select(*scored, visible, c.index_topk) if picks is None else x["picks"]
                    picked = keep(chosen, "picked")
            if entries is not None:
                visitors = all_gather(queries, visiting, 2)
                if picked is None:
                    distant = attend_range(visitors, entries, visible)
                else:
                    distant = attend_picked(visitors, entries, picked)
                partial = merge(partial, combine(distant, spread, visiting))
                if scored is not None and self.stage.indexer_loss:
                    attended = Attended(queries, log_denominator(partial, sink), entries)
                    loss = indexer_loss(attended, scored, picked, visible, shared)
            output = rotate(finish(partial, sink).astype(dtype), x["positions"], frequencies, inverse=True)
            output = output.reshape(*output.shape[:2], wo_a.shape[0], -1)
            output = einsum("bqgi,goi->bqgo", output, wo_a, dtype=dtype)
            output = linear(output.reshape(*output.shape[:2], -1), wo_b, dtype)
            return output, picked, loss

        inputs = {
            "latent": latent,
            "keys": keys,
            "positions": layout.positions,
            "first": layout.first,
            "low": low,
            "high": high,
        }
        if index is not None:
            inputs["weights"] = index.weights
        if picks is not None:
            inputs["picks"] = picks
        output, picked, loss = by_query_blocks(block, tail, inputs, heads)
        output = keep(psum(output, split.shared("o_groups")), "attention")
        return output, cache, Routing(entries=picked, indexer_loss=loss)

    def _compress(
        self, y: Array, layout: Layout, cache: Cache | None, slot: Any, frequencies: Any
    ) -> tuple[Entries | None, Index | None, Cache | None]:
        """Runs the layer's compressors.

        Returns:
          The entries its queries may see, what they are picked by (CSA), and the cache after the chunk.
        """
        role, ratio, c = self.roles.attention, self.roles.ratio, self.config
        if role == "sliding":
            return None, None, cache
        make = Compressor(
            config=c,
            policy=self.policy,
            prefix=self.prefix + "compressor.",
            ratio=ratio,
            width=c.head_dim,
            frequencies=frequencies,
            split=self.split,
            name="compressor",
        )
        fresh, blocks, after = make(y, layout, _state(cache, role, slot, layout))
        entries, cache = self._store(fresh, blocks, after, layout, cache, role, slot)
        if role == "hca":
            return entries, None, cache

        indexer = LightningIndexer(
            config=c,
            policy=self.policy,
            prefix=self.prefix + "indexer.",
            frequencies=frequencies,
            split=self.split,
            part="indexer",
            name="indexer",
        )
        keys, blocks, after, weights, wq_b = indexer(y, layout, _state(cache, "index", slot, layout))
        index_keys, cache = self._store(keys, blocks, after, layout, cache, "index", slot)

        def queries(x: dict[str, Array]) -> Array:
            return index_queries(x["latent"], wq_b, x["positions"], frequencies, c, self.policy, self.split)

        return entries, None if index_keys is None else Index(index_keys, weights, queries), cache

    def _store(
        self,
        fresh: Array,
        blocks: Blocks,
        state: Rows | None,
        layout: Layout,
        cache: Cache | None,
        role: str,
        slot: Any,
    ) -> tuple[Entries | None, Cache | None]:
        """Adds a chunk's entries to the cache and returns all that its queries may see; None when there are none."""
        split, numbers = self.split, blocks.slots
        if split.sequence:
            fresh, numbers = (all_gather(x, split.sequence, 1) for x in (fresh, numbers))
        if cache is None or state is None:
            if layout.packed and split.sequence:  # a device's blocks end where its documents let them
                fresh = _in_order(fresh, numbers)
            return (Entries.local(fresh) if fresh.shape[1] else None), None
        entries = cache.entries(role, slot, self.policy.compute_dtype, split.axes("entries")).write(numbers, fresh)
        cache = cache.store(role, entries.rows).store(role + " state", state)
        if split.sequence or layout.size > FEW_QUERIES:
            entries = entries.together(jnp.max(layout.visible(self.roles.ratio)[1]), split.everywhere)
        return entries, cache


def _state(cache: Cache | None, role: str, slot: Any, layout: Layout) -> Ring | None:
    """The open blocks of one of a layer's compressors."""
    return None if cache is None else Ring(cache.rows[role + " state"], slot, layout.cached, jnp.float32)


def _in_order(entries: Array, numbers: Array) -> Array:
    """Entries [B, E, C] by rising number [B, E]."""
    return jnp.take_along_axis(entries, jnp.argsort(numbers, axis=1)[..., None], axis=1)


def by_query_blocks(block: Any, tail: Array, inputs: dict[str, Array], heads: int) -> Any:
    """Runs `block` on blocks of at most `QUERY_BLOCK` queries, and no more than the window is long.

    Where there is little in a block, several are attended side by side, in one operation each.

    Args:
      block: sees each [B, S, ...] input cut to [B, Q, ...], but of the keys all that the window shows these queries
        [B, past + Q, C]; "index" [1, Q], the queries' chunk indices; "least" and "most", see `Visible`.
      tail: [B, past, C] keys before the first.
      inputs: [B, S, ...] arrays, "keys", "low" and "high" among them.
      heads: query heads of the model, also where a device works on some of them: entries picked are not so divided.

    Returns:
      The outputs, [B, S, ...] again. The backward pass recomputes them step by step where there are several, but for
      the entries picked.
    """
    (batch, size), past = inputs["keys"].shape[:2], tail.shape[1]
    blocks = -(-size // min(QUERY_BLOCK, past + 1, max(16, BATCH_BLOCK // batch)))
    width = -(-size // blocks)
    steps = -(-blocks // max(1, TOGETHER // (batch * heads * width * (past + width))))
    together = -(-blocks // steps)

    def cut(x: Array, count: int) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def step(tail: Array, x: dict[str, Array]) -> tuple[Array, Any]:
        seen = jnp.concatenate([tail, x["keys"]], axis=1)
        after = seen[:, seen.shape[1] - past :]
        bounds = {"least": jnp.min(x["low"]), "most": jnp.max(x["high"])}
        if together == 1:
            return after, block(x | bounds | {"keys": seen})
        before = -(-past // width)  # so many blocks of keys before its own does a block's window reach into
        pieces = cut(jnp.pad(seen, [(0, 0), (before * width - past, 0), (0, 0)]), before + together)
        windows = jnp.concatenate([pieces[i : i + together] for i in range(before + 1)], axis=2)
        side_by_side = {name: cut(value, together) for name, value in x.items() if name != "keys"}
        side_by_side["keys"] = windows[:, :, before * width - past :]
        return after, jax.tree.map(join, jax.vmap(lambda x: block(x | bounds))(side_by_side))

    inputs = inputs | {"index": jnp.arange(size)[None]}
    padding = steps * together * width - size
    inputs = {name: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for name, x in inputs.items()}
    if steps == 1:
        outputs = step(tail, inputs)[1]
    else:
        inputs = {name: cut(x, steps) for name, x in inputs.items()}
        outputs = jax.tree.map(join, jax.lax.scan(recompute(step), tail, inputs)[1])
    return jax.tree.map(lambda x: x[:, :size], outputs)
