"""Attention over compressed entries: the picked ones of each query (CSA), or all that are visible (HCA)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.cache.entries import Entries
from v4_jax.kernels import choose
from v4_jax.layers.lightning_indexer import Here
from v4_jax.layers.partial_softmax import attend, merge, nothing
from v4_jax.layers.partials import Packed, Partial
from v4_jax.layers.visible import Visible
from v4_jax.sharding import collectives

ENTRY_BLOCK = 128  # entries that HCA attends at once


@jax.named_scope("attention.csa")
def attend_picked(
    queries: Array, entries: Entries, picked: Array, here: Here | None = None, together: bool = False
) -> Partial | Packed:
    """Attention of each query over its own entries, as far as they lie here.

    Args:
      queries: [B, Q, H, C].
      entries: the entries.
      picked: [B, Q, K] int32 those to attend, -1 for none.
      here: those of them that lie here, where that is known.
      together: whether to return one `Packed` softmax.
    """
    local, filled = (entries.local(picked), None) if here is None else here
    return choose.attend_picked(attend_copies, queries, entries, local, filled, together)


def attend_copies(queries: Array, entries: Entries, local: Array, filled: Array | None = None) -> Partial:
    """The same over gathered copies of the entries, of local numbers, -1 for none.

    Where it is known how many are `filled`, those come first.
    """
    devices, count = collectives.size(entries.axes), local.shape[-1]
    if devices == 1:
        return attend(queries, entries.gather(local), local >= 0)
    # A device holds about one in `devices` of the picks: those first, in blocks, and no work for blocks without any.
    width = min(count, -(-2 * count // devices))
    if filled is None:
        local = -jnp.sort(-local, axis=-1)
    local = jnp.pad(local, [(0, 0), (0, 0), (0, -count % width)], constant_values=-1)
    blocks = jnp.moveaxis(local.reshape(*local.shape[:2], -1, width), 2, 0)

    def step(partial: Partial, local: Array) -> tuple[Partial, None]:
        def join(partial: Partial) -> Partial:
            return merge(partial, attend(queries, entries.gather(local), local >= 0))

        return jax.lax.cond(jnp.any(local >= 0), join, lambda partial: partial, partial), None

    return jax.lax.scan(step, nothing(queries), blocks)[0]


@jax.named_scope("attention.hca")
def attend_range(queries: Array, entries: Entries, visible: Visible) -> Partial:
    """Attention over the visible entries that lie here, by blocks; blocks nobody sees are skipped."""
    size = min(ENTRY_BLOCK, entries.count)

    def block(wanted: Array) -> Partial:
        first = jnp.minimum(wanted, entries.count - size)  # the last block may reach back over the one before
        return attend(queries, entries.block(first, size), visible.mask(first, size, wanted))

    if size == entries.count:
        return block(jnp.int32(0))

    def step(partial: Partial, wanted: Array) -> tuple[Partial, None]:
        seen = visible.any(wanted, size)
        return jax.lax.cond(seen, lambda p, w: merge(p, block(w)), lambda p, w: p, partial, wanted), None

    return jax.lax.scan(step, nothing(queries), jnp.arange(0, entries.count, size, dtype=jnp.int32))[0]
