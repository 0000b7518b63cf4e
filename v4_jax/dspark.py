"""DSpark (arXiv 2607.05147): a block of drafts at once, made by a few stages from the trunk's own hidden states.

The trunk's pass hands out taps, the mean over its streams after some of its layers. Projected, they are what each
stage's attention makes the context's keys from. A block is the newest token, the anchor, and as many places of noise as
there are further drafts; the stages, which are sliding-window blocks, see all of it at once. A Markov head then adds
to each place's logits what the token before it says, so that drafts are drawn one after another all the same; and a
confidence head estimates for each that it is right if those before it are.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.block import Block, Carry, Context
from v4_jax.cache.cache import Cache
from v4_jax.layers.draft_attention import Places, Taps
from v4_jax.layers.hyper_connections import StreamCollapse, expand
from v4_jax.layers.linear import linear
from v4_jax.layers.norm import rms_norm
from v4_jax.layers.stages import Remat, rematerialised
from v4_jax.layout import Layout
from v4_jax.outputs import Routing
from v4_jax.parameters import Module, normal
from v4_jax.policy import Policy, einsum
from v4_jax.sharding.collectives import Axes


class DSpark(Module):
    """The stages and their heads. `split` is that of the drafts, a short chunk whatever the trunk's is.

    Attributes:
      config: the architecture.
      policy: precision.
      remat: what the backward pass recomputes, see `layers.stages`.
    """

    config: Architecture
    policy: Policy
    remat: Remat = "none"

    def setup(self) -> None:  # noqa: D102 called by Linen
        c, last = self.config, self.config.dspark_stages - 1
        width = len(c.dspark_target_layer_ids) * c.hidden_size
        axes = ("embed_out", "embed")
        self.main_proj = self.linear("main_proj", (c.hidden_size, width), axes, config=c, released="mtp.0.main_proj")
        self.main_norm = self.norm("main_norm", c.hidden_size, released="mtp.0.main_norm")
        self.norm_weight = self.norm("norm", c.hidden_size, released=f"mtp.{last}.norm")
        self.collapse = StreamCollapse(config=c, prefix=f"mtp.{last}.hc_head_", split=self.split, name="hc_head")
        heads = {
            "markov_w1": ((c.vocab_size, c.dspark_markov_rank), ("vocab", None), "markov_head.markov_w1"),
            "markov_w2": ((c.vocab_size, c.dspark_markov_rank), ("vocab", None), "markov_head.markov_w2"),
            "confidence": ((1, c.hidden_size + c.dspark_markov_rank), (None, None), "confidence_head.proj"),
        }
        for name, (shape, places, released) in heads.items():
            weight = self.declare(
                name,
                shape,
                places,
                released=f"mtp.{last}.{released}.weight",
                storage="bf16",
                group="adamw",
                init=normal(c),
            )
            setattr(self, name + "_weight", weight)
        make = rematerialised(Block, self.remat, in_scan=False)
        for i in range(c.dspark_stages):
            stage = make(
                config=c,
                policy=self.policy,
                roles=c.draft_layer,
                window="draft",
                prefix=f"mtp.{i}.",
                split=self.split,
                name=f"stage_{i}",
            )
            setattr(self, f"stage_{i}", stage)

    def __call__(
        self,
        taps: Array,
        chunk: Layout,
        axes: Axes,
        embedded: Array,
        context: Context,
        cache: Cache | None,
        places: Places | None = None,
    ) -> tuple[Array, Cache | None, Array]:
        """Adds a chunk to the context, and runs blocks behind it, or within it, through all stages.

        Args:
          taps: [B, S, T * D] of the chunk.
          chunk: where it stands.
          axes: mesh axes that split its sequence.
          embedded: [N, Q, D] embeddings of the anchor and the noise of every block.
          context: their ids, and where they stand.
          cache: what earlier chunks left in the stages' rings.
          places: see `Taps`: of each block, B * A of them; None for a block a row, behind the chunk.

        Returns:
          Hidden states [N, Q, D], before their norm; the cache after the chunk, which holds nothing of the block; and
          the tokens that each expert got, [stages, E] int32.
        """
        c, dtype = self.config, self.policy.compute_dtype
        main = rms_norm(linear(taps.astype(dtype), self.main_proj, dtype), self.main_norm, c.rms_norm_eps)
        carry = Carry(expand(embedded, c.hc_mult), cache)
        context, loads = context.replace(taps=Taps(main, chunk, axes, places)), list[Array]()
        for i in range(c.dspark_stages):
            carry, decided = getattr(self, f"stage_{i}")(carry, context, i, 0, Routing())
            loads.append(decided.statistics.load)
        return self.collapse(carry.streams), carry.cache, jnp.stack(loads)

    def bias(self, embedded: Array) -> Array:
        """What a token adds to the logits of the next one, [N, V] float32, from its row of `markov_w1` [N, rank]."""
        return einsum("br,vr->bv", embedded, self.markov_w2_weight, dtype=jnp.float32)

    def confidence(self, hidden: Array, embedded: Array) -> Array:
        """Confidence [N] float32, before its sigmoid, of a draft from [N, D] and the row of the token before it."""
        both = jnp.concatenate([hidden.astype(jnp.float32), embedded.astype(jnp.float32)], axis=-1)
        return einsum("bi,oi->bo", both, self.confidence_weight, dtype=jnp.float32)[:, 0]
