"""Manifold-constrained hyper-connections: several residual streams, mixed by a doubly stochastic matrix at each site.

Technical report, section 2.2. A site (attention or feed-forward) collapses the streams into its input, and spreads its
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

from v4_jax.config import Config
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


def spread(streams: Array, output: Array, mix: Mix) -> Array:
    """New streams [B, S, hc, D] from the old ones and a site's output [B, S, D]."""
    count = streams.shape[2]
    old = [streams[:, :, j].astype(jnp.float32) for j in range(count)]
    output = output.astype(jnp.float32)
    new = [
        mix.post[..., k, None] * output + sum(mix.residual[j, k][..., None] * old[j] for j in range(count))
        for k in range(count)
    ]
    return jnp.stack(new, axis=2).astype(streams.dtype)


def sinkhorn(logits: Array, iterations: int, eps: float) -> Array:
    """Doubly stochastic matrices from logits [hc, hc, ...], over the first two axes.

    Softmax over the second index with `eps` added, one normalisation over the first index, then `iterations - 1` times
    both, second index first. The matrix axes lead so that each step is one pass over long vectors.
    """

    # Row by row: the transpose of a broadcast would be a reduction, one tiny kernel after another in the backward pass.
    def over_first(m: Array) -> Array:
        total = functools.reduce(jnp.add, m) + eps
        return jnp.stack([row / total for row in m])

    def over_second(m: Array) -> Array:
        columns = [m[:, k] for k in range(m.shape[1])]
        total = functools.reduce(jnp.add, columns) + eps
        return jnp.stack([column / total for column in columns], axis=1)

    matrix = over_first(jax.nn.softmax(logits, axis=1) + eps)
    return jax.lax.fori_loop(0, iterations - 1, lambda _, m: over_first(over_second(m)), matrix)


def _mixes(streams: Array, weight: Array, eps: float) -> Array:
    """Streams [B, S, hc, D] projected on `weight` [M, hc * D] and divided by their joint RMS: [M, B, S]."""
    flat = streams.reshape(*streams.shape[:2], -1).astype(jnp.float32)
    scale = (jnp.mean(flat * flat, axis=-1) + eps) ** -0.5
    return einsum("bsc,mc->mbs", flat, weight, dtype=jnp.float32) * scale


def _weighted_sum(streams: Array, weights: Array) -> Array:
    """Sum over streams of [B, S, hc, D] with weights [hc, B, S]: [B, S, D] in the streams' dtype."""
    terms = (weights[j][..., None] * streams[:, :, j].astype(jnp.float32) for j in range(streams.shape[2]))
    return functools.reduce(jnp.add, terms).astype(streams.dtype)


class HyperConnection(Module):
    """One site's mixing weights; `prefix` is e.g. `layers.3.hc_attn_`."""

    config: Config

    @nn.compact
    def __call__(self, streams: Array) -> tuple[Array, Mix]:
        """Collapses the streams.

        Args:
          streams: [B, S, hc, D].

        Returns:
          The site's input [B, S, D] before its norm, and how to spread its output.
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
        return _weighted_sum(streams, pre), mix


class StreamCollapse(Module):
    """The final weighted sum of the streams before the last norm; `prefix` is `hc_head_` or `mtp.0.hc_head_`."""

    config: Config

    @nn.compact
    def __call__(self, streams: Array) -> Array:
        """[B, S, hc, D] -> [B, S, D]."""
        c = self.config
        weight, base, scale = _declare(self, c.hc_mult, 1)
        mixes = _mixes(streams, weight, c.rms_norm_eps)
        return _weighted_sum(streams, jax.nn.sigmoid(mixes * scale[0] + base[:, None, None]) + c.hc_eps)


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
