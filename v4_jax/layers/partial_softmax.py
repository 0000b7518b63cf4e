"""Softmax over sets of keys that are seen apart, merged as if they had been seen together (log-sum-exp).

The window's keys, the entries of one block or another, the entries on this device and on others: each set gives a
`Partial`, and any two merge. The sink joins last.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.kernels.attention.reference import MASKED
from v4_jax.kernels.choose import products, weighted
from v4_jax.layers.partials import Packed, Partial, packed, separate
from v4_jax.sharding import collectives
from v4_jax.sharding.collectives import Axes, pmax, psum


def nothing(queries: Array) -> Partial:
    """Attention over no keys."""
    shape = queries.shape[:3]
    return Partial(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(queries.shape))


def attend(queries: Array, keys: Array, mask: Array) -> Partial:
    """Attention over one set of keys, which are also the values.

    Args:
      queries: [B, Q, H, C].
      keys: [B, K, C] shared by the queries, or [B, Q, K, C] with each query's own.
      mask: [B, Q, K] True where visible.
    """
    mask = mask[:, :, None, :]
    logits = jnp.where(mask, _logits(queries, keys), MASKED)
    # `finish` divides by what was subtracted here: it cancels out of the result, and so would its gradient.
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    shares = jnp.where(mask, jnp.exp(logits - maximum[..., None]), 0.0)
    return Partial(maximum, jnp.sum(shares, axis=-1), weighted(shares, keys))


def mass(queries: Array, keys: Array, mask: Array, log_total: Array) -> Array:
    """The attention [B, Q, K] that each key gets, all heads added up, of softmaxes with known denominators.

    Args:
      queries: [B, Q, H, C].
      keys: as for `attend`.
      mask: [B, Q, K] True where visible.
      log_total: [B, Q, H] logarithm of the softmax's denominator over all keys there are.
    """
    return jnp.sum(jnp.where(mask[:, :, None], jnp.exp(_logits(queries, keys) - log_total[..., None]), 0), axis=2)


def merge(a: Partial, b: Partial) -> Partial:
    """Merges the softmaxes of two disjoint sets of keys."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    of_a, of_b = jnp.exp(a.maximum - maximum), jnp.exp(b.maximum - maximum)
    return Partial(
        maximum,
        a.total * of_a + b.total * of_b,
        a.weighted * of_a[..., None] + b.weighted * of_b[..., None],
    )


def finish(partial: Partial, sink: Array) -> Array:
    """The attention output [B, Q, H, C] float32; the sink logit [H] takes part in the denominator alone."""
    maximum = jax.lax.stop_gradient(jnp.maximum(partial.maximum, sink))
    rescale = jnp.exp(partial.maximum - maximum)
    total = partial.total * rescale + jnp.exp(sink - maximum)
    return partial.weighted * (rescale / total)[..., None]


def log_denominator(partial: Partial, sink: Array) -> Array:
    """Logarithm [B, Q, H] of the softmax's denominator, the sink logit [H] included."""
    return jnp.logaddexp(partial.maximum + jnp.log(partial.total), sink)


def merge_devices(partial: Partial | Packed, axes: Axes, heads: Axes) -> Partial | Packed:
    """Merges the softmaxes of all devices along `axes`, which each saw other keys.

    Args:
      partial: this device's, for all heads that any device along `heads` works on.
      axes: mesh axes over which the keys are split.
      heads: those of them along which the heads' work is shared: a device gets its own heads back.

    Returns:
      The merged softmax, or, where no axes but `heads` split the keys, what is left to merge.
    """
    rest = tuple(axis for axis in axes if axis not in heads)
    if heads:
        own = partial.parts[0] if isinstance(partial, Packed) else packed(partial)
        by_device = own.reshape(*own.shape[:2], collectives.size(heads), -1, own.shape[-1])
        parts = Packed(collectives.all_to_all(by_device, heads, 2))
        if not rest:
            return parts
        partial = functools.reduce(merge, separate([parts]))
    if not rest:
        return partial
    (partial,) = separate([partial])
    maximum = pmax(partial.maximum, rest)
    rescale = jnp.exp(partial.maximum - maximum)
    return Partial(maximum, psum(partial.total * rescale, rest), psum(partial.weighted * rescale[..., None], rest))


def _logits(queries: Array, keys: Array) -> Array:
    return products(queries, keys) * queries.shape[-1] ** -0.5
