"""The multi-token-prediction block (technical report, section 2.1): from token i+1 it predicts token i+2."""

from __future__ import annotations

from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.block import Block, Carry, Context
from v4_jax.cache.cache import Cache
from v4_jax.layers.hyper_connections import StreamCollapse, joined
from v4_jax.layers.linear import linear
from v4_jax.layers.norm import rms_norm
from v4_jax.layers.stages import Remat, rematerialised
from v4_jax.outputs import Decided, Routing
from v4_jax.parameters import Module
from v4_jax.policy import Policy


class MultiTokenPrediction(Module):
    """The MTP block: a sliding-window layer over the trunk's streams and the next token's embedding."""

    config: Architecture
    policy: Policy
    remat: Remat = "none"

    def setup(self) -> None:  # noqa: D102 called by Linen
        c = self.config
        square, axes = (c.hidden_size, c.hidden_size), ("embed_out", "embed")
        self.e_proj = self.linear("e_proj", square, axes, config=c, family="mtp")
        self.h_proj = self.linear("h_proj", square, axes, config=c, family="mtp")
        self.enorm = self.norm("enorm", c.hidden_size)
        self.hnorm = self.norm("hnorm", c.hidden_size)
        self.norm_weight = self.norm("norm", c.hidden_size)
        self.collapse = StreamCollapse(config=c, prefix=self.prefix + "hc_head_", split=self.split, name="hc_head")
        self.block = rematerialised(Block, self.remat, in_scan=False)(
            config=c,
            policy=self.policy,
            roles=c.draft_layer,
            window="draft",
            prefix=self.prefix,
            split=self.split,
            name="block",
        )

    def __call__(
        self, streams: Array, embedded: Array, context: Context, cache: Cache | None, replay: Routing
    ) -> tuple[Array, Cache | None, Decided]:
        """Streams [B, S, hc, D], embedded next tokens [B, S, D] -> the block's streams [B, S, hc * D], side by side,
        cache after them, decisions."""
        dtype, eps = self.policy.compute_dtype, self.config.rms_norm_eps
        z = linear(rms_norm(embedded, self.enorm, eps), self.e_proj, dtype)
        streams = linear(rms_norm(streams.astype(dtype), self.hnorm, eps), self.h_proj, dtype) + z[:, :, None]
        carry, decided = self.block(Carry(joined(streams), cache), context, 0, 0, replay)
        return carry.streams, carry.cache, decided
