"""Attention by blocks of queries: what a block sees, and how a chunk is cut into them and joined again.

A block's queries are projected, attend their windows and entries, and give their outputs before the next block's begin,
so that nothing of size sequence x heads or sequence x entries is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.layers.rotary import Turn
from v4_jax.layers.stages import recompute
from v4_jax.layers.visible import Visible
from v4_jax.sharding.platform import platform_of_mesh

QUERY_BLOCK = 128  # queries of a row that see the same keys of the window,
BATCH_BLOCK = 512  # and of all rows, which bounds the memory of a large batch
WIDE_BLOCK = 512  # queries of all rows, where kernels hold the logits
WHOLE_BYTES = 2**31  # of a chunk's queries, and as much of what they attend, that are held at once in training,
ATTENDED_BYTES = 2**30  # and of those that are attended at once by kernels, which give float32
TOGETHER = 2**21  # logits of the window, up to which several blocks of queries are attended side by side

Outputs = TypeVar("Outputs")


class Queries(NamedTuple):
    """The queries of a chunk, or of a block of it, S of them.

    Attributes:
      latent: [B, S, q_lora_rank] normed, from which they are projected.
      turn: by how much their positions turn.
      indices: [1, S] int32 their numbers in the chunk.
      first: [B, S] int32 chunk index of the first token of their documents.
      low: [B, S] int32 the first entry that they see.
      high: [B, S] int32 one past the last entry that they see.
      index_weights: [B, S, index heads] float32 head weights of the indexer; None where there is none.
      picks: [B, S, K] int32 entries to attend instead of the indexer's choice, or None.
      projected: [B, S, H * C] projected already, or None; see `projects_whole`.
    """

    latent: Array
    turn: Turn
    indices: Array
    first: Array
    low: Array
    high: Array
    index_weights: Array | None = None
    picks: Array | None = None
    projected: Array | None = None


class QueryBlock(NamedTuple):
    """A block of Q queries and what it sees.

    Attributes:
      queries: the queries.
      keys: [B, past + Q, C] all keys that the window shows any of them; None where they are in a ring.
      visible: the entries that they see.
    """

    queries: Queries
    keys: Array | None
    visible: Visible

    @property
    def oldest(self) -> Array:
        """[B, Q] int32 which of the keys is the first of each query's document; negative where it is older than all."""
        queries = self.queries
        assert self.keys is not None
        past = self.keys.shape[1] - queries.first.shape[1]
        return queries.first - (queries.indices[:, :1] - past)


def projects_whole(tokens: int, width: int, dtype: Any, *, gradients: bool) -> bool:
    """Whether queries and outputs are projected for all of a chunk, and not for one block of queries after another.

    Where gradients are asked for blocks are narrow, and each would read the projections' weights, and read and write
    their gradients: on TPUs that takes several times as long as the products themselves. It takes memory instead.

    Args:
      tokens: of the chunk on one device.
      width: query heads on it, times their channels.
      dtype: of the queries.
      gradients: whether they may be asked for.
    """
    return gradients and platform_of_mesh() == "tpu" and tokens * width * jnp.dtype(dtype).itemsize <= WHOLE_BYTES


def by_query_blocks(
    block: Callable[[QueryBlock], Outputs],
    tail: Array,
    keys: Array,
    queries: Queries,
    heads: int,
    *,
    wide: int = 0,
) -> Outputs:
    """Runs `block` on blocks of at most `QUERY_BLOCK` queries, and no more than the window is long; or on wide ones.

    Where there is little in a block, several are attended side by side, in one operation each. A wide block is for
    programs that attend by kernels: they hold no logits in memory, every block reads all of the projections' weights,
    which takes as long as the products of some hundred queries with them, and what blocks take and give is cut out of
    a whole and put together again.

    Args:
      block: from a block to a pytree of [B, Q, ...] arrays.
      tail: [B, past, C] keys before the first.
      keys: [B, S, C] keys of the chunk.
      queries: of the chunk.
      heads: query heads of the model, also where a device works on some of them: entries picked are not so divided.
      wide: queries of a row in a wide block; 0: blocks are not wide.

    Returns:
      The outputs, [B, S, ...] again. The backward pass recomputes them step by step where there are several, but for
      the entries picked.
    """
    (batch, size), past = keys.shape[:2], tail.shape[1]
    narrow = min(QUERY_BLOCK, past + 1, max(16, BATCH_BLOCK // batch))
    blocks = -(-size // (wide or narrow))
    width = -(-size // blocks)
    steps = blocks if wide else -(-blocks // max(1, TOGETHER // (batch * heads * width * (past + width))))
    together = -(-blocks // steps)

    def step(tail: Array, x: tuple[Queries, Array]) -> tuple[Array, Outputs]:
        queries, keys = x
        seen = jnp.concatenate([tail, keys], axis=1)
        least, most = jnp.min(queries.low), jnp.max(queries.high)

        def run(queries: Queries, keys: Array) -> Outputs:
            return block(QueryBlock(queries, keys, Visible(queries.low, queries.high, least, most)))

        after = seen[:, seen.shape[1] - past :]
        if together == 1:
            return after, run(queries, seen)
        side_by_side = jax.tree.map(lambda x: cut_into(x, together), queries)
        return after, jax.tree.map(joined, jax.vmap(run)(side_by_side, _windows(seen, past, width, together)))

    padding = steps * together * width - size
    queries, keys = jax.tree.map(lambda x: padded(x, padding), (queries, keys))
    if steps == 1:
        outputs = step(tail, (queries, keys))[1]
    else:
        by_step = jax.tree.map(lambda x: cut_into(x, steps), (queries, keys))
        outputs = jax.tree.map(joined, jax.lax.scan(recompute(step), tail, by_step)[1])
    return jax.tree.map(lambda x: x[:, :size], outputs)


def _windows(seen: Array, past: int, width: int, together: int) -> Array:
    """The keys [together, B, past + width, C] of blocks side by side, from [B, past + together * width, C] of them all.

    Joined from whole pieces as long as a block, so that there are as many operations whatever the row's length. With
    together = 3 and a `past` that reaches into 2 pieces before a block's own:

        seen          |  past  |block 0|block 1|block 2|
        pieces    |  p0   |  p1   |  p2   |  p3   |  p4   |      padded on the left to whole pieces
        block 0   |.[ p0      p1      p2 ]                       [ ]: past + width keys
        block 1           |.[ p1      p2      p3 ]               .  : of no use to the block, cut off
        block 2                   |.[ p2      p3      p4 ]
    """
    before = -(-past // width)
    pieces = cut_into(jnp.pad(seen, [(0, 0), (before * width - past, 0), (0, 0)]), before + together)
    windows = jnp.concatenate([pieces[i : i + together] for i in range(before + 1)], axis=2)
    return windows[:, :, before * width - past :]


def padded(x: Array, padding: int) -> Array:
    """[B, S, ...] with so many zeros after the last query."""
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))


def cut_into(x: Array, count: int) -> Array:
    """[B, count * n, ...] -> [count, B, n, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)


def joined(x: Array) -> Array:
    """[count, B, n, ...] -> [B, count * n, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
