"""Gradients of the boundary between two sublayers as TPU kernels: two of the streams, one of the few numbers between.

    of the new streams    d s_k = d new_k + before_k d c + W_k^T q + n s_k
    of the old ones       d x_j = sum_k share_jk d s_k        d output = sum_k after_k d s_k

where c is the collapsed sum, W the projection, and q and n what its result and its RMS pass on. The first kernel goes
back through norm and sum, to d c and what reaches the gates; a small one goes back through gates and Sinkhorn's
iteration, on 24 numbers a token; the last writes the streams' gradients, and adds up those of the projection in VMEM.
Streams are read once by each. Gradients add up in float32 and are rounded to the streams' dtype once.

Tokens lie on sublanes throughout. Float32 factors of the streams' products are cut into bfloat16 parts: three for sums
over tokens or channels, and two for `W^T q`, whose result is rounded to bfloat16.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.hyper_connections import tpu
from v4_jax.kernels.hyper_connections.reference import Numbers, Site, factors, opened
from v4_jax.kernels.hyper_connections.tpu import LANES, by_chunks, by_lane, squares_by_lane

BLOCKS = (128, 64, 32, 16)  # tokens at a time
NARROW = (256, 128)  # channels at a time, where there are many arrays of them
BLOCK_BYTES = 44 << 20  # of a block's inputs and outputs, two each
VMEM_BYTES = 52 << 20  # of the 64 MiB or more that every generation from v5e on has

_LAST = (((1,), (1,)), ((), ()))  # contracts the last axes of both
_FIRST = (((0,), (0,)), ((), ()))  # and the first
_INNER = (((1,), (0,)), ((), ()))


def supports(streams: Array, numbers: Numbers) -> bool:
    """Whether there are kernels for streams [B, S, hc * D]: those of `tpu`, and whole blocks of tokens."""
    return tpu.supports(streams, numbers) and not streams.shape[0] * streams.shape[1] % BLOCKS[0]


@functools.partial(jax.jit, static_argnames=("numbers", "interpret"))
def enter(
    streams: Array, site: Site, gradient: tuple[Array, Array, Array], numbers: Numbers, *, interpret: bool = False
) -> tuple[Array, Site]:
    """Gradients of `reference.enter` for its streams and site, from those of its results."""
    of_same, of_y, of_mix = gradient
    entered = _entered(streams, site, of_y, of_mix, numbers, interpret)
    of_streams, of_weight = _spread(streams, of_same, entered, None, numbers, interpret)
    return of_streams, entered.of_site(site, of_weight)


@functools.partial(jax.jit, static_argnames=("numbers", "interpret"))
def leave(
    streams: Array, output: Array, mix: Array, gradient: Array, numbers: Numbers, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """Gradients of `reference.leave` for its streams, output and mix."""
    found = _spread(None, gradient, None, (streams, output, mix), numbers, interpret)
    return found[0], found[1], found[2]


@functools.partial(jax.jit, static_argnames=("numbers", "interpret"))
def cross(
    streams: Array,
    output: Array,
    mix: Array,
    site: Site,
    gradient: tuple[Array, Array, Array],
    numbers: Numbers,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Site]:
    """Gradients of `reference.cross` for all its arrays. The new streams are computed again."""
    of_new, of_y, of_mix = gradient
    new = tpu.leave(streams, output, mix, numbers, interpret=interpret)
    entered = _entered(new, site, of_y, of_mix, numbers, interpret)
    found = _spread(new, of_new, entered, (streams, output, mix), numbers, interpret)
    return found[0], found[1], found[2], entered.of_site(site, found[3])


class _Entered(NamedTuple):
    """What a site's results pass back to the streams that they come from, T tokens.

    Attributes:
      of_sum: [T, D] gradient of the collapsed sum.
      of_projection: [T, M] float32 q.
      columns: [T, hc + 1] float32 shares of the streams in the sum, and n.
      weight: [M, hc * D] the projection.
      others: gradients of base, scale and norm.
    """

    of_sum: Array
    of_projection: Array
    columns: Array
    weight: Array
    others: tuple[Array, Array, Array]

    def of_site(self, site: Site, of_weight: Array) -> Site:
        """The gradients of the site's parameters, in their dtypes."""
        return Site(*(g.astype(x.dtype) for g, x in zip((of_weight, *self.others), site, strict=True)))


def _parts(x: Array, count: int) -> list[Array]:
    """Float32 as a sum of bfloat16 numbers. A conversion there and back is no rounding that the compiler must keep."""
    found = []
    for _ in range(count):
        rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        found.append(rounded.astype(jnp.bfloat16))
        x = x - rounded
    return found


def _block(tokens: int, per_token: int) -> int:
    """Tokens of a block, of which each has so many bytes."""
    return next((size for size in BLOCKS if 2 * size * per_token <= BLOCK_BYTES and not tokens % size), BLOCKS[-1])


def _by_token(block: int, width: int, steps: int = 0) -> pl.BlockSpec:
    """Blocks of tokens, along a grid of (shares, `steps`) where there are steps."""
    return pl.BlockSpec((block, width), lambda i, *j: (i * steps + j[0] if j else i, 0))


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape), pipeline_mode=pl.Buffered(1))


# ---- back through norm and sum ---------------------------------------------------------------------------------------


def _entered(streams: Array, site: Site, of_y: Array, of_mix: Array, numbers: Numbers, interpret: bool) -> _Entered:
    (batch, size, width), hc = streams.shape, numbers.streams
    tokens, channels, count = batch * size, width // hc, site.weight.shape[0]
    weight, base, scale = (x.astype(jnp.float32) for x in site[:3])
    factor = factors(scale, numbers)
    block = _block(tokens, 2 * (width + 2 * channels))
    blocks = tokens // block
    of_sum, columns, of_norm = pl.pallas_call(
        functools.partial(_back_to_sum, numbers=numbers),
        grid=(blocks,),
        in_specs=[
            _by_token(block, width),
            _by_token(block, channels),
            _whole((3 * count, width)),
            _whole((2, count)),
            _whole((1, channels)),
        ],
        out_specs=[
            _by_token(block, channels),
            _by_token(block, count + 1 + hc),
            pl.BlockSpec((None, 1, channels), lambda i: (i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((tokens, channels), streams.dtype),
            jax.ShapeDtypeStruct((tokens, count + 1 + hc), jnp.float32),
            jax.ShapeDtypeStruct((blocks, 1, channels), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=6 * tokens * count * width,
            bytes_accessed=2 * tokens * (width + 2 * channels) + 6 * count * width,
            transcendentals=0,
        ),
        interpret=interpret,
        name="collapse_gradients",
    )(
        streams.reshape(tokens, width),
        of_y.reshape(tokens, channels),
        jnp.concatenate(_parts(weight, 3)),
        jnp.stack([factor, base]),
        site.norm.astype(jnp.float32)[None],
    )
    mixes, rms, of_before = columns[:, :count].T, columns[:, count], columns[:, count + 1 :].T
    gates = mixes * factor[:, None] + base[:, None]
    before, of_gates = _shut(gates, of_before, of_mix.astype(jnp.float32).reshape(-1, tokens), numbers, interpret)
    of_mixes, of_factor = of_gates * factor[:, None], jnp.sum(of_gates * mixes, axis=1)
    along = -jnp.sum(of_mixes * mixes, axis=0) * rms * rms / width
    of_scale = jnp.stack([jnp.sum(part) for part in jnp.split(of_factor, (hc, 2 * hc))])
    return _Entered(
        of_sum,
        (of_mixes * rms).T,
        jnp.concatenate([before, along[None]]).T,
        weight,
        (jnp.sum(of_gates, axis=1), of_scale, jnp.sum(of_norm, axis=(0, 1))),
    )


def _shut(gates: Array, of_before: Array, of_mix: Array, numbers: Numbers, interpret: bool) -> tuple[Array, Array]:
    """Back through `reference.opened`: its first result [hc, T], and the gradients of gates [M, T]; T fills lanes."""
    tokens = gates.shape[1] // LANES

    def in_registers(x: Array) -> Array:
        return x.reshape(-1, tokens, LANES)

    given = [in_registers(x) for x in (gates, of_before, of_mix)]
    block = next(size for size in (8, 4, 2, 1) if tokens % size == 0)
    specs = [pl.BlockSpec((len(x), block, LANES), lambda i: (0, i, 0)) for x in given]
    out = pl.pallas_call(
        functools.partial(_through_gates, numbers=numbers),
        grid=(tokens // block,),
        in_specs=specs,
        out_specs=[specs[1], specs[0]],
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (given[1], given[0])],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=12 * gates.nbytes // 4, transcendentals=0),
        interpret=interpret,
        name="gates_gradients",
    )(*given)
    before, of_gates = (x.reshape(len(x), -1) for x in out)
    return before, of_gates


def _through_gates(gates: Any, of_before: Any, of_mix: Any, before: Any, of_gates: Any, *, numbers: Numbers) -> None:
    """Refs: [M, 8, 128] gates, and gradients of what they let through; the streams' shares, and gradients of gates."""
    (shares, _), pull = jax.vjp(lambda x: opened(x, numbers, _unrolled), gates[...])
    before[...] = shares
    (of_gates[...],) = pull((of_before[...], of_mix[...]))


def _unrolled(step: Any, carry: Any, xs: Any = None, length: int = 0, reverse: bool = False) -> tuple[Any, list[Any]]:
    """`jax.lax.scan` as a loop of Python's, whose results are lists: kernels have no stacks of arrays."""
    found = []
    for x in [None] * length if xs is None else xs[:: -1 if reverse else 1]:
        carry, y = step(carry, x)
        found.append(y)
    return carry, found


def _back_to_sum(
    streams: Any,
    of_y: Any,
    weight: Any,
    lines: Any,
    norm: Any,
    of_sum: Any,
    columns: Any,
    of_norm: Any,
    *,
    numbers: Any,
) -> None:
    """A block of tokens.

    Refs: streams [T, hc * D], gradient of the site's input [T, D], the projection's parts [3 M, hc * D], factor and
    base of its results [2, M], norm [1, D]; gradient of the sum [T, D], columns [T, M + 1 + hc] (results of the
    projection, the streams' inverse RMS, gradients of their shares), gradient of the norm [1, D].
    """
    (tokens, width), channels, hc = streams.shape, of_y.shape[1], numbers.streams
    count = lines.shape[1]

    def project(here: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, squares = carry
        x = streams[:, here(0)]
        total += jax.lax.dot_general(x, weight[:, here(0)], _LAST, preferred_element_type=jnp.float32)
        return total, squares + squares_by_lane(x)

    nothing = jnp.zeros((tokens, LANES), jnp.float32)
    total, squares = by_chunks(width, project, (jnp.zeros((tokens, 3 * count), jnp.float32), nothing))
    rms = jax.lax.rsqrt(jnp.sum(squares, axis=1, keepdims=True) / width + numbers.norm_eps)
    mixes = (total[:, :count] + total[:, count : 2 * count] + total[:, 2 * count :]) * rms
    columns[:, :count] = mixes
    columns[:, count : count + 1] = rms
    before = jax.nn.sigmoid((mixes * lines[:1] + lines[1:])[:, :hc]) + numbers.eps

    def collapse(here: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        squares, along = carry
        terms = (before[:, j : j + 1] * streams[:, here(j)].astype(jnp.float32) for j in range(hc))
        value = functools.reduce(jnp.add, terms).astype(of_sum.dtype)
        of_sum[:, here(0)] = value  # what its gradient will stand in the place of
        wide = value.astype(jnp.float32)
        return squares + squares_by_lane(value), along + by_lane(
            of_y[:, here(0)].astype(jnp.float32) * norm[:, here(0)] * wide
        )

    squares, along = by_chunks(channels, collapse, (nothing, nothing))
    scale = jax.lax.rsqrt(jnp.sum(squares, axis=1, keepdims=True) / channels + numbers.norm_eps)
    along = jnp.sum(along, axis=1, keepdims=True) * scale / channels

    def pull(here: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        value, gradient = of_sum[:, here(0)].astype(jnp.float32) * scale, of_y[:, here(0)].astype(jnp.float32)
        of_norm[:, here(0)] = jnp.sum(gradient * value, axis=0, keepdims=True)
        own = (scale * (gradient * norm[:, here(0)] - value * along)).astype(of_sum.dtype)
        of_sum[:, here(0)] = own
        wide = own.astype(jnp.float32)
        return tuple(sums + by_lane(wide * streams[:, here(j)].astype(jnp.float32)) for j, sums in enumerate(carry))

    for j, sums in enumerate(by_chunks(channels, pull, (nothing,) * hc)):
        columns[:, count + 1 + j : count + 2 + j] = jnp.sum(sums, axis=1, keepdims=True)


# ---- to the streams --------------------------------------------------------------------------------------------------


def _spread(
    new: Array | None,
    of_new: Array | None,
    entered: _Entered | None,
    left: tuple[Array, Array, Array] | None,
    numbers: Numbers,
    interpret: bool,
) -> list[Array]:
    """Gradients of streams, through what was made of them.

    Args:
      new: [B, S, hc * D] the streams that a site collapsed, where one did.
      of_new: [B, S, hc * D] gradient that reaches them otherwise, if any does.
      entered: what the site passes back to them.
      left: streams, output and mix from which they came; None where gradients end with them.
      numbers: of the architecture.
      interpret: run in interpret mode.

    Returns:
      Gradients of streams, [output, mix,] [and the projection].
    """
    given = new if of_new is None else of_new
    assert given is not None
    (batch, size, width), hc = given.shape, numbers.streams
    tokens, channels = batch * size, width // hc
    wide = sum(x is not None for x in (new, of_new)) + (2 if left else 1)
    narrow = (entered is not None) + (2 if left else 0)
    block = _block(tokens, 2 * (wide * width + narrow * channels))
    shares = 2 if tokens % (2 * block) == 0 else 1  # of the tokens: chips with two cores give each one of them
    steps = tokens // block // shares
    operands: list[Array] = []
    in_specs: list[pl.BlockSpec] = []
    shapes = [jax.ShapeDtypeStruct((tokens, width), given.dtype)]
    out_specs = [_by_token(block, width, steps)]
    scratch, flops = [], 0

    def add(x: Array) -> None:
        x = x.reshape(tokens, -1)
        operands.append(x)
        in_specs.append(_by_token(block, x.shape[1], steps))

    if of_new is not None:
        add(of_new)
    if left is not None:
        streams, output, mix = left
        add(streams)
        add(output)
        add(mix.reshape(-1, tokens).T)
        shapes += [
            jax.ShapeDtypeStruct((tokens, channels), output.dtype),
            jax.ShapeDtypeStruct((tokens, mix.shape[0]), jnp.float32),
        ]
        out_specs += [_by_token(block, channels, steps), _by_token(block, mix.shape[0], steps)]
        scratch.append(pltpu.VMEM((mix.shape[0], block, LANES), jnp.float32))
    if entered is not None and new is not None:
        count = entered.weight.shape[0]
        (a, b, c), (d, e) = _parts(entered.of_projection, 3), _parts(entered.weight, 2)
        padding = -4 * count % LANES
        weight = jnp.pad(jnp.concatenate([d, e, d, e]), [(0, padding), (0, 0)])
        add(new)
        add(entered.of_sum)
        add(entered.columns)
        add(jnp.pad(jnp.concatenate([a, a, b, b], axis=1), [(0, 0), (0, padding)]))
        add(jnp.concatenate([a, b, c], axis=1))
        operands.append(weight)
        in_specs.append(_whole(weight.shape))
        shapes.append(jax.ShapeDtypeStruct((shares, count, width), jnp.float32))
        out_specs.append(pl.BlockSpec((None, count, width), lambda i, j: (i, 0, 0)))
        flops = 2 * tokens * width * (7 * count + padding)
    arrays: list[Any] = [*operands, *shapes]
    moved = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    found = pl.pallas_call(
        functools.partial(
            _to_streams, hc=hc, given=of_new is not None, leaves=left is not None, enters=entered is not None
        ),
        grid=(shares, steps),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
        name="streams_gradients",
    )(*operands)
    results = [found[0].reshape(batch, size, width)]
    if left is not None:
        results += [found[1].reshape(batch, size, channels), found[2].T.reshape(-1, batch, size)]
    if entered is not None:
        results.append(jnp.sum(found[-1], axis=0))
    return results


def _to_streams(*refs: Any, hc: int, given: bool, leaves: bool, enters: bool) -> None:
    """A block of tokens; see `_spread` for what there is."""
    rest = iter(refs)

    def take(count: int, there: bool) -> list[Any]:
        return [next(rest) if there else None for _ in range(count)]

    (of_new,) = take(1, given)
    streams, output, mix = take(3, leaves)
    new, of_sum, columns, factors, parts, weight = take(6, enters)
    (of_streams,) = take(1, True)
    of_output, of_mix = take(2, leaves)
    (of_weight,) = take(1, enters)
    (sums,) = take(1, leaves)
    channels = of_streams.shape[1] // hc

    if leaves:
        sums[...] = jnp.zeros(sums.shape, sums.dtype)
    if enters:

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            of_weight[...] = jnp.zeros(of_weight.shape, of_weight.dtype)

    def of_stream(k: int, here: Any) -> Array:
        """The gradient of new stream k; adds its share of the projection's."""
        total: Any = of_new[:, here(k)].astype(jnp.float32) if given else 0.0
        if not enters:
            return total
        x = new[:, here(k)]
        count = of_weight.shape[0]
        product = jax.lax.dot_general(parts[...], x, _FIRST, preferred_element_type=jnp.float32)
        of_weight[:, here(k)] += product[:count] + product[count : 2 * count] + product[2 * count :]
        own = jax.lax.dot_general(factors[...], weight[:, here(k)], _INNER, preferred_element_type=jnp.float32)
        own += columns[:, k : k + 1] * of_sum[:, here(0)].astype(jnp.float32)
        own += columns[:, hc : hc + 1] * x.astype(jnp.float32)
        return total + own

    def body(here: Any, _: None) -> None:
        of_each = [of_stream(k, here) for k in range(hc)]
        if not leaves:
            for k, value in enumerate(of_each):
                of_streams[:, here(k)] = value.astype(of_streams.dtype)
            return
        value = output[:, here(0)].astype(jnp.float32)
        of_output[:, here(0)] = _weighted(mix, range(hc), of_each).astype(of_output.dtype)
        for k, own in enumerate(of_each):
            sums[k] += by_lane(value * own)
        for j in range(hc):
            places = range(hc + j * hc, 2 * hc + j * hc)
            of_streams[:, here(j)] = _weighted(mix, places, of_each).astype(of_streams.dtype)
            value = streams[:, here(j)].astype(jnp.float32)
            for place, own in zip(places, of_each, strict=True):
                sums[place] += by_lane(value * own)

    by_chunks(channels, body, chunks=NARROW, together=1)
    if leaves:
        for place in range(sums.shape[0]):
            of_mix[:, place : place + 1] = jnp.sum(sums[place], axis=1, keepdims=True)


def _weighted(columns: Any, places: Any, terms: list[Array]) -> Array:
    """Sum of terms [T, C], each times its column."""
    return functools.reduce(
        jnp.add, (columns[:, place : place + 1] * x for place, x in zip(places, terms, strict=True))
    )
