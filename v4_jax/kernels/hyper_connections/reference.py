"""Hyper-connections at the boundary between two sublayers, written for XLA.

Technical report, section 2.2. A site (attention or feed-forward) collapses the streams into its input, and its output
is written back while a matrix that Sinkhorn's iteration makes doubly stochastic mixes the streams. Everything here is
float32; streams are kept in the policy's compute dtype between sites, side by side: [B, S, hc * D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.layers.norm import rms_norm
from v4_jax.policy import einsum

Scan = Callable[..., tuple[Any, Any]]  # as `jax.lax.scan`


class Site(NamedTuple):
    """What a site reads the streams by.

    Attributes:
      weight: [2 hc + hc^2, hc * D] float32 projection of the streams, to gates of the collapse, of the write-back, and
        logits of the mixing matrix.
      base: [2 hc + hc^2] float32 static bias of each.
      scale: [3] float32 gating factors of the three.
      norm: [D] weight of the RMS norm that follows.
    """

    weight: Array
    base: Array
    scale: Array
    norm: Array


class Numbers(NamedTuple):
    """The architecture's numbers: streams, the norms' epsilon, the connections' own, and Sinkhorn's iterations."""

    streams: int
    norm_eps: float
    eps: float
    iterations: int


def enter(streams: Array, site: Site, numbers: Numbers) -> tuple[Array, Array, Array]:
    """Collapses the streams into a site's input.

    Args:
      streams: [B, S, hc * D].
      site: its parameters.
      numbers: of the architecture.

    Returns:
      The streams as they are: whatever takes these has its gradient added to the site's where that is written. The
      normed input [B, S, D] in their dtype. And how the site's output returns, [hc + hc^2, B, S] float32: its weight in
      each stream, and then, at j hc + k, the share of old stream j in new stream k.
    """
    mixes = project(streams, site.weight, numbers.norm_eps)
    before, mix = gates(mixes, site.base, site.scale, numbers)
    return streams, rms_norm(collapse(streams, before), site.norm, numbers.norm_eps), mix


def gates(mixes: Array, base: Array, scale: Array, numbers: Numbers) -> tuple[Array, Array]:
    """The streams' shares in a site's input [hc, B, S], and how its output returns [hc + hc^2, B, S] (`enter`).

    Args:
      mixes: [2 hc + hc^2, B, S] what the streams project to.
      base: of the site.
      scale: likewise.
      numbers: of the architecture.
    """
    return opened(mixes * factors(scale, numbers)[:, None, None] + base[:, None, None], numbers)


def factors(scale: Array, numbers: Numbers) -> Array:
    """A site's gating factor of each of its projections, [2 hc + hc^2]."""
    hc = numbers.streams
    return jnp.repeat(scale, jnp.array((hc, hc, hc * hc)), total_repeat_length=2 * hc + hc * hc)


def opened(gates: Array, numbers: Numbers, scan: Scan = jax.lax.scan) -> tuple[Array, Array]:
    """What gates [2 hc + hc^2, ...] let through, see `gates`.

    Args:
      gates: the streams' projections, scaled, with their base added.
      numbers: of the architecture.
      scan: what goes over Sinkhorn's iterations, as `jax.lax.scan` does.
    """
    hc, rest = numbers.streams, gates.shape[1:]
    before = jax.nn.sigmoid(gates[:hc]) + numbers.eps
    after = 2 * jax.nn.sigmoid(gates[hc : 2 * hc])
    residual = sinkhorn(gates[2 * hc :].reshape(hc, hc, *rest), numbers.iterations, numbers.eps, scan)
    return before, jnp.concatenate([after, residual.reshape(hc * hc, *rest)])


@jax.named_scope("hyper_connections.write_back")
def leave(streams: Array, output: Array, mix: Array, numbers: Numbers) -> Array:
    """New streams [B, S, hc * D] from the old ones, a site's output [B, S, D], and how that returns (`enter`)."""
    hc = numbers.streams
    weights = jnp.concatenate([mix[hc:].reshape(hc, hc, *mix.shape[1:]), mix[None, :hc]])
    return mix_streams((streams, output), weights).astype(streams.dtype)


def cross(streams: Array, output: Array, mix: Array, site: Site, numbers: Numbers) -> tuple[Array, Array, Array]:
    """Leaves one site for the next: `leave`, and `enter` of what comes of it.

    Returns:
      The new streams, the next site's normed input, and how its output returns.
    """
    return enter(leave(streams, output, mix, numbers), site, numbers)


@jax.custom_vjp
def mix_streams(parts: tuple[Array, ...], weights: Array) -> Array:
    """Weighted sums of streams; one pass over them, and one in the backward pass for each gradient.

    Args:
      parts: [B, S, n * D], n streams each, J in all.
      weights: [J, K, B, S] float32 share of stream j in sum k.

    Returns:
      [B, S, K * D] float32.
    """
    old = [x.astype(jnp.float32) for x in _streams(parts, weights.shape[0])]
    return jnp.concatenate([_weighted_sum(old, weights[:, k]) for k in range(weights.shape[1])], axis=-1)


def _streams(parts: tuple[Array, ...], count: int) -> list[Array]:
    """The `count` streams [B, S, D] that lie side by side in the parts."""
    width = sum(part.shape[-1] for part in parts) // count
    return [x for part in parts for x in jnp.split(part, part.shape[-1] // width, axis=-1)]


def _weighted_sum(terms: Any, weights: Any) -> Array:
    """Sum of terms [..., D], each times its weight [...]; written out, as XLA fuses sums better than reductions."""
    return functools.reduce(jnp.add, (w[..., None] * x for x, w in zip(terms, weights, strict=True)))


def _mix_forward(parts: tuple[Array, ...], weights: Array) -> tuple[Array, Any]:
    return mix_streams(parts, weights), (parts, weights)


def _mix_backward(residuals: Any, gradient: Array) -> tuple[tuple[Array, ...], Array]:
    parts, weights = residuals
    apart = gradient.reshape(*gradient.shape[:2], weights.shape[1], -1)
    of_weights, of_parts, first = [], [], 0
    for part in parts:
        wide = part.astype(jnp.float32).reshape(*part.shape[:2], -1, apart.shape[-1])
        of_weights.append(einsum("bsjd,bskd->jkbs", wide, apart, dtype=jnp.float32))
        new, own = jnp.split(gradient, weights.shape[1], axis=-1), weights[first : first + wide.shape[2]]
        of_parts.append(jnp.concatenate([_weighted_sum(new, w) for w in own], axis=-1).astype(part.dtype))
        first += wide.shape[2]
    return tuple(of_parts), jnp.concatenate(of_weights)


mix_streams.defvjp(_mix_forward, _mix_backward)


@jax.named_scope("hyper_connections.sinkhorn")
def sinkhorn(logits: Array, iterations: int, eps: float, scan: Scan = jax.lax.scan) -> Array:
    """Doubly stochastic matrices from logits [hc, hc, ...], over the first two axes.

    Softmax over the second index with `eps` added, one normalisation over the first index, then `iterations - 1` times
    both, second index first; a normalisation divides by a sum plus `eps`. Every matrix on the way is the first one with
    its rows and columns scaled, so that only these factors are iterated. The matrix axes lead so that each step is one
    pass over long vectors.
    """
    matrix = jax.nn.softmax(logits, axis=1) + eps
    rows, columns = _factors(matrix, iterations, eps, scan)
    return rows[:, None] * matrix * columns


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _factors(matrix: Array, iterations: int, eps: float, scan: Scan) -> tuple[Array, Array]:
    """Factors of rows and of columns, [hc, ...] each."""
    return _factors_forward(matrix, iterations, eps, scan)[0]


def _over_second(matrix: Array, columns: Array) -> Array:
    """Sums over the second index, columns weighted; written out as `_weighted_sum` is."""
    return functools.reduce(jnp.add, (matrix[:, k] * columns[k] for k in range(matrix.shape[1])))


def _over_first(matrix: Array, rows: Array) -> Array:
    return functools.reduce(jnp.add, (matrix[j] * rows[j] for j in range(matrix.shape[0])))


def _factors_forward(matrix: Array, iterations: int, eps: float, scan: Scan) -> tuple[tuple[Array, Array], Any]:
    # A sum is the factor times the weighted sum, so that factor / (sum + eps) = 1 / (weighted sum + eps / factor).
    def step(factors: tuple[Array, Array], _: None) -> tuple[Any, Any]:
        rows, columns = factors
        after = 1 / (_over_second(matrix, columns) + eps / rows)
        return (after, 1 / (_over_first(matrix, after) + eps / columns)), factors

    rows = jnp.ones_like(matrix[:, 0])
    first = rows, 1 / (_over_first(matrix, rows) + eps)
    last, before = scan(step, first, length=iterations - 1)
    return last, (matrix, before, last)


def _factors_backward(
    iterations: int, eps: float, scan: Scan, residuals: Any, gradients: tuple[Array, Array]
) -> tuple[Array]:
    """With z the inverse of a factor, the gradient of z is that of the factor times -factor^2."""
    del iterations
    matrix, before, last = residuals

    def step(carry: Any, before: tuple[Array, Array]) -> tuple[Any, None]:
        of_matrix, of_rows, of_columns, (rows, columns) = carry
        rows_before, columns_before = before
        of_sums = -of_columns * columns**2
        of_rows = -(of_rows + _over_second(matrix, of_sums)) * rows**2
        of_matrix += rows[:, None] * of_sums + of_rows[:, None] * columns_before
        of_columns = _over_first(matrix, of_rows) - eps * of_sums / columns_before**2
        return (of_matrix, -eps * of_rows / rows_before**2, of_columns, before), None

    carry = jnp.zeros_like(matrix), *gradients, last
    (of_matrix, _, of_columns, (_, columns)), _ = scan(step, carry, before, reverse=True)
    return (of_matrix - of_columns * columns**2,)


_factors.defvjp(_factors_forward, _factors_backward)


@jax.named_scope("hyper_connections.mixes")
def project(streams: Array, weight: Array, eps: float) -> Array:
    """Streams [B, S, hc * D] projected on `weight` [M, hc * D] and divided by their joint RMS: [M, B, S]."""
    streams = streams.astype(jnp.float32)
    scale = (jnp.mean(streams * streams, axis=-1) + eps) ** -0.5
    return einsum("bsd,md->mbs", streams, weight, dtype=jnp.float32) * scale


@jax.named_scope("hyper_connections.collapse")
def collapse(streams: Array, weights: Array) -> Array:
    """Sum over streams of [B, S, hc * D] with weights [hc, B, S]: [B, S, D] in the streams' dtype."""
    return mix_streams((streams,), weights[:, None]).astype(streams.dtype)
