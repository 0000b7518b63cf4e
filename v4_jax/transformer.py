"""The whole model: embedding into streams, blocks, final collapse and head, and what drafts: the MTP block or DSpark.

Technical report, section 2. Unrepeated layers run one by one; the repeating period of roles runs as one `nn.scan`,
with the cache in its carry.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from v4_jax.architecture import Architecture
from v4_jax.block import Block, Carry, Context, PeriodBlocks
from v4_jax.cache.cache import Cache
from v4_jax.drafting import Drafting
from v4_jax.dspark import DSpark
from v4_jax.layer_stack import replayed, role_index, stacked, unrolled
from v4_jax.layers.divergence import FullTeacher, TopTeacher, reverse_divergence, top_scores
from v4_jax.layers.head import cross_entropy, log_probabilities
from v4_jax.layers.hyper_connections import StreamCollapse, apart, expand, joined
from v4_jax.layers.linear import linear
from v4_jax.layers.norm import rms_norm
from v4_jax.layers.stages import SPARSE, Remat, Stage, alone, in_turn, recompute, rematerialised
from v4_jax.layout import Layout
from v4_jax.multi_token_prediction import MultiTokenPrediction
from v4_jax.on_mesh import head_on_mesh, on_mesh
from v4_jax.outputs import Decided, Logits, Output, Routing
from v4_jax.parameters import LAYERS, normal
from v4_jax.policy import Policy
from v4_jax.sharding import collectives
from v4_jax.sharding.axes import Rules, ShardingError
from v4_jax.sharding.split import Split


class Transformer(Drafting):
    """DeepSeek-V4.

    Attributes:
      config: the architecture.
      policy: precision, a `Policy` or the name of one.
      mesh: devices that parameters, cache and tokens are split over; None runs on one device. On a mesh, every call
        runs as one `jax.shard_map`, with exactly the communication that the layers write down.
      rules: which mesh axes split which logical axes: a `v4_jax.sharding.axes.Rules` or the name of a preset.
      stage: how CSA layers attend, and whether their indexers learn; see `v4_jax.layers.stages`.
      remat: what the backward pass recomputes: "none", "sublayers" or "layers"; see `layers.stages`.
    """

    config: Architecture
    policy: str | Policy = "bfloat16"
    mesh: Mesh | None = None
    rules: str | Rules | None = None
    stage: Stage = SPARSE
    remat: Remat = "none"

    def setup(self) -> None:  # noqa: D102 called by Linen
        c, precision = self.config, Policy.of(self.policy)
        self.precision = precision
        table, axes = (c.vocab_size, c.hidden_size), ("vocab", "embed")
        for name in ("embed", "head"):
            weight = self.declare(
                name,
                table,
                axes,
                released=name + ".weight",
                storage="bf16",
                group="adamw",
                init=normal(c),
                gather=False,
            )
            setattr(self, name + "_weight", weight)
        self.norm_weight = self.norm("norm", c.hidden_size)
        self.collapse = StreamCollapse(config=c, prefix="hc_head_", split=self.split, name="hc_head")
        make = rematerialised(Block, self.remat, in_scan=False)
        for i in unrolled(c):
            block = make(
                config=c,
                policy=precision,
                roles=c.layers[i],
                stage=self.stage,
                prefix=f"layers.{i}.",
                split=self.split,
                name=f"layer_{i}",
            )
            setattr(self, f"layer_{i}", block)
        if c.period.repeats:
            scanned = nn.scan(
                PeriodBlocks,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=c.period.repeats,
                metadata_params={LAYERS: c.period},
            )
            self.period = scanned(
                config=c, policy=precision, split=self.split, stage=self.stage, remat=self.remat, name="period"
            )
        if c.num_nextn_predict_layers:
            self.mtp_block = MultiTokenPrediction(
                config=c, policy=precision, remat=self.remat, prefix="mtp.0.", split=self.split, name="mtp"
            )
        if c.dspark_stages:
            self.stages = DSpark(config=c, policy=precision, remat=self.remat, split=self.split.short, name="dspark")

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        cache: Cache | None = None,
        sealed: Array | None = None,
        logits: Logits = "all",
        routing: Routing | None = None,
        return_routing: bool = False,
        return_taps: bool = False,
    ) -> Output:
        """Runs a chunk of tokens through the trunk.

        Args:
          tokens: [B, S] int32 token ids.
          positions: [B, S] int32 rotary positions, consecutive within a document; by default counted from its first
            token.
          segment_ids: [B, S] int32 document of each token, contiguous in a row; 0 is padding. Not with a cache.
          lengths: [B] int32 valid tokens of each row; the rest is padding on the right.
          cache: what earlier chunks left; rows may stand at different lengths.
          sealed: [B] int32 tokens of each row, a multiple of 128, whose entries and index keys are in the cache
            although the row may be shorter: reading these tokens refills windows and open blocks alone.
          logits: which logits to compute: "all" [B, S, V], "last" [B, 1, V] at each row's last valid token, or "none".
          routing: decisions to replay instead of taking them anew; each field may be None.
          return_routing: whether to return the decisions taken.
          return_taps: whether to return what DSpark's stages draft from.

        Raises:
          ValueError: arguments that contradict each other or have the wrong shape, or taps of a model without stages.
        """
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, expected [batch, sequence] with at least one token"
            )
        self._check_cache(cache, tokens)
        if cache is not None and self.stage.indexer_loss:
            raise ValueError("the indexer's loss is computed over whole rows: expected a call without a cache")
        if return_taps:
            self._check_stages()
        if self.mesh is not None and not self.is_initializing():
            arguments: dict[str, Any] = dict(
                tokens=tokens, positions=positions, segment_ids=segment_ids, lengths=lengths
            )
            arguments |= dict(cache=cache, routing=routing, sealed=sealed)
            call = functools.partial(
                Transformer.__call__, logits=logits, return_routing=return_routing, return_taps=return_taps
            )
            return on_mesh(self, call, arguments, logits, return_routing, return_taps)
        start = None if cache is None else cache.lengths
        layout = self._layout(tokens, start, lengths, segment_ids, positions, sealed)
        streams = expand(self._embed(tokens), self.config.hc_mult)
        carry = Carry.of(streams, cache, self.config, taps=return_taps or self._initializes_stages)
        carry, decided = self._layers(carry, Context(tokens, layout), routing)
        streams, cache = carry.streams, carry.cache
        if cache is not None:
            cache = cache.replace(lengths=cache.lengths + layout.total)
        if self.is_initializing() and self.config.num_nextn_predict_layers:
            self.mtp(apart(streams, self.config.hc_mult), tokens, logits="none")
        taps = None if carry.taps is None else carry.taps[:-1]
        if taps is not None:
            taps = jnp.moveaxis(taps, 0, 2).reshape(*tokens.shape, -1)
        if self._initializes_stages:
            assert taps is not None
            self._draft_block(taps, tokens[:, 0])
        output = self._logits(streams, layout, logits, self.collapse, self.norm_weight)
        streams = apart(streams, self.config.hc_mult)
        return _output(output, cache, streams, decided, return_routing).replace(taps=taps)

    @property
    def _initializes_stages(self) -> bool:
        return self.is_initializing() and bool(self.config.dspark_stages)

    def mtp(
        self,
        streams: Array,
        next_tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        cache: Cache | None = None,
        logits: Logits = "all",
        routing: Routing | None = None,
        return_routing: bool = False,
    ) -> Output:
        """Runs the multi-token-prediction block (technical report, section 2.1): from token i+1 predicts token i+2.

        Args:
          streams: [B, S, hc, D] the trunk's `Output.streams` at positions i, or this method's own to draft further.
          next_tokens: [B, S] int32 the tokens at positions i+1.
          positions: as for the trunk; a constant offset does not matter to a sliding block.
          segment_ids: document of each position; the last position of a document predicts nothing of use.
          lengths: [B] valid positions of each row.
          cache: the trunk's cache, of which only the MTP block's part is read and advanced.
          logits: as for the trunk.
          routing: as for the trunk; the layer axis has size 1.
          return_routing: as for the trunk.

        Returns:
          Output whose `streams` are the block's own, before its collapse.

        Raises:
          ValueError: the configuration has no MTP block, or arguments that contradict each other.
        """
        if not self.config.num_nextn_predict_layers:
            raise ValueError("this model has no MTP block (num_nextn_predict_layers is 0)")
        if streams.shape[:2] != next_tokens.shape:
            raise ValueError(f"streams {streams.shape[:2]} and next_tokens {next_tokens.shape} differ in [B, S]")
        self._check_cache(cache, next_tokens)
        if self.mesh is not None:
            arguments: dict[str, Any] = dict(
                streams=streams, next_tokens=next_tokens, positions=positions, segment_ids=segment_ids
            )
            arguments |= dict(lengths=lengths, cache=cache, routing=routing)
            call = functools.partial(Transformer.mtp, logits=logits, return_routing=return_routing)
            return on_mesh(self, call, arguments, logits, return_routing)
        start = None if cache is None else cache.draft_lengths
        layout = self._layout(next_tokens, start, lengths, segment_ids, positions)
        replay = jax.tree.map(lambda x: x[0], routing or Routing())
        context = Context(next_tokens, layout)
        embedded = self._embed(next_tokens)
        streams, cache, decided = alone(self.mtp_block)(streams, embedded, context, cache, replay)
        if cache is not None:
            cache = cache.replace(draft_lengths=cache.draft_lengths + layout.total)
        output = self._logits(streams, layout, logits, self.mtp_block.collapse, self.mtp_block.norm_weight)
        return _output(output, cache, apart(streams, self.config.hc_mult), [decided], return_routing)

    def cross_entropy(self, streams: Array, targets: Array, weights: Array, *, mtp: bool = False) -> Array:
        """Weighted sum of the negative log-probabilities of given tokens, without an array of [tokens, vocabulary].

        Args:
          streams: [B, S, hc, D] `Output.streams` of the trunk, or of the MTP block.
          targets: [B, S] int32 the token expected at each position; out-of-range ids stand for the nearest one.
          weights: [B, S] float32 what each counts; they have no gradient.
          mtp: whether the streams are the MTP block's, which has a collapse and a norm of its own.

        Returns:
          A float32 number. Gradients are computed with it (`head.cross_entropy`): ask for them where they are needed.
        """
        if self.mesh is not None:
            call = functools.partial(Transformer.cross_entropy, mtp=mtp)
            return head_on_mesh(self, call, dict(streams=streams, targets=targets, weights=weights), whole=True)
        flat, head, axes, first = self._with_head(streams, mtp=mtp)
        tokens = jnp.clip(targets, 0, self.config.vocab_size - 1) - first
        with jax.named_scope("head.cross_entropy"):
            loss = cross_entropy(flat, head, tokens.reshape(-1), weights.reshape(-1), axes)
        return self._over_tokens(loss)

    def log_probabilities(self, streams: Array, targets: Array) -> Array:
        """Log-probabilities [B, S] float32 of given next tokens, differentiable, without [tokens, vocabulary] arrays.

        Args:
          streams: [B, S, hc, D] the trunk's `Output.streams`.
          targets: [B, S] int32 the token after each position; out-of-range ids stand for the nearest one.
        """
        if self.mesh is not None:
            return head_on_mesh(self, Transformer.log_probabilities, dict(streams=streams, targets=targets))
        flat, head, axes, first = self._with_head(streams)
        tokens = jnp.clip(targets, 0, self.config.vocab_size - 1) - first
        return log_probabilities(flat, head, tokens.reshape(-1), axes).reshape(targets.shape)

    def hidden(self, streams: Array, *, mtp: bool = False) -> Array:
        """What the head is applied to: [B, S, D], the streams [B, S, hc, D] collapsed and normed.

        Args:
          streams: `Output.streams` of the trunk, or of the MTP block.
          mtp: whether they are the MTP block's.
        """
        if self.mesh is not None:
            return head_on_mesh(self, functools.partial(Transformer.hidden, mtp=mtp), dict(streams=streams))
        collapse = self.mtp_block.collapse if mtp else self.collapse
        norm = self.mtp_block.norm_weight if mtp else self.norm_weight
        return recompute(lambda streams: rms_norm(collapse(streams), norm, self.config.rms_norm_eps))(joined(streams))

    def divergence(
        self,
        streams: Array,
        weights: Array,
        *,
        hidden: Array | None = None,
        head: Array | None = None,
        ids: Array | None = None,
        scores: Array | None = None,
    ) -> Array:
        """Weighted sum of the divergences KL(model || teacher) of the next token, without [tokens, vocabulary] arrays.

        The teacher's distributions are those that its head makes of its hidden states, or given by the likeliest
        tokens, where all others count as one event; see `v4_jax.layers.divergence`. None of them has a gradient.

        Args:
          streams: [B, S, hc, D] the trunk's `Output.streams`.
          weights: [B, S] float32 what each position counts; they have no gradient.
          hidden: [B, S, D'] the teacher's hidden states, as its own `hidden` returns them.
          head: [V, D'] its head.
          ids: [B, S, k] int32 the likeliest tokens, as its own `top_scores` returns them.
          scores: [B, S, k + 1] float32 their log-probabilities, and that of all others.

        Returns:
          A float32 number, in nats.
        """
        if self.mesh is not None:
            arguments = dict(streams=streams, weights=weights, hidden=hidden, head=head, ids=ids, scores=scores)
            return head_on_mesh(self, Transformer.divergence, arguments, tables=("head",), whole=True)
        flat, own, axes, first = self._with_head(streams)
        teacher: Any
        if hidden is not None and head is not None:
            teacher = FullTeacher(hidden, self.split.gather(head, ("vocab", "embed")))
        elif ids is not None and scores is not None:
            teacher = TopTeacher(ids - first, scores)
        else:
            raise ValueError("expected hidden states and head of a teacher, or ids and scores of its likeliest tokens")
        return self._over_tokens(reverse_divergence(flat, own, teacher, weights.reshape(-1), axes))

    def top_scores(self, streams: Array, k: int) -> tuple[Array, Array]:
        """The k likeliest next tokens at each position, and their log-probabilities, for a student's `divergence`.

        Args:
          streams: [B, S, hc, D] the trunk's `Output.streams`.
          k: how many.

        Returns:
          [B, S, k] int32 ids, and [B, S, k + 1] float32 log-probabilities, the last that of all other tokens.
        """
        if self.mesh is not None:
            return head_on_mesh(self, functools.partial(Transformer.top_scores, k=k), dict(streams=streams))
        flat, head, axes, _ = self._with_head(streams)
        found = top_scores(flat, head, k, axes)
        ids, scores = (x.reshape(*streams.shape[:2], -1) for x in found)
        return ids, scores

    def _with_head(self, streams: Array, *, mtp: bool = False) -> tuple[Array, Array, collectives.Axes, Any]:
        """`hidden` [T, D] of streams [B, S, hc, D], and `_shared_head`."""
        flat, head = in_turn((self.hidden(streams, mtp=mtp).reshape(-1, self.config.hidden_size), self.head_weight))
        return flat, *self._shared_head(head)

    def _shared_head(self, head: Array) -> tuple[Array, collectives.Axes, Any]:
        """This device's part of the head, the mesh axes that share the vocabulary, and the part's first token."""
        head, axes = self.split.gather(head, ("vocab", "embed")), self.split.shared("vocab")
        return head, axes, collectives.index(axes) * head.shape[0]

    def _over_tokens(self, total: Array) -> Array:
        """The sum over devices of what is a sum over each one's tokens."""
        return collectives.psum(total, (*self.split.axes("batch"), *self.split.sequence))

    def _check_cache(self, cache: Cache | None, tokens: Array) -> None:
        if cache is None:
            return
        if cache.lengths.shape[0] != tokens.shape[0]:
            raise ValueError(f"the cache has {cache.lengths.shape[0]} rows, the tokens {tokens.shape[0]}")
        self.precision.check_cache(cache.released)

    def _layout(
        self,
        tokens: Array,
        start: Array | None,
        lengths: Array | None,
        segment_ids: Array | None,
        positions: Array | None,
        sealed: Array | None = None,
    ) -> Layout:
        """Where the tokens stand; of a split sequence, where this device's shard of it does."""
        axes, (batch, size) = self.split.sequence, tokens.shape
        whole = Layout.of(
            (batch, size * collectives.size(axes)),
            start=start,
            lengths=lengths,
            segment_ids=segment_ids,
            positions=positions,
            sealed=sealed,
        )
        shard = whole.shard(jnp.int32(size) * collectives.index(axes), size) if axes else whole
        return shard.scheduled(self.config, self.split.axes("entries"))

    def _embed(self, tokens: Array) -> Array:
        """[B, S] ids -> [B, S, D]; out-of-range ids read the nearest row.

        The vocabulary stays where it is: devices that split it each look up the ids they have, also each other's.
        """
        return self._lookup(self._embeddings, tokens, self.split).astype(self.precision.compute_dtype)

    @property
    def _embeddings(self) -> Array:
        """[V, D], of which a device has a part of the vocabulary."""
        return self.split.gather(self.embed_weight, (None, "embed"))

    def _lookup(self, table: Array, ids: Array, split: Split) -> Array:
        """Rows [B, S, n] of a table whose vocabulary lies where it is stored, for ids [B, S] split as `split` says."""
        axes = split.axes("vocab")
        away = tuple(axis for axis in axes if axis in split.sequence)
        if batched := set(axes) & set(split.axes("batch")):
            raise ShardingError(
                f"'vocab' is split over {sorted(batched)}, which also split the batch: place it on other axes"
            )
        ids = collectives.all_gather(jnp.clip(ids, 0, self.config.vocab_size - 1), away, 1)
        ids = ids - collectives.index(axes) * table.shape[0]
        rows = jnp.take(table, ids, axis=0, mode="clip")
        if not axes:
            return rows
        rows = jnp.where(((ids >= 0) & (ids < table.shape[0]))[..., None], rows, 0)
        rows = collectives.reduce_scatter(rows, away, 1)
        return collectives.psum(rows, tuple(axis for axis in axes if axis not in away))

    def _logits(self, streams: Array, layout: Layout, which: Logits, collapse: Any, norm: Array) -> Array | None:
        """Final collapse, norm and the float32 head."""
        if which not in ("all", "last", "none"):
            raise ValueError(f"logits is {which!r}, expected 'all', 'last' or 'none'")
        split = self.split
        if which == "last":
            streams, split = collectives.rows_at(streams, layout.last[:, None], split.sequence), split.short
        x = rms_norm(collapse(streams), norm, self.config.rms_norm_eps)
        if which == "none":
            return None
        return self._head(x, split)

    def _head(self, x: Array, split: Split) -> Array:
        """Float32 logits [B, S, V] of normed [B, S, D]."""
        head = split.gather(self.head_weight, ("vocab", "embed"))
        return linear(x, head, jnp.float32)

    def _layers(self, carry: Carry, context: Context, routing: Routing | None) -> tuple[Carry, list[Decided]]:
        """All layers, in order: those before the period, the scan over it, those after."""
        c, period = self.config, self.config.period
        decided: list[Decided] = []

        def run(i: int, carry: Carry) -> Carry:
            block = getattr(self, f"layer_{i}")
            replay = jax.tree.map(lambda x: x[0], replayed(c, routing, [i]))
            carry, one = alone(block)(carry, context, i, role_index(c, i), replay)
            if (loss := one.statistics.indexer_loss) is not None:  # computed while what it needs is there
                streams, loss = jax.lax.optimization_barrier((carry.streams, loss))
                carry = carry.replace(streams=streams)
                one = one.replace(statistics=one.statistics.replace(indexer_loss=loss))
            decided.append(one)
            return carry.tapped(c, i)

        for i in range(min(period.start, c.num_hidden_layers)):
            carry = run(i, carry)
        if period.repeats:
            # Inference reads weights straight from the stacks; training slices them, so that gradients are sliced too.
            stacks = None
            if carry.cache is not None and not self.is_initializing():
                stacks = nn.meta.unbox(self.get_variable("params", "period"))
            replays = [
                replayed(c, routing, range(period.start + place, period.stop, period.length))
                for place in range(period.length)
            ]
            (_, carry), repeated = self.period((jnp.int32(0), carry), replays, context, stacks)
            for repeat in range(period.repeats):
                decided.extend(jax.tree.map(lambda x, repeat=repeat: x[repeat], repeated))
        for i in range(period.stop, c.num_hidden_layers):
            carry = run(i, carry)
        return carry.written(c), decided


def _output(
    logits: Array | None, cache: Cache | None, streams: Array, decided: list[Decided], return_routing: bool
) -> Output:
    if not return_routing:
        return Output(logits, cache, streams)
    everything = stacked(decided)
    return Output(logits, cache, streams, everything.routing, everything.statistics)
