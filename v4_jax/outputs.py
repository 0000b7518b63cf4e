"""What a forward pass returns."""

from __future__ import annotations

from typing import Literal

from flax import struct
from jax import Array

from v4_jax.cache.cache import Cache

Logits = Literal["all", "last", "none"]


class Routing(struct.PyTreeNode):
    """Discrete decisions of a forward pass, to read or to replay.

    Attributes:
      experts: [layers, B, S, num_experts_per_tok] int32 experts of each token; in replay None decides anew.
      entries: [CSA layers, B, S, K] int32 compressed entries attended, -1 for none; None when there are no entries, and
        in replay to pick anew.
    """

    experts: Array | None = None
    entries: Array | None = None


# Which decisions are kept to be replayed: of the experts alone, or of the entries that are picked, too.
Kept = Literal["none", "experts", "all"]


class RoutingStatistics(struct.PyTreeNode):
    """How the decisions came about and what they led to.

    Attributes:
      affinities: [layers, B, S, n_routed_experts] float32 router affinities.
      load: [layers, n_routed_experts] int32 tokens that each expert got, of all devices together.
      balance: [layers, B] float32 how unevenly each row's tokens spread over the experts, 1 when even; differentiable.
        0 in layers that route by token id.
      indexer_loss: [CSA layers, B, S] float32 divergence of the indexer's scores from the attention that entries get;
        None unless `Stage.indexer_loss` asks for it. Its gradients concern the indexer alone.
    """

    affinities: Array | None = None
    load: Array | None = None
    balance: Array | None = None
    indexer_loss: Array | None = None


class Decided(struct.PyTreeNode):
    """What one layer decided, without the layer axis, or all layers, with it."""

    routing: Routing
    statistics: RoutingStatistics


class Output(struct.PyTreeNode):
    """What a forward pass returns.

    Attributes:
      logits: [B, S, V] float32; [B, 1, V] at each row's last valid token for `logits="last"`; None for "none".
      cache: the cache after the chunk, or None.
      streams: [B, S, hc, D] after the last block, before the final collapse.
      routing: the decisions taken, when asked for.
      statistics: of these decisions, when asked for.
      taps: [B, S, T * D] the mean over the streams after each of the T layers `dspark_target_layer_ids`, when asked
        for: what `Transformer.dspark` drafts from.
    """

    logits: Array | None
    cache: Cache | None
    streams: Array
    routing: Routing | None = None
    statistics: RoutingStatistics | None = None
    taps: Array | None = None


class Draft(struct.PyTreeNode):
    """A block of Q drafts of the tokens that follow an anchor (DSpark).

    Attributes:
      tokens: [B, Q] int32.
      logits: [B, Q, V] float32 that each was chosen from.
      confidence: [B, Q] float32, whose sigmoid estimates that a draft is right if those before it are.
      cache: the cache after the context, which holds nothing of the block; None without one.
    """

    tokens: Array
    logits: Array
    confidence: Array
    cache: Cache | None = None
