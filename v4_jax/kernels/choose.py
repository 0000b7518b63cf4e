"""Which form of an inner loop runs: by the platform that the program is compiled for, not by the process's own.

Each has a `reference.py`, which defines its numbers, beside forms of the same signature for one platform: `tpu.py`, a
Pallas kernel, or `cpu.py`, written so that XLA:CPU makes quick code of it. Layers call the functions here.

    function                 reference                      cpu                                       tpu
    products, weighted       einsum                         keys' gradients as sums, of few heads     reference
    window_attention         caller's, part by part         reference                                 kernel
    index_scores             einsum                         head by head                              reference
    matmul                   einsum                         weights' gradients with a second axis     reference
    map_groups               tiles of each group in turn    reference                                 caller's kernel
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from v4_jax.cache.entries import Entries
from v4_jax.kernels.attention import cpu as attention_cpu
from v4_jax.kernels.attention import reference as attention
from v4_jax.kernels.attention import tpu as attention_tpu
from v4_jax.kernels.grouped_matmul import groups
from v4_jax.kernels.indexer import cpu as indexer_cpu
from v4_jax.kernels.indexer import reference as indexer
from v4_jax.kernels.linear import cpu as linear_cpu
from v4_jax.kernels.linear import reference as linear
from v4_jax.layers.visible import Visible
from v4_jax.sharding.platform import by_platform, interpreting

Form = Callable[..., Any]


def products(queries: Array, keys: Array) -> Array:
    """See `attention.reference.products`."""
    if not attention_cpu.helps(queries, keys):
        return attention.products(queries, keys)
    return _with_gradients(attention.products, cpu=attention_cpu.products_gradients)(queries, keys)


def weighted(shares: Array, keys: Array) -> Array:
    """See `attention.reference.weighted`."""
    if not attention_cpu.helps(shares, keys):
        return attention.weighted(shares, keys)
    return _with_gradients(attention.weighted, cpu=attention_cpu.weighted_gradients)(shares, keys)


def window_attention(
    plain: Form,
    queries: Array,
    keys: Array | None,
    oldest: Array | None,
    entries: Entries | None,
    visible: Visible | None,
) -> tuple[Array, Array, Array]:
    """See `attention.tpu.window_attention` for all arguments but the first.

    Args:
      plain: the same, in whose place the kernel runs in programs for TPUs, but where gradients are asked for.
      queries: [B, Q, H, C].
      keys: of the window.
      oldest: where each query's window may begin.
      entries: the entries.
      visible: which of them the queries see.
    """
    if not attention_tpu.supports(queries):
        return plain(queries, keys, oldest, entries, visible)
    kernel = functools.partial(attention_tpu.window_attention, interpret=interpreting())
    return _without_gradients(plain, tpu=kernel)(queries, keys, oldest, entries, visible)


def index_scores(queries: Array, weights: Array, keys: Array) -> Array:
    """See `indexer.reference.index_scores`."""
    by_heads = indexer_cpu.index_scores
    scores = functools.partial(by_platform, default=indexer.index_scores, cpu=by_heads)
    return _with_gradients(scores, default=_pull(indexer.index_scores), cpu=_pull(by_heads))(queries, weights, keys)


def matmul(x: Array, weight: Array, dtype: Any) -> Array:
    """See `linear.reference.matmul`."""
    plain = functools.partial(linear.matmul, dtype=dtype)
    if x.ndim != 2:
        return plain(x, weight)
    return _with_gradients(plain, cpu=functools.partial(linear_cpu.matmul_gradients, dtype=dtype))(x, weight)


def map_groups(
    function: Callable[[Any, Any], Array],
    rows: Any,
    weights: Any,
    sizes: Array,
    *,
    layer: Any = None,
    width: int,
    kernel: Callable[[Any, Any, Array, Any], Array] | None,
) -> Array:
    """See `grouped_matmul.groups.map_groups` for all arguments but the kernel.

    Args:
      kernel: maps (rows, weights, sizes, layer) to the same result, by `grouped_matmul.tpu`; takes the place of the
        loop over groups in programs for TPUs, except where gradients are asked for. None where there is none.
    """

    def plain(rows: Any, weights: Any, sizes: Array, layer: Any) -> Array:
        return groups.map_groups(function, rows, weights, sizes, layer=layer, width=width)

    if kernel is None:
        return plain(rows, weights, sizes, layer)
    if layer is not None:
        return by_platform(rows, weights, sizes, layer, default=plain, tpu=kernel)
    return _without_gradients(plain, tpu=kernel)(rows, weights, sizes, None)


def _with_gradients(function: Form, *, default: Form | None = None, **forms: Form) -> Form:
    """The function, whose gradients the platform's form takes, from operands and gradient; nothing else is kept.

    Args:
      function: maps arrays to an array.
      default: maps (operands, gradient) to the operands' gradients; by default that of the function.
      **forms: the same for one platform.
    """

    @jax.custom_vjp
    def call(*operands: Any) -> Any:
        return function(*operands)

    def forward(*operands: Any) -> tuple[Any, Any]:
        return function(*operands), operands

    def backward(operands: Any, gradient: Any) -> Any:
        return by_platform(operands, gradient, default=default or _pull(function), **forms)

    call.defvjp(forward, backward)
    return call


def _without_gradients(default: Form, **forms: Form) -> Form:
    """A function that runs the platform's form, which has no gradients: where they are asked for, the default runs."""

    @jax.custom_vjp
    def call(*operands: Any) -> Any:
        return by_platform(*operands, default=default, **forms)

    def forward(*operands: Any) -> tuple[Any, Any]:
        return jax.vjp(default, *operands)

    def backward(pull: Any, gradient: Any) -> Any:
        return pull(gradient)

    call.defvjp(forward, backward)
    return call


def _pull(form: Form) -> Form:
    def pull(operands: Any, gradient: Any) -> Any:
        return jax.vjp(form, *operands)[1](gradient)

    return pull
