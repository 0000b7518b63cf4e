"""Manifold-constrained hyper-connections: several residual streams, mixed by a doubly stochastic matrix at each site.

Technical report, section 2.2. A site (attention or feed-forward) collapses the streams into its input, and writes its
output back while mixing the streams with a matrix that Sinkhorn's iteration makes doubly stochastic. Everything here
is float32; streams are kept in the policy's compute dtype between sites.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.parameters import Module, normal
from v4_jax.policy import einsum

# "Small" is all that the report says of the gating factors at the start; 0.01 is the hyper-connections paper's choice.
_SMALL = nn.initializers.constant(0.01)


class Mix(NamedTuple):
    """How a site's output returns to the streams.

    Attributes:
      post: [B, S, hc] weight of the output in each stream.
      residual: [hc, hc, B, S]; `residual[j, k]` is the share of old stream j in new stream k.
    """

    post: Array
    residual: Array


def expand(x: Array, streams: int) -> Array:
    """[B, S, D] -> [B, S, streams, D], identical copies."""
    return jnp.broadcast_to(x[:, :, None, :], (*x.shape[:2], streams, x.shape[-1]))


@jax.named_scope("hyper_connections.write_back")
def write_back(streams: Array, output: Array, mix: Mix) -> Array:
    """New streams [B, S, hc, D] from the old ones and a site's output [B, S, D]."""
    weights = jnp.concatenate([mix.residual, jnp.moveaxis(mix.post, -1, 0)[None]])
    return mix_streams((streams, output[:, :, None]), weights).astype(streams.dtype)


@jax.custom_vjp
def mix_streams(parts: tuple[Array, ...], weights: Array) -> Array:
    """Weighted sums of streams; one pass over them, and one in the backward pass for each gradient.

    Args:
      parts: [B, S, n, D] streams each, J in all.
      weights: [J, K, B, S] float32 share of stream j in sum k.

    Returns:
      [B, S, K, D] float32.
    """
    old = [part[:, :, j].astype(jnp.float32) for part in parts for j in range(part.shape[2])]
    new = [_weighted_sum(old, weights[:, k]) for k in range(weights.shape[1])]
    return jnp.stack(new, axis=2)


def _weighted_sum(terms: Any, weights: Any) -> Array:
    """Sum of terms [..., D], each times its weight [...]; written out, as XLA fuses sums better than reductions."""
    return functools.reduce(jnp.add, (w[..., None] * x for x, w in zip(terms, weights, strict=True)))


def _mix_forward(parts: tuple[Array, ...], weights: Array) -> tuple[Array, Any]:
    return mix_streams(parts, weights), (parts, weights)


def _mix_backward(residuals: Any, gradient: Array) -> tuple[tuple[Array, ...], Array]:
    parts, weights = residuals
    new = [gradient[:, :, k] for k in range(gradient.shape[2])]
    of_weights = [einsum("bsjd,bskd->jkbs", part.astype(jnp.float32), gradient, dtype=jnp.float32) for part in parts]
    of_old = iter([_weighted_sum(new, weights[j]) for j in range(weights.shape[0])])
    of_parts = [jnp.stack([next(of_old) for _ in range(part.shape[2])], axis=2).astype(part.dtype) for part in parts]
    return tuple(of_parts), jnp.concatenate(of_weights)


mix_streams.defvjp(_mix_forward, _mix_backward)


@jax.named_scope("hyper_connections.sinkhorn")
def sinkhorn(logits: Array, iterations: int, eps: float) -> Array:
    """Doubly stochastic matrices from logits [hc, hc, ...], over the first two axes.

    Softmax over the second index with `eps` added, one normalisation over the first index, then `iterations - 1` times
    both, second index first; a normalisation divides by a sum plus `eps`. Every matrix on the way is the first one with
    its rows and columns scaled, so that only these factors are iterated. The matrix axes lead so that each step is one
    pass over long vectors.
    """
    matrix = jax.nn.softmax(logits, axis=1) + eps
    rows, columns = _factors(matrix, iterations, eps)
    return rows[:, None] * matrix * columns


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _factors(matrix: Array, iterations: int, eps: float) -> tuple[Array, Array]:
    """Factors of rows and of columns, [hc, ...] each."""
    return _factors_forward(matrix, iterations, eps)[0]


def _over_second(matrix: Array, columns: Array) -> Array:
    """Sums over the second index, columns weighted; written out as `_weighted_sum` is."""
    return functools.reduce(jnp.add, (matrix[:, k] * columns[k] for k in range(matrix.shape[1])))


def _over_first(matrix: Array, rows: Array) -> Array:
    return functools.reduce(jnp.add, (matrix[j] * rows[j] for j in range(matrix.shape[0])))


def _factors_forward(matrix: Array, iterations: int, eps: float) -> tuple[tuple[Array, Array], Any]:
    # A sum is the factor times the weighted sum, so that factor / (sum + eps) = 1 / (weighted sum + eps / factor).
    def step(factors: tuple[Array, Array], _: None) -> tuple[Any, Any]:
        rows, columns = factors
        after = 1 / (_over_second(matrix, columns) + eps / rows)
        return (after, 1 / (_over_first(matrix, after) + eps / columns)), factors

    rows = jnp.ones_like(matrix[:, 0])
    first = rows, 1 / (_over_first(matrix, rows) + eps)
    last, before = jax.lax.scan(step, first, length=iterations - 1)
    return last, (matrix, before, last)


def _factors_backward(iterations: int, eps: float, residuals: Any, gradients: tuple[Array, Array]) -> tuple[Array]:
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
    (of_matrix, _, of_columns, (_, columns)), _ = jax.lax.scan(step, carry, before, reverse=True)
    return (of_matrix - of_columns * columns**2,)


_factors.defvjp(_factors_forward, _factors_backward)


@jax.named_scope("hyper_connections.mixes")
def _mixes(streams: Array, weight: Array, eps: float) -> Array:
    """Streams [B, S, hc, D] projected on `weight` [M, hc * D] and divided by their joint RMS: [M, B, S]."""
    streams = streams.astype(jnp.float32)
    scale = (jnp.mean(streams * streams, axis=(2, 3)) + eps) ** -0.5
    # Not of flat streams: both forms would be kept for the backward pass.
    weight = weight.reshape(-1, *streams.shape[2:])
    return einsum("bsjd,mjd->mbs", streams, weight, dtype=jnp.float32) * scale


@jax.named_scope("hyper_connections.collapse")
def _collapse(streams: Array, weights: Array) -> Array:
    """Sum over streams of [B, S, hc, D] with weights [hc, B, S]: [B, S, D] in the streams' dtype."""
    return mix_streams((streams,), weights[:, None])[:, :, 0].astype(streams.dtype)


class HyperConnection(Module):
    """One site's mixing weights; `prefix` is e.g. `layers.3.hc_attn_`."""

    config: Architecture

    @nn.compact
    def __call__(self, streams: Array) -> tuple[Array, Mix]:
        """Collapses the streams.

        Args:
          streams: [B, S, hc, D].

        Returns:
          The site's input [B, S, D] before its norm, and how its output returns.
        """
        c, hc = self.config, self.config.hc_mult
        size = 2 * hc + hc * hc
        weight, base, scale = _declare(self, size, 3)
        mixes = _mixes(streams, weight, c.rms_norm_eps)

        def part(start: int, stop: int, gate: int) -> Array:
            return mixes[start:stop] * scale[gate] + base[start:stop, None, None]

        pre = jax.nn.sigmoid(part(0, hc, 0)) + c.hc_eps
        post = 2 * jax.nn.sigmoid(part(hc, 2 * hc, 1))
        logits = part(2 * hc, size, 2).reshape(hc, hc, *mixes.shape[1:])
        mix = Mix(jnp.moveaxis(post, 0, -1), sinkhorn(logits, c.hc_sinkhorn_iters, c.hc_eps))
        return _collapse(streams, pre), mix


class StreamCollapse(Module):
    """The final weighted sum of the streams before the last norm; `prefix` is `hc_head_` or `mtp.0.hc_head_`."""

    config: Architecture

    @nn.compact
    def __call__(self, streams: Array) -> Array:
        """[B, S, hc, D] -> [B, S, D]."""
        c = self.config
        weight, base, scale = _declare(self, c.hc_mult, 1)
        mixes = _mixes(streams, weight, c.rms_norm_eps)
        return _collapse(streams, jax.nn.sigmoid(mixes * scale[0] + base[:, None, None]) + c.hc_eps)


def _declare(module: Any, rows: int, gates: int) -> tuple[Array, Array, Array]:
    """The three parameters of a site: projection [rows, hc * D], static bias [rows], gating factors [gates]."""
    c = module.config
    weight = module.declare(
        "fn",
        (rows, c.hc_mult * c.hidden_size),
        (None, "streams"),
        released="fn",
        storage="f32",
        group="muon",
        init=normal(c),
    )
    base = module.declare(
        "base", (rows,), (None,), released="base", storage="f32", group="adamw", init=nn.initializers.zeros
    )
    scale = module.declare("scale", (gates,), (None,), released="scale", storage="f32", group="adamw", init=_SMALL)
    return weight, base, scale
