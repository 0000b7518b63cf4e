"""The boundary between two sublayers as one TPU kernel: write back, mix, project, Sinkhorn's iteration, collapse, norm.

A block of tokens' streams is read once and written once; all between stays on the chip. Tokens lie on lanes where each
has a few numbers (gates, Sinkhorn's matrices: as many operations for 128 tokens as for one), and on sublanes where it
has channels. A token's gates change sides by a product with the identity, which is exact and takes any number of them.

Streams are bfloat16 and the projection's weight is float32: it is cut into three bfloat16 parts, whose products with
bfloat16 are exact, so that the matrix unit computes as it would in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.hyper_connections.reference import Numbers, Site
from v4_jax.kernels.memory import kept_in_hbm
from v4_jax.kernels.vectors import vector, vector_spec
from v4_jax.layer_stack import one_layer, stack_of

LANES = 128
CHUNKS = (512, 256, 128)  # channels at a time, the largest that divides D
VMEM_SPARE = 24 << 20  # for what lies between a block's inputs and outputs
VMEM_MOST = 60 << 20  # of the 64 MiB or more that every generation from v5e on has

_ROWS = (((1,), (1,)), ((), ()))  # contracts the last axes of both
_FIRST = (((0,), (0,)), ((), ()))  # and the first


def supports(streams: Array, numbers: Numbers) -> bool:
    """Whether the kernel takes such streams [B, S, hc * D]: bfloat16, and D a multiple of 128."""
    return streams.dtype == jnp.bfloat16 and streams.shape[-1] % (numbers.streams * LANES) == 0


@functools.partial(jax.jit, static_argnames=("numbers", "interpret"))
def enter(streams: Array, site: Site, numbers: Numbers, *, interpret: bool = False) -> tuple[Array, Array, Array]:
    """See `reference.enter`, for streams that `supports` takes; not differentiable."""
    y, mix = _call(streams, None, None, site, numbers, interpret)
    return streams, y, mix


@functools.partial(jax.jit, static_argnames=("numbers", "interpret"))
def leave(streams: Array, output: Array, mix: Array, numbers: Numbers, *, interpret: bool = False) -> Array:
    """See `reference.leave`, likewise."""
    (new,) = _call(streams, output, mix, None, numbers, interpret)
    return new


@functools.partial(jax.jit, static_argnames=("numbers", "interpret"))
def cross(
    streams: Array, output: Array, mix: Array, site: Site, numbers: Numbers, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """See `reference.cross`, likewise."""
    new, y, after = _call(streams, output, mix, site, numbers, interpret)
    return new, y, after


def _call(
    streams: Array, output: Array | None, mix: Array | None, site: Site | None, numbers: Numbers, interpret: bool
) -> tuple[Array, ...]:
    """New streams, if an output is to be written back; and normed input and mix, if a site follows."""
    (batch, size, width), hc = streams.shape, numbers.streams
    tokens, channels, gates = batch * size, width // hc, hc + hc * hc
    block = min(tokens, LANES)

    def along(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((block, columns), lambda i, layer: (i, 0))

    def number(i: Any, layer: Any) -> Any:
        del i
        return layer[0]

    def matrix(stack: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *stack.shape[1:]), lambda i, layer: (layer[0], 0, 0), pipeline_mode=pl.Buffered(1))

    layer: Any = 0
    # A single token's gates lie on lanes, as the compiler has them between kernels: to turn them takes an operation.
    alone = tokens == 1
    mixes = (1, gates) if alone else (gates, tokens)
    of_tokens = pl.BlockSpec((1, gates) if alone else (gates, block), lambda i, layer: (0, i))
    operands, in_specs = [streams.reshape(tokens, width)], [along(width)]
    shapes, out_specs, flops, moved = [], [], 0, streams.nbytes
    if output is not None and mix is not None:
        operands += [output.reshape(tokens, channels), mix.reshape(mixes)]
        in_specs += [along(channels), of_tokens]
        shapes.append(jax.ShapeDtypeStruct((tokens, width), streams.dtype))
        out_specs.append(along(width))
        moved += streams.nbytes + output.nbytes
    if site is not None:
        layer = one_layer(site)
        operands[0], stacks = kept_in_hbm(operands[0], [stack_of(x)[0] for x in site], interpret=interpret)
        operands += stacks
        in_specs += [matrix(stacks[0]), *(vector_spec(stack, number) for stack in stacks[1:])]
        shapes += [
            jax.ShapeDtypeStruct((tokens, channels), streams.dtype),
            jax.ShapeDtypeStruct(mixes, jnp.float32),
        ]
        out_specs += [along(channels), of_tokens]
        size_of_weight = math.prod(site.weight.shape)
        flops, moved = 6 * tokens * size_of_weight, moved + streams.nbytes // hc + 4 * size_of_weight
    buffers = 2 * max(block, 16) * 2 * (width + channels) * 2 + (hc + gates) * width * 4
    vmem = min(VMEM_MOST, VMEM_SPARE + buffers)
    outputs = pl.pallas_call(
        functools.partial(_kernel, numbers=numbers, writes=output is not None, enters=site is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(pl.cdiv(tokens, block),), in_specs=in_specs, out_specs=out_specs
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=vmem),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
        name="hyper_connections",
    )(jnp.asarray(layer, jnp.int32).reshape(1), *operands)
    return tuple(x.reshape(-1, batch, size) if x.dtype == jnp.float32 else x.reshape(batch, size, -1) for x in outputs)


def _kernel(layer: Any, *refs: Any, numbers: Numbers, writes: bool, enters: bool) -> None:
    given, hc = iter(refs), numbers.streams
    old = next(given)
    if writes:
        output, mix = next(given), next(given)
    if enters:
        weight, base, scale, norm = next(given), next(given), next(given), next(given)
    streams = next(given) if writes else old
    if writes:
        _write_back(streams, old, output, mix[...] if mix.shape[0] == 1 else _turned(mix[...], _FIRST), hc)
    if enters:
        y, after = given
        mixes = _gated(
            _projected(streams, weight, numbers.norm_eps), vector(base, layer[0]), vector(scale, layer[0]), hc
        )
        before = jax.nn.sigmoid(mixes[:hc]) + numbers.eps
        doubly = _sinkhorn([mixes[i : i + 1] for i in range(2 * hc, len(mixes))], numbers)
        gates = jnp.concatenate([2 * jax.nn.sigmoid(mixes[hc : 2 * hc]), *doubly], axis=0)
        after[...] = _turned(gates, _FIRST) if after.shape[0] == 1 else gates
        _collapse(y, streams, _turned(before, _FIRST), lambda here: vector(norm, layer[0], here), numbers)


def _gated(mixes: Array, base: Array, scale: Array, hc: int) -> Array:
    """Rows of the projection [M, T] times their gating factors [1, 3], with their base [1, M] added."""
    shape = (mixes.shape[0], mixes.shape[0])
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    added = jnp.sum(jnp.where(row == column, base, 0.0), axis=1, keepdims=True)
    row = row[:, :1]
    factor = jnp.where(row < hc, scale[:, :1], jnp.where(row < 2 * hc, scale[:, 1:2], scale[:, 2:]))
    return mixes * factor + added


def by_chunks(
    channels: int,
    body: Callable[[Callable[[int], Any], Any], Any],
    carry: Any = None,
    *,
    chunks: tuple[int, ...] = CHUNKS,
    together: int = 8,
) -> Any:
    """Runs `body(here, carry)` on chunks of channels; `here(j)` are those of the j-th array that lies side by side.

    Args:
      channels: of each array.
      body: what is run.
      carry: what it is given first.
      chunks: sizes of a chunk, the first that divides the channels.
      together: chunks at most whose operations are mixed, so that one's work hides another's.
    """
    chunk = next(size for size in chunks if channels % size == 0)

    def step(i: Any, carry: Any) -> Any:
        return body(lambda j: pl.ds(pl.multiple_of(j * channels + i * chunk, chunk), chunk), carry)

    steps = channels // chunk
    unroll = next(count for count in range(together, 0, -1) if steps % count == 0)
    return jax.lax.fori_loop(0, steps, step, carry, unroll=unroll)


def _turned(x: Array, contracted: Any) -> Array:
    """[n, T] -> [T, n], exactly."""
    count = x.shape[0]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (count, count), axis) for axis in (0, 1))
    identity = (row == column).astype(jnp.float32)
    return jax.lax.dot_general(
        x, identity, contracted, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _write_back(new: Any, old: Any, output: Any, mix: Array, hc: int) -> None:
    def body(here: Callable[[int], Any], _: None) -> None:
        value = output[:, here(0)].astype(jnp.float32)
        streams = [old[:, here(j)].astype(jnp.float32) for j in range(hc)]
        for k in range(hc):
            total = mix[:, k : k + 1] * value
            for j in range(hc):
                total += mix[:, hc + j * hc + k : hc + j * hc + k + 1] * streams[j]
            new[:, here(k)] = total.astype(new.dtype)

    by_chunks(output.shape[1], body)


def _projected(streams: Any, weight: Any, eps: float) -> Array:
    """The projection [M, T] of streams [T, hc * D], divided by their joint RMS."""
    (tokens, width), rows = streams.shape, weight.shape[0]
    several = max(tokens, 2)  # a product with a single column would not go to the matrix unit

    def body(here: Callable[[int], Any], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, squares = carry
        x, rest = streams[:, here(0)], weight[:, here(0)]
        cut = []
        for _ in range(3):
            cut.append(rest.astype(jnp.bfloat16))
            rest = rest - cut[-1].astype(jnp.float32)
        columns = jnp.broadcast_to(x, (several, x.shape[1]))
        total += jax.lax.dot_general(jnp.concatenate(cut), columns, _ROWS, preferred_element_type=jnp.float32)
        return total, squares + squares_by_lane(x)

    nothing = jnp.zeros((3 * rows, several), jnp.float32), jnp.zeros((tokens, LANES), jnp.float32)
    total, squares = by_chunks(width, body, nothing)
    ones, highest = jnp.ones((8, LANES), jnp.float32), jax.lax.Precision.HIGHEST
    mean = jax.lax.dot_general(ones, squares, _ROWS, precision=highest, preferred_element_type=jnp.float32)[:1] / width
    total = total[:, :tokens]
    return (total[:rows] + total[rows : 2 * rows] + total[2 * rows :]) * jax.lax.rsqrt(mean + eps)


def squares_by_lane(x: Array) -> Array:
    """Sums of squares of [T, C], kept by lane: [T, 128]."""
    wide = x.astype(jnp.float32)
    return by_lane(wide * wide)


def by_lane(x: Array) -> Array:
    """Sums of [T, C], kept by lane: [T, 128]."""
    return functools.reduce(jnp.add, (x[:, lane : lane + LANES] for lane in range(0, x.shape[1], LANES)))


def _sinkhorn(logits: list[Array], numbers: Numbers) -> list[Array]:
    """See `reference.sinkhorn`: the matrix's entries, row by row, each [1, T]."""
    hc, eps = numbers.streams, numbers.eps
    rows = [[j * hc + k for k in range(hc)] for j in range(hc)]
    columns = [[j * hc + k for j in range(hc)] for k in range(hc)]

    def added(entries: list[Array], places: list[int]) -> Array:
        return functools.reduce(jnp.add, (entries[i] for i in places))

    def normalised(entries: list[Array], lines: list[list[int]]) -> list[Array]:
        result = list(entries)
        for places in lines:
            factor = 1 / (added(entries, places) + eps)
            for i in places:
                result[i] = entries[i] * factor
        return result

    matrix = list(logits)
    for places in rows:
        largest = functools.reduce(jnp.maximum, (logits[i] for i in places))
        for i in places:
            matrix[i] = jnp.exp(logits[i] - largest)
        factor = 1 / added(matrix, places)
        for i in places:
            matrix[i] = matrix[i] * factor + eps
    matrix = normalised(matrix, columns)

    def step(_: Any, entries: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(normalised(normalised(list(entries), rows), columns))

    return list(jax.lax.fori_loop(0, numbers.iterations - 1, step, tuple(matrix), unroll=True))


def _collapse(y: Any, streams: Any, before: Array, norm: Callable[[Any], Array], numbers: Numbers) -> None:
    """The streams' weighted sum, in their dtype, and normed."""
    tokens, channels = y.shape

    def add(here: Callable[[int], Any], squares: Array) -> Array:
        terms = (before[:, j : j + 1] * streams[:, here(j)].astype(jnp.float32) for j in range(numbers.streams))
        total = functools.reduce(jnp.add, terms).astype(y.dtype)
        y[:, here(0)] = total
        return squares + squares_by_lane(total)

    squares = by_chunks(channels, add, jnp.zeros((tokens, LANES), jnp.float32))
    scale = jax.lax.rsqrt(jnp.sum(squares, axis=1, keepdims=True) / channels + numbers.norm_eps)

    def normalise(here: Callable[[int], Any], _: None) -> None:
        y[:, here(0)] = (y[:, here(0)].astype(jnp.float32) * scale * norm(here(0))).astype(y.dtype)

    by_chunks(channels, normalise)
