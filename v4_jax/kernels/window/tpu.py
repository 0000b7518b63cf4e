"""A short chunk's window for TPUs: its keys join each row's ring, which its queries attend as it lies.

Written for XLA, the ring is read in order, joined with the chunk's keys, padded and attended, in a dozen operations of
which each takes longer than the work. A softmax does not mind the order of its keys. So the ring of a batch row comes
as it is, and what a query sees is told by the age of each place: how many tokens came after it. The eight rows about a
new key's place are written back, and the next batch row's ring is fetched meanwhile.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.cache.ring import Ring
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels.attention.reference import MASKED
from v4_jax.kernels.attention.tpu import statistics
from v4_jax.kernels.memory import kept_in_hbm
from v4_jax.layers.partials import STATISTICS, Packed
from v4_jax.layout import SHORT, Layout

LANES = 128
ROWS = 8  # of a ring, that are written together
VMEM_BYTES = 32 << 20


def supports(queries: Array, ring: Ring) -> bool:
    """Whether `step` takes queries [B, Q, H, C] and such a ring: bfloat16 both, and no more queries than it spares."""
    rows, (_, count, heads, size) = ring.rows, queries.shape
    return (
        queries.dtype == jnp.bfloat16
        and rows.kind == "plain"
        and rows.dtype == jnp.bfloat16
        and rows.shape[2] % ROWS == 0
        and count <= SHORT
        and heads % 8 == 0
        and size % LANES == 0
    )


def step(
    queries: Array, keys: Array, ring: Ring, layout: Layout, *, past: int, interpret: bool = False
) -> tuple[Packed, StoredRows]:
    """Stores a short chunk's keys, and attends the windows of its queries.

    Args:
      queries: [B, Q, H, C] bfloat16.
      keys: [B, Q, C] of the same tokens, as they are stored.
      ring: the last keys of each row.
      layout: where the chunk's tokens stand.
      past: tokens before its own that a query sees.
      interpret: run in interpret mode, on any platform.

    Returns:
      One partial softmax, and the rings of all layers with the chunk's keys. Not differentiable.
    """
    (batch, count, heads, size), stack = queries.shape, ring.rows.arrays[0]
    lines = stack.shape[2] // ROWS
    queries, (rings,) = kept_in_hbm(queries, [stack.reshape(*stack.shape[:2], lines, ROWS, size)], interpret=interpret)
    scalars = [jnp.asarray(ring.layer, jnp.int32).reshape(1), ring.start, layout.total]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)

    def by_row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda b, *_: (b, 0, 0))

    out = jax.ShapeDtypeStruct((batch, count * heads, size + STATISTICS), jnp.float32)
    found, rings = pl.pallas_call(
        functools.partial(_kernel, past=past, scale=size**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch,),
            in_specs=[by_row(count * heads, size), by_row(count, size), anywhere],
            out_specs=[by_row(*out.shape[1:]), anywhere],
            scratch_shapes=[
                pltpu.VMEM((2, lines, ROWS, size), stack.dtype),
                pltpu.VMEM((count, ROWS, size), stack.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((count,)),
            ],
        ),
        out_shape=[out, jax.ShapeDtypeStruct(rings.shape, rings.dtype)],
        input_output_aliases={len(scalars) + 2: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * count * heads * lines * ROWS * size,
            bytes_accessed=batch * (2 * lines * ROWS + 6 * count * heads) * size,
            transcendentals=batch * count * heads * lines * ROWS,
        ),
        interpret=interpret,
        name="window_step",
    )(*scalars, queries.reshape(batch, count * heads, size), keys, rings)
    parts = found.reshape(1, *queries.shape[:3], size + STATISTICS)
    return Packed(parts), ring.rows.replace(arrays=(rings.reshape(stack.shape),))


def _kernel(
    layer: Any,
    start: Any,
    total: Any,
    queries: Any,
    keys: Any,
    given: Any,
    out: Any,
    rings: Any,
    held: Any,
    lines: Any,
    read: Any,
    written: Any,
    *,
    past: int,
    scale: float,
) -> None:
    """A grid step: one batch row.

    Refs: numbers of layer, start [B] and total [B]; queries [Q * H, C], keys [Q, C]; rings [L, B, N / 8, 8, C] of bits,
    in and out; partial softmax [Q * H, C + 128]; scratch: the rings of this batch row and the next; lines that are
    written; their semaphores.
    """
    del given  # the same memory as `rings`
    row, rows, count = pl.program_id(0), pl.num_programs(0), keys.shape[0]
    slot, size, heads = row & 1, held.shape[1] * ROWS, queries.shape[0] // keys.shape[0]
    first, fresh = start[row], total[row]
    newest = first + fresh - 1

    def fetch(b: Any, into: Any) -> Any:
        return pltpu.make_async_copy(rings.at[layer[0], b], held.at[into], read.at[into])

    pl.when(row == 0)(lambda: fetch(row, slot).start())
    pl.when(row + 1 < rows)(lambda: fetch(row + 1, 1 - slot).start())
    places = [jax.lax.rem(first + token, jnp.int32(size)) for token in range(count)]

    def joined(old: Array, place: Array) -> Array:
        """Rows of the ring [..., C] float32, those at the chunk's places replaced; `place` [..., 1] says where."""
        for token in range(count):
            key = keys[token : token + 1, :].astype(jnp.float32)
            old = jnp.where((place == places[token]) & (token < fresh), key, old)
        return old

    def age_of(place: Array) -> Array:
        age = jax.lax.rem(newest, jnp.int32(size)) - place
        return jnp.where(age < 0, age + size, age)

    def values(bits: Array) -> Array:
        return pltpu.bitcast(bits, jnp.bfloat16).astype(jnp.float32)

    def iota(shape: tuple[int, ...], axis: int) -> Array:
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

    fetch(row, slot).wait()
    copies = []
    for token in range(count):
        line = places[token] >> (ROWS.bit_length() - 1)
        about = joined(values(held[slot, line]), line * ROWS + iota((ROWS, 1), 0))
        lines[token] = pltpu.bitcast(about.astype(jnp.bfloat16), lines.dtype)
        copies.append(pltpu.make_async_copy(lines.at[token], rings.at[layer[0], row, line], written.at[token]))
        pl.when(token < fresh)(copies[-1].start)

    shape = (size // ROWS, ROWS, 1)
    place = iota(shape, 0) * ROWS + iota(shape, 1)
    every = joined(values(held[slot]), place)
    every = jnp.where(age_of(place) <= newest, every, 0.0)  # a place may hold an earlier row's key, or no number
    every = every.reshape(size, -1).astype(jnp.bfloat16)
    logits = jax.lax.dot_general(queries[...], every, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    age, seen = age_of(iota((1, size), 1)), []
    for token in range(count):
        before = age - (fresh - 1 - token)  # tokens between the key and the query
        own = (before >= 0) & (before <= past) & (age <= newest)
        seen.append(jnp.broadcast_to(own.astype(jnp.int32), (heads, size)))
    visible = jnp.concatenate(seen, axis=0) > 0
    logits = jnp.where(visible, logits * scale, MASKED)
    largest = jnp.max(logits, axis=1, keepdims=True)
    shares = jnp.where(visible, jnp.exp(logits - largest), 0.0)
    amount = jnp.sum(shares, axis=1, keepdims=True)
    out[:, : every.shape[1]] = jnp.dot(shares.astype(jnp.bfloat16), every, preferred_element_type=jnp.float32)
    out[:, every.shape[1] :] = statistics(largest, amount)
    for token, copy in enumerate(copies):
        pl.when(token < fresh)(copy.wait)
