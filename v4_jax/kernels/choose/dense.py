"""Products with dense weights, what follows them, and the streams between sublayers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.kernels.choose.forms import Form, pull, with_gradients, without_gradients
from v4_jax.kernels.hyper_connections import gradients as hyper_connections_gradients
from v4_jax.kernels.hyper_connections import reference as hyper_connections
from v4_jax.kernels.hyper_connections import tpu as hyper_connections_tpu
from v4_jax.kernels.hyper_connections.reference import Numbers, Site
from v4_jax.kernels.linear import cpu as linear_cpu
from v4_jax.kernels.linear import groups as linear_groups
from v4_jax.kernels.linear import reference as linear
from v4_jax.kernels.linear import shares as linear_shares
from v4_jax.kernels.linear import tpu as linear_tpu
from v4_jax.kernels.newton_schulz import reference as newton_schulz
from v4_jax.kernels.newton_schulz import tpu as newton_schulz_tpu
from v4_jax.kernels.rotary import gradients as rotary_gradients
from v4_jax.kernels.rotary import parts as rotary_parts
from v4_jax.kernels.rotary import reference as rotary
from v4_jax.kernels.rotary import tpu as rotary_tpu
from v4_jax.kernels.rotary.reference import Projection, Settle, Steps
from v4_jax.layer_stack import Cut, uncut
from v4_jax.layers.rotary import Turn
from v4_jax.number_formats import BlockScaled, Weight, dequantise
from v4_jax.sharding.platform import by_platform, interpreting, platform_of_mesh


def matmul(x: Array, weight: Array, dtype: Any) -> Array:
    """See `linear.reference.matmul`."""
    plain = functools.partial(linear.matmul, dtype=dtype)
    if x.size == x.shape[-1]:
        return without_gradients(plain, tpu=functools.partial(linear_tpu.one_row, dtype=dtype))(x, weight)
    if x.ndim != 2:
        return plain(x, weight)
    return with_gradients(plain, cpu=functools.partial(linear_cpu.matmul_gradients, dtype=dtype))(x, weight)


def newton_schulz_step(y: Array, coefficients: Array) -> Array:
    """See `newton_schulz.reference.step`. It has no gradients on TPUs."""
    if not newton_schulz_tpu.supports(y):
        return newton_schulz.step(y, coefficients)
    kernels = functools.partial(newton_schulz_tpu.step, interpret=interpreting())
    return by_platform(y, coefficients, default=newton_schulz.step, tpu=kernels)


def products_with(x: Array, weights: Sequence[Weight], dtype: Any) -> list[Array]:
    """[..., in] times each of several [out, in] weights that may be block-scaled: [..., out] of `dtype` each.

    In programs for TPUs all block-scaled ones go in one call of the kernel.
    """

    def plain(x: Array, weights: Sequence[Weight]) -> list[Array]:
        return [matmul(x, _expanded(weight, dtype), dtype) for weight in weights]

    def kernel(x: Array, weights: Sequence[Any]) -> list[Array]:
        out = linear_tpu.matmul(x.astype(dtype).reshape(-1, x.shape[-1]), weights, interpret=interpreting())
        ends = itertools.accumulate(weight.shape[0] for weight in weights)
        parts = jnp.split(out, list(ends)[:-1], axis=1)
        return [part.reshape(*x.shape[:-1], -1) for part in parts]

    if not all(linear_tpu.supports(weight, dtype) for weight in weights):
        return plain(x, weights)
    return without_gradients(plain, tpu=kernel)(x, list(weights))


def partial_products(x: Array, weights: Sequence[Any], dtypes: Sequence[Any], share: Any, devices: int) -> Array:
    """See `linear.reference.partial_products`."""
    plain = functools.partial(linear.partial_products, devices=devices, dtypes=dtypes)
    if not linear_shares.supports(x, weights, dtypes, devices):
        return plain(x, list(weights), share)
    kernel = functools.partial(linear_shares.partial_products, devices=devices, interpret=interpreting())
    return without_gradients(plain, tpu=kernel)(x, list(weights), share)


def grouped_product(x: Array, weight: Weight, dtype: Any) -> Array:
    """See `linear.reference.grouped`; the weight may be block-scaled."""

    def plain(x: Array, weight: Weight) -> Array:
        return linear.grouped(x, _expanded(weight, dtype), dtype)

    if not isinstance(weight, BlockScaled | Cut) and linear_groups.supports(x, weight, dtype):
        return _product_of_groups(plain, x, weight, dtype)

    def kernel(x: Array, weight: Any) -> Array:
        *leading, groups, size = x.shape
        out = linear_tpu.matmul(
            x.astype(dtype).reshape(-1, groups * size), [weight], groups=groups, interpret=interpreting()
        )
        return out.reshape(*leading, groups, -1)

    if not linear_tpu.supports(weight, dtype, x.shape[-2]):
        return plain(x, weight)
    return without_gradients(plain, tpu=kernel)(x, weight)


def _product_of_groups(plain: Form, x: Array, weight: Array, dtype: Any) -> Array:
    """`grouped_product` of a plain weight, whose own gradient XLA makes as fast as a kernel would.

    Not of one that lies in the stack of all layers: to cut it out for a kernel takes longer than the kernel saves.
    """

    def kernel(x: Array, weight: Array) -> Array:
        return linear_groups.product(x.astype(dtype), weight.astype(dtype), interpret=interpreting())

    def gradients(operands: Any, gradient: Array) -> Any:
        x, weight = operands
        of_x = linear_groups.gradient_of_rows(gradient, weight.astype(dtype), interpret=interpreting())
        (of_weight,) = jax.vjp(functools.partial(plain, x), weight)[1](gradient)
        return of_x.astype(x.dtype), of_weight

    call = functools.partial(by_platform, default=plain, tpu=kernel)
    return with_gradients(call, default=pull(plain), tpu=gradients)(x, weight)


def _expanded(weight: Weight, dtype: Any) -> Array:
    """A plain weight as it is: the product casts it, or need not."""
    return dequantise(weight, dtype) if isinstance(weight, BlockScaled) else uncut(weight)


def norm_rotate(x: Array, weight: Array | None, turn: Turn | None, steps: Steps) -> Array:
    """See `rotary.reference.norm_rotate`. Where nothing is rounded a kernel gives the gradients, too; none flows to the
    turn.
    """

    def plain(x: Array, weight: Array | None, turn: Turn | None) -> Array:
        return rotary.norm_rotate(x, weight, jax.lax.stop_gradient(turn), steps)

    if not rotary_tpu.supports(x.shape, x.dtype, turn):
        return plain(x, uncut(weight), turn)
    kernel = functools.partial(rotary_tpu.norm_rotate, steps=steps, interpret=interpreting())
    if isinstance(weight, Cut) or not rotary_gradients.supports(x.shape, x.dtype, turn, steps):
        return without_gradients(plain, tpu=kernel)(x, weight, turn)

    def gradients(operands: Any, gradient: Array) -> Any:
        x, weight, turn = operands
        found = rotary_gradients.gradients(x, weight, turn, gradient, steps, interpret=interpreting())
        return *found, jax.tree.map(jnp.zeros_like, turn)

    call = functools.partial(by_platform, default=plain, tpu=kernel)
    return with_gradients(call, default=pull(plain), tpu=gradients)(x, weight, turn)


def settle(sums: Array, projections: Sequence[Projection]) -> list[Array]:
    """See `rotary.reference.settle`."""

    def plain(sums: Array, thens: Sequence[Settle | None]) -> list[Array]:
        return rotary.settle(sums, projections, uncut(thens))

    def kernel(sums: Array, thens: Sequence[Settle | None]) -> list[Array]:
        return rotary_parts.settle(sums, projections, thens, interpret=interpreting())

    thens = [projection.then for projection in projections]
    if not rotary_parts.supports(projections):
        return plain(sums, thens)
    return by_platform(sums, thens, default=plain, tpu=kernel)


def enter_site(streams: Array, site: Site, numbers: Numbers) -> tuple[Array, Array, Array]:
    """See `hyper_connections.reference.enter`."""
    return _boundary("enter", streams, numbers, site)(streams, site)


def leave_site(streams: Array, output: Array, mix: Array, numbers: Numbers) -> Array:
    """See `hyper_connections.reference.leave`."""
    return _boundary("leave", streams, numbers)(streams, output, mix)


def cross_sites(streams: Array, output: Array, mix: Array, site: Site, numbers: Numbers) -> tuple[Array, Array, Array]:
    """See `hyper_connections.reference.cross`."""
    return _boundary("cross", streams, numbers, site)(streams, output, mix, site)


def _boundary(name: str, streams: Array, numbers: Numbers, site: Site | None = None) -> Form:
    default = functools.partial(getattr(hyper_connections, name), numbers=numbers)
    if not hyper_connections_tpu.supports(streams, numbers):
        return lambda *operands: default(*uncut(operands))
    kernel = functools.partial(getattr(hyper_connections_tpu, name), numbers=numbers, interpret=interpreting())
    cut = site is not None and any(isinstance(x, Cut) for x in site)
    # On other platforms the backward pass keeps what it needs, and computes nothing again.
    if cut or platform_of_mesh() != "tpu" or not hyper_connections_gradients.supports(streams, numbers):
        return without_gradients(default, tpu=kernel)
    of_all = getattr(hyper_connections_gradients, name)

    def gradients(operands: Any, gradient: Any) -> Any:
        return of_all(*operands, gradient, numbers=numbers, interpret=interpreting())

    call = functools.partial(by_platform, default=default, tpu=kernel)
    return with_gradients(call, default=pull(default), tpu=gradients)
