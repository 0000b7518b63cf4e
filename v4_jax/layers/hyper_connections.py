"""Manifold-constrained hyper-connections: several residual streams, mixed by a doubly stochastic matrix at each site.

Technical report, section 2.2; the arithmetic is in `v4_jax.kernels.hyper_connections.reference`.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.architecture import Architecture
from v4_jax.kernels import choose
from v4_jax.kernels.hyper_connections.reference import Numbers, Site, collapse, project
from v4_jax.parameters import Module, normal

# "Small" is all that the report says of the gating factors at the start; 0.01 is the hyper-connections paper's choice.
_SMALL = nn.initializers.constant(0.01)


def expand(x: Array, streams: int) -> Array:
    """[B, S, D] -> [B, S, streams * D], identical copies."""
    return jnp.tile(x, (1, 1, streams))


def joined(streams: Array) -> Array:
    """Streams [B, S, hc, D] side by side: [B, S, hc * D]."""
    return streams.reshape(*streams.shape[:2], -1)


def apart(streams: Array, count: int) -> Array:
    """Inverse of `joined`."""
    return streams.reshape(*streams.shape[:2], count, -1)


def leave(streams: Array, output: Array, mix: Array, config: Architecture) -> Array:
    """Writes a site's output [B, S, D] back to the streams [B, S, hc * D], as its `mix` says."""
    return choose.leave_site(streams, output, mix, _numbers(config))


def nothing_left(streams: Array, config: Architecture) -> tuple[Array, Array]:
    """An output and its mix that leave streams [B, S, hc * D] as they are."""
    hc, tokens = config.hc_mult, streams.shape[:2]
    mix = jnp.concatenate([jnp.zeros(hc), jnp.eye(hc).reshape(-1)])
    output = jnp.zeros((*tokens, streams.shape[-1] // hc), streams.dtype)
    return output, jnp.broadcast_to(mix[:, None, None], (len(mix), *tokens))


class HyperConnection(Module):
    """A site's mixing weights; `prefix` is e.g. `layers.3.hc_attn_`."""

    config: Architecture

    @nn.compact
    def __call__(
        self, streams: Array, norm: Array, left: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array, Array]:
        """Collapses the streams into the site's input.

        Args:
          streams: [B, S, hc * D].
          norm: [D] weight of the norm of its input.
          left: output [B, S, D] and mix of the site before, still to be written back to the streams.

        Returns:
          The streams with that written back, the site's normed input [B, S, D], and its mix [hc + hc^2, B, S]: how its
          output returns.
        """
        hc = self.config.hc_mult
        site, numbers = Site(*_declare(self, 2 * hc + hc * hc, 3), norm), _numbers(self.config)
        if left is None:
            return choose.enter_site(streams, site, numbers)
        return choose.cross_sites(streams, *left, site, numbers)


class StreamCollapse(Module):
    """The final weighted sum of the streams before the last norm; `prefix` is `hc_head_` or `mtp.0.hc_head_`."""

    config: Architecture

    @nn.compact
    def __call__(self, streams: Array) -> Array:
        """[B, S, hc * D] -> [B, S, D]."""
        c = self.config
        weight, base, scale = _declare(self, c.hc_mult, 1)
        mixes = project(streams, weight, c.rms_norm_eps)
        return collapse(streams, jax.nn.sigmoid(mixes * scale[0] + base[:, None, None]) + c.hc_eps)


def _numbers(c: Architecture) -> Numbers:
    return Numbers(c.hc_mult, c.rms_norm_eps, c.hc_eps, c.hc_sinkhorn_iters)


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
        stacked=True,
    )
    vector = functools.partial(module.declare, axes=(None,), storage="f32", group="adamw", stacked=True)
    base = vector("base", (rows,), released="base", init=nn.initializers.zeros)
    scale = vector("scale", (gates,), released="scale", init=_SMALL)
    return weight, base, scale
