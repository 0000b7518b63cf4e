"""One layer of the model, and one repeat of the layers that repeat.

Technical report, section 2.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from v4_jax.architecture import Architecture, Layer
from v4_jax.cache.cache import Cache, WindowRole
from v4_jax.layer_stack import in_stack, role_index
from v4_jax.layers.attention import Attention
from v4_jax.layers.draft_attention import DraftAttention, Taps
from v4_jax.layers.experts import Experts
from v4_jax.layers.hyper_connections import HyperConnection, apart, leave, nothing_left
from v4_jax.layers.mixture_of_experts import MixtureOfExperts
from v4_jax.layers.stages import SPARSE, Remat, Stage, rematerialised
from v4_jax.layout import Layout
from v4_jax.outputs import Decided, Routing
from v4_jax.parameters import Module
from v4_jax.policy import Policy
from v4_jax.sharding.split import Split


class Carry(struct.PyTreeNode):
    """What one layer hands to the next, and a scan carries.

    Attributes:
      streams: [B, S, hc * D], side by side.
      cache: None without one.
      taps: [T + 1, B, S, D] the mean over the streams after each of `dspark_target_layer_ids` so far, and a last place
        for what layers in a scan have that are none of them; None if nobody asks for it.
      left: output [B, S, D] of the last sublayer, and its mix, still to be written back to the streams: the next one
        does that in the operation in which it reads them. A layer that is given one hands one on; None: none is.
    """

    streams: Array
    cache: Cache | None
    taps: Array | None = None
    left: tuple[Array, Array] | None = None

    @classmethod
    def of(cls, streams: Array, cache: Cache | None, config: Architecture, *, taps: bool) -> Carry:
        """What the first layer gets."""
        shape = len(config.dspark_target_layer_ids) + 1, *streams.shape[:2], config.hidden_size
        if taps:
            return cls(streams, cache, jnp.zeros(shape, streams.dtype))
        # Where a backward pass keeps what is carried, an output beside the streams would be a quarter more.
        return cls(streams, cache, left=None if cache is None else nothing_left(streams, config))

    def written(self, config: Architecture) -> Carry:
        """The same with everything written back to the streams."""
        if self.left is None:
            return self
        return self.replace(streams=leave(self.streams, *self.left, config), left=None)

    def tapped(self, config: Architecture, layer: Any) -> Carry:
        """The same with the tap of the layer that has just run, if it has one."""
        if self.taps is None:
            return self
        targets = config.dspark_target_layer_ids
        if isinstance(layer, int):
            if layer not in targets:
                return self
            place: Any = targets.index(layer)
        else:
            is_target = jnp.asarray(targets) == layer
            place = jnp.where(jnp.any(is_target), jnp.argmax(is_target), len(targets))
        mean = jnp.mean(apart(self.streams, config.hc_mult).astype(jnp.float32), axis=2).astype(self.taps.dtype)
        return self.replace(taps=jax.lax.dynamic_update_index_in_dim(self.taps, mean, place, 0))


class Context(struct.PyTreeNode):
    """What every layer of one call shares.

    Attributes:
      tokens: [B, S] int32 ids.
      layout: where they stand.
      taps: of a chunk of the trunk, where the tokens are a block of drafts behind it.
    """

    tokens: Array
    layout: Layout
    taps: Taps | None = None


class Block(Module):
    """One layer: attention and experts, each between a collapse of the streams and a write back to them.

    Attributes:
      config: the architecture.
      policy: precision.
      roles: what the layer is.
      stage: see `layers.stages`.
      window: where in the cache its last keys are.
    """

    config: Architecture
    policy: Policy
    roles: Layer
    stage: Stage = SPARSE
    window: WindowRole = "window"

    @nn.compact
    def __call__(
        self,
        carry: Carry,
        context: Context,
        layer: Any,
        role_index: Any,
        replay: Routing,
        stacked: tuple[Experts, Any] | None = None,
    ) -> tuple[Carry, Decided]:
        """Runs the layer.

        Args:
          carry: what the layer before hands on.
          context: what all layers share.
          layer: the layer's number, which is its place in the window's stack.
          role_index: its number among the layers of its attention role.
          replay: this layer's decisions to repeat, without the layer axis; empty to decide anew.
          stacked: see `MixtureOfExperts`.

        Returns:
          What the next layer gets, and this one's decisions without the layer axis.
        """
        c = self.config
        site = HyperConnection(config=c, prefix=self.prefix + "hc_attn_", split=self.split, name="hc_attn")
        streams, y, mix = site(carry.streams, self.norm("attn_norm", c.hidden_size), carry.left)
        make = functools.partial(
            Attention if context.taps is None else DraftAttention,
            config=c,
            policy=self.policy,
            roles=self.roles,
            stage=self.stage,
            prefix=self.prefix + "attn.",
            window=self.window,
            split=self.split,
            name="attn",
        )
        picked = loss = None
        if context.taps is None:
            z, cache, picked, loss = make()(y, context.layout, carry.cache, layer, role_index, replay.entries)
        else:
            z, cache = make()(y, context.layout, carry.cache, layer, context.taps)

        site = HyperConnection(config=c, prefix=self.prefix + "hc_ffn_", split=self.split, name="hc_ffn")
        streams, y, mix = site(streams, self.norm("ffn_norm", c.hidden_size), (z, mix))
        ffn = MixtureOfExperts(
            config=c,
            policy=self.policy,
            role=self.roles.feed_forward,
            prefix=self.prefix + "ffn.",
            split=self.split,
            name="ffn",
        )
        z, decided = ffn(y, context.tokens, context.layout.valid, stacked, replay.experts)
        decided = Decided(decided.routing.replace(entries=picked), decided.statistics.replace(indexer_loss=loss))
        after = carry.replace(streams=streams, cache=cache, left=(z, mix))
        return after.written(c) if carry.left is None else after, decided


class PeriodBlocks(nn.Module):
    """One repeat of the repeating roles: the body of the scan over layers."""

    config: Architecture
    policy: Policy
    split: Split
    stage: Stage = SPARSE
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, counted: tuple[Array, Carry], replay: list[Routing], context: Context, stacks: Any
    ) -> tuple[tuple[Array, Carry], list[Decided]]:
        """Runs the layers of a repeat with the decisions to replay; see `Block`.

        The number of the repeat goes from one to the next with what they carry: numbers that a scan cuts out of an
        array are vectors to the TPU's compiler, and what follows from them operations.

        `stacks` are the parameters of all repeats, by the name of their block, from which kernels then read their
        repeat's; None to use what the scan cuts out.
        """
        repeat, carry = counted
        period, decided = self.config.period, []
        roles = [roles.attention for roles in self.config.layers]
        # Experts whose axes are split otherwise are gathered first, a layer's at a time.
        whole = not (self.split.axes("expert_embed") or self.split.axes("expert_hidden"))
        for place, layer in enumerate(period.layers(0)):
            make, stacked = rematerialised(Block, self.remat, in_scan=True), None
            if stacks is not None:
                stack = stacks[f"block_{place}"]
                make = nn.map_variables(
                    make, "params", functools.partial(in_stack, stacks={"params": stack}, layer=repeat)
                )
                ffn = stack["ffn"]
                stacked = (Experts(ffn["w1"], ffn["w2"], ffn["w3"]), repeat) if whole else None
            first = role_index(self.config, layer)
            per_repeat = roles[period.start : period.start + period.length].count(roles[layer])
            block = make(
                config=self.config,
                policy=self.policy,
                roles=self.config.layers[layer],
                stage=self.stage,
                prefix=f"layers.{{layers[{place}]}}.",
                split=self.split,
                name=f"block_{place}",
            )
            number = layer + repeat * period.length
            carry, one = block(carry, context, number, first + repeat * per_repeat, replay[place], stacked)
            carry = carry.tapped(self.config, number)
            decided.append(one)
        return (repeat + 1, carry), decided
