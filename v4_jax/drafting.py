"""What a model does with DSpark's stages (arXiv 2607.05147): it drafts behind a context, or in rows that are known.

The former is inference. The latter is training: blocks at many places of a row at once, of which each sees what it
would see if its context were all that there is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.block import Context
from v4_jax.cache.cache import Cache
from v4_jax.layers.draft_attention import Places
from v4_jax.layers.draft_loss import Drafted, draft_loss
from v4_jax.layers.norm import rms_norm
from v4_jax.layout import Layout
from v4_jax.on_mesh import drafting_on_mesh
from v4_jax.outputs import Draft
from v4_jax.parameters import Module
from v4_jax.sharding import collectives


class Drafting(Module):
    """The methods of a model that has stages."""

    def dspark(
        self,
        taps: Array,
        anchor: Array,
        *,
        lengths: Array | None = None,
        cache: Cache | None = None,
        choose: Callable[[Array, Array], Array] | None = None,
    ) -> Draft:
        """Drafts the tokens that follow a context and one token more (DSpark, arXiv 2607.05147).

        Args:
          taps: [B, S, T * D] the trunk's `Output.taps` of the context; with a cache, of its newest part.
          anchor: [B] int32 the token after the context.
          lengths: [B] int32 how many of the taps are each row's, the first ones; a row of none drafts nothing of use.
          cache: the trunk's cache, of which only the stages' part is read and advanced. A row of it holds what this
            method or `dspark_read` has read of the context before.
          choose: from logits [B, V] float32 and the draft's number in the block, [] int32, to tokens [B] int32; by
            default the best ones.

        Raises:
          ValueError: the model has no stages, or arguments of the wrong shape.
        """
        self._check_taps(taps, anchor.shape)
        choose = choose or (lambda logits, _: jnp.argmax(logits, axis=-1).astype(jnp.int32))
        block = self._draft_block(taps, anchor, lengths, cache)

        def draft(previous: Array, x: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
            hidden, logits, number = x
            head = self._markov(previous, hidden)
            logits = logits + head["bias"]
            token = choose(logits, number)
            return token, (token, logits, head["confidence"])

        numbers = jnp.arange(self.config.dspark_block_size, dtype=jnp.int32)
        places = *(jnp.moveaxis(block[name], 1, 0) for name in ("hidden", "logits")), numbers
        _, drafts = jax.lax.scan(draft, anchor.astype(jnp.int32), places)
        tokens, logits, confidence = (jnp.moveaxis(x, 0, 1) for x in drafts)
        return Draft(tokens, logits, confidence, block.get("cache"))

    def dspark_read(self, taps: Array, *, lengths: Array | None = None, cache: Cache) -> Cache:
        """Reads a part of the context into the stages' rings. Arguments are as for `dspark`.

        Returns:
          The cache after it.
        """
        self._check_taps(taps, taps.shape[:1])
        # Nobody looks at the block, so that the compiler leaves it out: keys depend on the taps alone.
        return self._draft_block(taps, jnp.zeros(taps.shape[:1], jnp.int32), lengths, cache)["cache"]

    def _draft_block(
        self, taps: Array, anchor: Array, lengths: Array | None = None, cache: Cache | None = None
    ) -> dict[str, Any]:
        """A block's "hidden" states [B, Q, D] and "logits" [B, Q, V] without the Markov bias, and the "cache"."""
        if self.mesh is not None and not self.is_initializing():
            arguments = dict(taps=taps, anchor=anchor, lengths=lengths, cache=cache)
            names = ("hidden", "logits") if cache is None else ("hidden", "logits", "cache")
            return drafting_on_mesh(self, Drafting._draft_block, arguments, names)
        start = None if cache is None else cache.draft_lengths
        chunk = self._layout(taps[..., 0], start, lengths, None, None)
        total = chunk.total
        first = total if start is None else start + total
        hidden, cache, _ = self._run_stages(taps, chunk, anchor, first, total > 0, cache)
        found = {"hidden": hidden, "logits": self._draft_logits(hidden)}
        return found if cache is None else found | {"cache": cache.replace(draft_lengths=cache.draft_lengths + total)}

    def _run_stages(
        self,
        taps: Array,
        chunk: Layout,
        anchor: Array,
        first: Array,
        going: Array,
        cache: Cache | None = None,
        places: Places | None = None,
    ) -> tuple[Array, Cache | None, Array]:
        """Runs blocks whose anchors are `anchor` [N], at positions `first` [N], where `going` [N]; see `DSpark`."""
        c = self.config
        noise = jnp.full((len(anchor), c.dspark_block_size - 1), c.dspark_noise_token_id, jnp.int32)
        ids = jnp.concatenate([anchor[:, None].astype(jnp.int32), noise], axis=1)
        layout = Layout.of(
            ids.shape,
            positions=first[:, None] + jnp.arange(ids.shape[1], dtype=jnp.int32),
            lengths=jnp.where(going, ids.shape[1], 0),
        ).scheduled(c)
        embedded = self._lookup(self._embeddings, ids, self.split.short).astype(self.precision.compute_dtype)
        return self.stages(taps, chunk, self.split.sequence, embedded, Context(ids, layout), cache, places)

    def _draft_logits(self, hidden: Array) -> Array:
        """Logits [N, Q, V] float32 of the stages' hidden states [N, Q, D], without the Markov bias."""
        x = rms_norm(hidden, self.stages.norm_weight, self.config.rms_norm_eps)
        return self._head(x, self.split.short)

    def _markov(self, previous: Array, hidden: Array) -> dict[str, Array]:
        """The "bias" [B, V] that a token [B] puts on the next logits, and the "confidence" [B] of the draft there."""
        if self.mesh is not None:
            arguments = dict(previous=previous, hidden=hidden)
            return drafting_on_mesh(self, Drafting._markov, arguments, ("bias", "confidence"))
        embedded = self._lookup(self.stages.markov_w1_weight, previous[:, None], self.split.short)[:, 0]
        return {"bias": self.stages.bias(embedded), "confidence": self.stages.confidence(hidden, embedded)}

    def dspark_known(self, taps: Array, tokens: Array, anchors: Array, *, segment_ids: Array | None = None) -> Draft:
        """Drafts at many places of rows that are known, each with the true tokens before it (teacher forcing).

        Args:
          taps: [B, S, T * D] the trunk's `Output.taps` of the rows.
          tokens: [B, S] int32 the rows.
          anchors: [B, A] int32 positions of the blocks' anchors, which are at least 1; -1 for no block.
          segment_ids: [B, S] int32 document of each token, as for the trunk; an anchor and the token before it are of
            the same.

        Returns:
          Of the block of each anchor what `dspark` gives behind the tokens before it, if its drafts are the true
          tokens: tokens [B, A, Q], logits [B, A, Q, V], confidence [B, A, Q]. There is no cache.

        Raises:
          ValueError: the model has no stages, or arguments of the wrong shape.
        """
        self._check_known(taps, tokens, anchors)
        found = self._known_logits(taps, tokens, anchors, segment_ids)
        found = {name: x.reshape(*anchors.shape, *x.shape[1:]) for name, x in found.items()}
        return Draft(jnp.argmax(found["logits"], axis=-1).astype(jnp.int32), found["logits"], found["confidence"])

    def _known_logits(self, taps: Array, tokens: Array, anchors: Array, segment_ids: Array | None) -> dict[str, Array]:
        """The "logits" [B * A, Q, V] and "confidence" [B * A, Q] of `dspark_known`."""
        if self.mesh is not None:
            arguments = dict(taps=taps, tokens=tokens, anchors=anchors, segment_ids=segment_ids)
            return drafting_on_mesh(self, Drafting._known_logits, arguments, ("logits", "confidence"))
        hidden, embedded, _ = self._known_blocks(taps, tokens, anchors, segment_ids)
        rows, size, _ = hidden.shape
        flat = embedded.reshape(rows * size, -1)
        bias = self.stages.bias(flat).reshape(rows, size, -1)
        confidence = self.stages.confidence(hidden.reshape(rows * size, -1), flat)
        return {"logits": self._draft_logits(hidden) + bias, "confidence": confidence.reshape(rows, size)}

    def _known_blocks(
        self, taps: Array, tokens: Array, anchors: Array, segment_ids: Array | None
    ) -> tuple[Array, Array, Array]:
        """Hidden states [B * A, Q, D] of blocks in known rows, the rows [B * A, Q, rank] of `markov_w1` of the tokens
        before each draft, and the stages' loads [stages, E]. The rows' tokens are on all devices of a sequence."""
        chunk, size = self._layout(taps[..., 0], None, None, segment_ids, None), self.config.dspark_block_size
        ends = jnp.maximum(anchors, 1)
        first = jnp.take_along_axis((chunk.whole or chunk).first, ends - 1, axis=1)
        given = behind(tokens, anchors, 0, size)
        hidden, _, load = self._run_stages(
            taps,
            chunk,
            given[..., 0].reshape(-1),
            (ends - first).reshape(-1),
            (anchors > 0).reshape(-1),
            places=Places(ends, first),
        )
        embedded = self._lookup(self.stages.markov_w1_weight, given.reshape(-1, size), self.split.short)
        return hidden, embedded, load

    def dspark_loss(
        self,
        taps: Array,
        streams: Array,
        tokens: Array,
        anchors: Array,
        weights: Array,
        *,
        segment_ids: Array | None = None,
        shares: tuple[float, float, float] = (0.1, 0.9, 1.0),
    ) -> dict[str, Array]:
        """The loss of the stages (DSpark, arXiv 2607.05147), without an array of [drafts, vocabulary].

        Draft k of a block stands for the token k places behind the anchor. It is compared with that token, and its
        distribution with the trunk's own in that place. Confidence is to say with which probability speculative
        sampling takes the draft: what both distributions share of each token, added up. The trunk has no gradient.

        Args:
          taps: [B, S, T * D] the trunk's `Output.taps` of the rows.
          streams: [B, S, hc, D] its `Output.streams`.
          tokens: as for `dspark_known`.
          anchors: as for `dspark_known`.
          weights: [B, A, Q] float32 what each draft counts: 0 where there is none to learn.
          segment_ids: as for `dspark_known`.
          shares: what the three losses count: a nat of cross-entropy, the L1 distance of the distributions, 2 at most,
            and a nat of binary cross-entropy of the confidence.

        Returns:
          "loss", a float32 number, the weighted sum of all three; its parts, "cross_entropy", "distance" and
          "confidence_loss", without their shares; "length", how many tokens a step would make with each block in the
          mean, added up over blocks that count; and "load" [stages, E] int32, the tokens that each expert got.

        Raises:
          ValueError: the model has no stages, or arguments of the wrong shape.
        """
        self._check_known(taps, tokens, anchors)
        if self.mesh is not None:
            arguments = dict(taps=taps, streams=streams, tokens=tokens, anchors=anchors, weights=weights)
            call = functools.partial(Drafting.dspark_loss, shares=shares)
            names = ("loss", "cross_entropy", "distance", "confidence_loss", "length", "load")
            return drafting_on_mesh(self, call, arguments | dict(segment_ids=segment_ids), names)
        c, size = self.config, self.config.dspark_block_size
        taps, streams = jax.lax.stop_gradient((taps, streams))
        hidden, embedded, load = self._known_blocks(taps, tokens, anchors, segment_ids)
        embedded = embedded.reshape(-1, embedded.shape[-1])
        head, axes, start = self._shared_head(self.head_weight)
        # The trunk's state in the anchor's place says what follows the anchor: the first draft.
        wanted = (anchors[..., None] + jnp.arange(size, dtype=jnp.int32)).reshape(len(anchors), -1)
        trunk = collectives.rows_at(self.hidden(streams), wanted, self.split.sequence)
        counted = weights.reshape(-1)
        drafted = Drafted(
            hidden=rms_norm(hidden, self.stages.norm_weight, c.rms_norm_eps).reshape(-1, c.hidden_size),
            embedded=embedded,
            markov=self.stages.markov_w2_weight,
            trunk=jax.lax.stop_gradient(trunk).reshape(-1, c.hidden_size),
            head=jax.lax.stop_gradient(head),
            tokens=behind(tokens, anchors, 1, size).reshape(-1) - start,
            weights=counted,
        )
        with jax.named_scope("head.draft_loss"):
            loss, of_token, apart = draft_loss(drafted, shares[0], shares[1], axes)
        taken = jax.lax.stop_gradient(1 - apart / 2)
        sure = self.stages.confidence(hidden.reshape(-1, c.hidden_size), embedded)
        doubt = -(taken * jax.nn.log_sigmoid(sure) + (1 - taken) * jax.nn.log_sigmoid(-sure))
        found = {
            "loss": loss + shares[2] * jnp.sum(counted * doubt),
            "cross_entropy": jnp.sum(counted * of_token),
            "distance": jnp.sum(counted * apart),
            "confidence_loss": jnp.sum(counted * doubt),
        }
        reached = jnp.cumprod(jnp.where(weights > 0, taken.reshape(weights.shape), 0), axis=-1)
        found["length"] = jnp.sum(jnp.where(weights[..., 0] > 0, 1 + jnp.sum(reached, axis=-1), 0))
        return collectives.psum(found, self.split.axes("batch")) | {"load": load}

    def _check_known(self, taps: Array, tokens: Array, anchors: Array) -> None:
        self._check_taps(taps, tokens.shape[:1])
        length = taps.shape[1] * collectives.size(self.split.sequence)
        if tokens.shape != (len(taps), length) or anchors.ndim != 2 or len(anchors) != len(tokens):
            raise ValueError(
                f"tokens of {tokens.shape} and anchors of {anchors.shape} for taps of {taps.shape}: expected [B, S] "
                "and [B, A]"
            )

    def _check_stages(self) -> None:
        if not self.config.dspark_stages:
            raise ValueError("this model has no DSpark stages (dspark_block_size is 0)")

    def _check_taps(self, taps: Array, rows: tuple[int, ...]) -> None:
        self._check_stages()
        width = len(self.config.dspark_target_layer_ids) * self.config.hidden_size
        if taps.ndim != 3 or taps.shape[-1] != width or taps.shape[:1] != rows:
            raise ValueError(f"taps of {taps.shape} for anchors of {rows}: expected [B, S, {width}] and [B]")


def behind(tokens: Array, anchors: Array, first: int, count: int) -> Array:
    """[B, A, count] tokens of rows [B, S], from `first` places behind each anchor [B, A] on; the last at the end."""
    places = anchors[..., None] + first + jnp.arange(count, dtype=jnp.int32)
    places = jnp.clip(places, 0, tokens.shape[1] - 1).reshape(len(tokens), -1)
    return jnp.take_along_axis(tokens, places, axis=1).reshape(*anchors.shape, count)
