"""Experts on many rows and their gradients, for TPUs: grouped products of rows sorted by expert.

    gate, up = x . w1[e]^T, x . w3[e]^T      hidden = scale * swiglu(gate, up)      out = hidden . w2[e]^T

Forward it is two kernels, of the hidden activations and of the outputs. Backward nothing is kept but the operands: one
kernel takes gate, up and the gradient of `hidden` in one visit and writes what all others need, rounded to bfloat16:

    _activations            x, d out, w1, w3, w2     ->  hidden, d gate, d up, d scale
    _products               d gate, d up, w1, w3     ->  d x = d gate . w1 + d up . w3
    _gradients_of_weights   x, d gate, d up          ->  d w1 = d gate^T . x, d w3 = d up^T . x
                            hidden, d out            ->  d w2 = d out^T . hidden

A visit is a pair of a group and a tile of rows that share rows (`grouped_matmul/visits.py`). Where rows are the results
the grid is (tiles of their columns, visits): a weight tile spans all that is summed over, and successive visits by a
group find it already there. Where weights are, visits come innermost, and a tile of a weight's gradient adds up in VMEM
over all rows of its group, in float32, and is written once. Rows that no group has are not computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.block_scales import LANES
from v4_jax.kernels.grouped_matmul.visits import Visits, list_visits
from v4_jax.kernels.turns import about
from v4_jax.low_rank import Adapted
from v4_jax.number_formats import BlockScaled

ROWS = (128, 256)  # rows of a tile: when groups are small, and when they are several tiles each
WEIGHT_BYTES = 12 << 20  # of tiles of weights, of which two each are in VMEM at a time
STRIPS = (512, 256)  # columns of the results at a time: of up to two products, and of more, whose code is longer
SUMMED_STRIP = 1024  # rows of a weight's gradient at a time
SUMMED_ROWS = 512  # rows of a tile that weights' gradients are summed over, when groups are several tiles each
TILE = 1024  # of a weight's gradient: 4 MiB of float32, of which there may be two, two each
VMEM_BYTES = 56 << 20  # of the 64 MiB or more that every generation from v5e on has


def supports(rows: Array, weights: Sequence[Any]) -> bool:
    """Whether rows [M, D] and weights w1, w3 and w2 are such as `forward` takes."""
    if any(
        isinstance(weight, Adapted | BlockScaled) or weight.dtype not in (jnp.bfloat16, jnp.float32)
        for weight in weights
    ):
        return False
    return rows.dtype == jnp.bfloat16 and not any(size % LANES for size in weights[0].shape[-2:])


def forward(
    rows: Array, scale: Array, weights: Sequence[Array], sizes: Array, *, limit: float, interpret: bool = False
) -> Array:
    """Applies to each row the expert of its group.

    Args:
      rows: [M, D] bfloat16, sorted by group.
      scale: [M] float32 what the hidden activations are weighted by.
      weights: w1 and w3 [G, H, D], and w2 [G, D, H], bfloat16, or float32 that is rounded to it. D and H are multiples
        of 128.
      sizes: [G] int32 rows of each group; their sum is at most M, and rows beyond it come out as zeros.
      limit: bound of the activations.
      interpret: run in interpret mode, on any platform.

    Returns:
      [M, D] bfloat16. Its gradients are `gradients`.
    """
    _check(rows, scale, weights, sizes)
    count, (x, scale) = rows.shape[0], _whole((rows, scale))
    w1, w3, w2 = map(_in_bfloat16, weights)
    run = _Run(sizes, x.shape[0], interpret)
    (hidden,) = run.by_rows(
        "experts_hidden",
        [x],
        [_Product(0, w1, 1), _Product(0, w3, 1)],
        functools.partial(_hidden, limit=limit),
        results=1,
        scale=scale,
    )
    (out,) = run.by_rows("experts_out", [hidden], [_Product(0, w2, 1)], _sum, results=1, zeros=True)
    return out[:count]


def gradients(
    rows: Array,
    scale: Array,
    weights: Sequence[Array],
    sizes: Array,
    gradient: Array,
    *,
    limit: float,
    interpret: bool = False,
) -> tuple[Array, Array, list[Array]]:
    """Gradients of `forward`.

    Args:
      rows: as for `forward`.
      scale: likewise.
      weights: likewise.
      sizes: likewise.
      gradient: [M, D] bfloat16 of the result.
      limit: bound of the activations.
      interpret: run in interpret mode, on any platform.

    Returns:
      Those of rows [M, D], scale [M] and weights, of their dtypes. Weights' are summed in float32.
    """
    _check(rows, scale, weights, sizes)
    count, (x, scale, of_out) = rows.shape[0], _whole((rows, scale, gradient))
    w1, w3, w2 = map(_in_bfloat16, weights)
    run = _Run(sizes, x.shape[0], interpret)
    hidden, of_gate, of_up, of_scale = run.by_rows(
        "experts_activations",
        [x, of_out],
        [_Product(0, w1, 1), _Product(0, w3, 1), _Product(1, w2, 0)],
        functools.partial(_activations, limit=limit),
        results=3,
        scale=scale,
        sums=True,
    )
    (of_x,) = run.by_rows(
        "experts_rows_gradient", [of_gate, of_up], [_Product(0, w1, 0), _Product(1, w3, 0)], _sum, results=1, zeros=True
    )
    of_w1, of_w3 = run.over_rows("experts_w1_w3_gradient", [of_gate, of_up], x)
    (of_w2,) = run.over_rows("experts_w2_gradient", [of_out], hidden)
    used = jnp.arange(x.shape[0]) < jnp.sum(sizes)
    of_weights = [g.astype(w.dtype) for g, w in zip((of_w1, of_w3, of_w2), weights, strict=True)]
    return of_x[:count], jnp.where(used, jnp.sum(of_scale, axis=(0, 1)), 0)[:count], of_weights


def _check(rows: Array, scale: Array, weights: Sequence[Array], sizes: Array) -> None:
    if not supports(rows, weights):
        raise NotImplementedError(
            f"rows {rows.dtype}{list(rows.shape)}, weights {[(w.dtype, w.shape) for w in weights]}: expected bfloat16 "
            f"rows, bfloat16 or float32 weights, and their last two axes multiples of {LANES}"
        )
    (count, depth), (groups, hidden, _) = rows.shape, weights[0].shape
    expected = [(groups, hidden, depth)] * 2 + [(groups, depth, hidden)]
    if [w.shape for w in weights] != expected or scale.shape != (count,) or sizes.shape != (groups,):
        raise ValueError(
            f"rows {rows.shape}, scale {scale.shape} and sizes {sizes.shape} do not fit {[w.shape for w in weights]}"
        )


def _whole(arrays: Sequence[Array]) -> list[Array]:
    """The arrays with rows in multiples of the lanes, in which `scale` comes."""
    padding = -arrays[0].shape[0] % LANES
    return [jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) if padding else x for x in arrays]


def _in_bfloat16(weight: Array) -> Array:
    """A weight rounded by its bits.

    Where the TPU compiler sees a conversion, it rounds the weights of all layers ahead of the loop over them, and keeps
    what comes of it: half as many bytes as the masters of all experts.
    """
    if weight.dtype == jnp.bfloat16:
        return weight
    bits = jax.lax.bitcast_convert_type(weight, jnp.uint32)
    to_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return jax.lax.bitcast_convert_type(to_even.astype(jnp.uint16), jnp.bfloat16)


def _activation(gate: Array, up: Array, limit: float) -> Array:
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def _rounded(x: Array) -> Array:
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def _sum(products: Sequence[Array], scale: Any) -> tuple[list[Array], None]:
    del scale
    return [functools.reduce(jnp.add, products)], None


def _hidden(products: Sequence[Array], scale: Array, *, limit: float) -> tuple[list[Array], None]:
    gate, up = map(_rounded, products)
    return [_activation(gate, up, limit) * scale], None


def _activations(products: Sequence[Array], scale: Array, *, limit: float) -> tuple[list[Array], Array]:
    """Hidden activations and the gradients of gate and up, and what each row's gradient of the scale is the sum of."""
    gate, up = map(_rounded, products[:2])
    active, pull = jax.vjp(functools.partial(_activation, limit=limit), gate, up)
    of_hidden = products[2]
    return [active * scale, *pull(of_hidden * scale)], of_hidden * active


class _Product(NamedTuple):
    """One of the products of a visit: rows times their group's weight [G, N, K], or its transpose.

    Attributes:
      rows: number of the rows among the kernel's.
      weight: the weight.
      along: its axis that is summed over, of 0 and 1; the other is the columns'.
    """

    rows: int
    weight: Array
    along: int

    @property
    def depth(self) -> int:
        """What is summed over."""
        return self.weight.shape[1 + self.along]

    @property
    def width(self) -> int:
        """Columns of the product."""
        return self.weight.shape[2 - self.along]


class _Run(NamedTuple):
    """Kernels over the same rows.

    Attributes:
      sizes: [G] rows of each group.
      length: rows.
      interpret: run in interpret mode.
    """

    sizes: Array
    length: int
    interpret: bool

    def by_rows(
        self,
        name: str,
        rows: Sequence[Array],
        products: Sequence[_Product],
        finish: Callable[..., tuple[list[Array], Array | None]],
        *,
        results: int,
        scale: Array | None = None,
        sums: bool = False,
        zeros: bool = False,
    ) -> list[Array]:
        """Products of rows and what comes of them, all of the same width N.

        Args:
          name: of the kernel.
          rows: [M, K] arrays.
          products: what of them is multiplied by what.
          finish: maps the float32 products [T, n] of a tile's rows and some columns, and the rows' scale [T, n], to
            the results, and what to sum over the columns, or None.
          results: how many.
          scale: [M] float32.
          sums: whether there is something to sum.
          zeros: whether rows of no group come out as zeros; else as anything.

        Returns:
          [M, N] bfloat16 each, and the sums as parts [n, 1, M] float32.
        """
        tile = ROWS[self.length // self.sizes.shape[0] >= 2 * ROWS[1]]
        width = products[0].width
        columns = _tile(width, WEIGHT_BYTES // (2 * sum(product.depth for product in products)))
        groups = self.sizes.shape[0]
        rest = (self.length - jnp.sum(self.sizes)).reshape(1)
        visits = list_visits(jnp.concatenate([self.sizes, rest]) if zeros else self.sizes, self.length, tile)

        def of_rows(depth: int) -> pl.BlockSpec:
            return pl.BlockSpec((tile, depth), lambda n, v, group, place, *_: (place[v], 0))

        def of_weight(product: _Product) -> pl.BlockSpec:
            shape = (columns, product.depth) if product.along else (product.depth, columns)

            def place(n: Any, v: Any, group: Any, *_: Any) -> Any:
                own = jnp.minimum(group[v], groups - 1)
                return (own, n, 0) if product.along else (own, 0, n)

            return pl.BlockSpec((None, *shape), place)

        by_row = pl.BlockSpec((1, tile), lambda n, v, group, place, *_: (0, place[v]))
        out = pl.BlockSpec((tile, columns), lambda n, v, group, place, *_: (place[v], n))
        out_shape = [jax.ShapeDtypeStruct((self.length, width), jnp.bfloat16)] * results
        out_specs = [out] * results
        if sums:
            out_shape.append(jax.ShapeDtypeStruct((width // columns, 1, self.length), jnp.float32))
            out_specs.append(pl.BlockSpec((None, 1, tile), lambda n, v, group, place, *_: (n, 0, place[v])))
        flops = 2 * self.length * width * sum(product.depth for product in products)
        traffic = 2 * self.length * (results * width + width // columns * sum(x.shape[1] for x in rows))
        return list(
            pl.pallas_call(
                functools.partial(
                    _by_rows,
                    of=[(product.rows, product.along) for product in products],
                    finish=finish,
                    scaled=scale is not None,
                    summed=sums,
                    groups=groups,
                ),
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=len(visits),
                    grid=(width // columns, visits.group.shape[0]),
                    in_specs=[
                        *([] if scale is None else [by_row]),
                        *[of_rows(x.shape[1]) for x in rows],
                        *map(of_weight, products),
                    ],
                    out_specs=out_specs,
                ),
                out_shape=out_shape,
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
                ),
                cost_estimate=pl.CostEstimate(
                    flops=flops,
                    bytes_accessed=traffic + 2 * sum(product.weight.size for product in products),
                    transcendentals=0 if scale is None else self.length * width,
                ),
                interpret=self.interpret,
                name=name,
            )(
                *visits,
                *([] if scale is None else [scale[None]]),
                *rows,
                *(product.weight for product in products),
            )
        )

    def over_rows(self, name: str, left: Sequence[Array], right: Array) -> list[Array]:
        """Sums over each group's rows: left^T . right, for each of some arrays.

        Args:
          name: of the kernel.
          left: [M, A] arrays.
          right: [M, B].

        Returns:
          [G, A, B] float32 each.
        """
        groups, (high, wide) = self.sizes.shape[0], (left[0].shape[1], right.shape[1])
        many = self.length // groups >= 2 * SUMMED_ROWS
        tile = SUMMED_ROWS if many else ROWS[0]
        visits = list_visits(self.sizes, self.length, tile, least=1)
        a, b = _tile(high, TILE * (3 - len(left))), _tile(wide, TILE)
        spec_a = pl.BlockSpec((tile, a), lambda i, j, v, group, place, *_: (place[v], i))
        spec_b = pl.BlockSpec((tile, b), lambda i, j, v, group, place, *_: (place[v], j))
        spec_out = pl.BlockSpec((None, a, b), lambda i, j, v, group, place, *_: (group[v], i, j))
        return list(
            pl.pallas_call(
                _over_rows,
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=len(visits),
                    grid=(high // a, wide // b, visits.group.shape[0]),
                    in_specs=[*[spec_a] * len(left), spec_b],
                    out_specs=[spec_out] * len(left),
                ),
                out_shape=[jax.ShapeDtypeStruct((groups, high, wide), jnp.float32)] * len(left),
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
                ),
                cost_estimate=pl.CostEstimate(
                    flops=2 * self.length * len(left) * high * wide,
                    bytes_accessed=2 * self.length * (len(left) * high * (wide // b) + wide * (high // a))
                    + 4 * groups * len(left) * high * wide,
                    transcendentals=0,
                ),
                interpret=self.interpret,
                name=name,
            )(*visits, *left, right)
        )


def _tile(size: int, most: int) -> int:
    """The largest multiple of 128 up to `most`, at least that, which divides a size."""
    return next(n for n in range(max(most // LANES, 1) * LANES, 0, -LANES) if size % n == 0)


def _by_rows(*refs: Any, of: Sequence[tuple[int, int]], finish: Any, scaled: bool, summed: bool, groups: int) -> None:
    """A visit: of one tile of rows, all columns of a tile of the weights. `of`: each product's rows and `along`."""
    visits, left = Visits(*refs[: len(Visits._fields)]), list(refs[len(Visits._fields) :])
    scale = left.pop(0) if scaled else None
    rows = [left.pop(0) for _ in range(1 + max(number for number, _ in of))]
    weights, out = left[: len(of)], left[len(of) :]
    sums = out.pop() if summed else None
    visit = pl.program_id(1)
    tile, columns = out[0].shape
    strip = math.gcd(columns, STRIPS[len(of) > 2])
    mine = visits.own(visit, (tile, 1))

    def put(here: Any, values: Sequence[Array]) -> None:
        for ref, value in zip(out, values, strict=True):
            ref[:, here] = jnp.where(mine, value.astype(ref.dtype), ref[:, here])

    def each_strip(i: Any, total: Any) -> Any:
        here = pl.ds(pl.multiple_of(i * strip, strip), strip)
        found = []
        for (number, along), weight in zip(of, weights, strict=True):
            part = weight[here, :] if along else weight[:, here]
            dimensions = (((1,), (along,)), ((), ()))
            found.append(jax.lax.dot_general(rows[number][...], part, dimensions, preferred_element_type=jnp.float32))
        values, parts = finish(found, None if scale is None else _in_lanes(scale[...], strip))
        put(here, values)
        if parts is None:
            return total
        return total + functools.reduce(jnp.add, (parts[:, k : k + LANES] for k in range(0, strip, LANES)))

    def multiply() -> None:
        nothing = None if sums is None else jnp.zeros((tile, LANES), jnp.float32)
        total = jax.lax.fori_loop(0, columns // strip, each_strip, nothing)
        if sums is not None:
            sums[...] = jnp.where(visits.own(visit, (1, tile)), jnp.sum(total.T, axis=0, keepdims=True), sums[...])

    def clear() -> None:
        put(slice(None), [jnp.zeros((tile, columns), jnp.float32)] * len(out))

    with about(1):
        pl.when((visit < visits.total[0]) & (visits.group[visit] < groups))(multiply)
    with about(0):
        pl.when(visits.group[visit] >= groups)(clear)


def _in_lanes(row: Array, width: int) -> Array:
    """[1, T] -> [T, width], the same in all lanes."""
    column = jnp.broadcast_to(row, (LANES, row.shape[1])).T
    return jnp.concatenate([column] * (width // LANES), axis=1)


def _over_rows(*refs: Any) -> None:
    """A visit: adds one tile of rows to a tile of its group's sums."""
    visits, refs = Visits(*refs[: len(Visits._fields)]), refs[len(Visits._fields) :]
    several = len(refs) // 2
    left, right, out = refs[:several], refs[several], refs[several + 1 :]
    visit = pl.program_id(2)
    tile, high = left[0].shape
    strip = math.gcd(high, SUMMED_STRIP)

    def clear() -> None:
        for total in out:
            total[...] = jnp.zeros(total.shape, total.dtype)

    def add() -> None:
        mine = visits.own(visit, (tile, 1))
        values = jnp.where(mine, right[...], 0)

        def each_strip(i: Any, carry: None) -> None:
            here = pl.ds(pl.multiple_of(i * strip, strip), strip)
            for some, total in zip(left, out, strict=True):
                own = jnp.where(mine, some[:, here], 0)
                dimensions = (((0,), (0,)), ((), ()))
                total[here, :] += jax.lax.dot_general(own, values, dimensions, preferred_element_type=jnp.float32)
            return carry

        jax.lax.fori_loop(0, high // strip, each_strip, None)

    with about(0):  # a group has many tiles
        pl.when((visit == 0) | (visits.group[visit] != visits.group[jnp.maximum(visit - 1, 0)]))(clear)
    with about(1):
        pl.when(visit < visits.total[0])(add)
