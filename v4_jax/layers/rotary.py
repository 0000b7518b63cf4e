"""Rotary position embedding on the last channels of a head, interleaved pairs, with YaRN on compressed layers.

Technical report, section 2.3. Sliding layers (and the MTP block) rotate with theta 10,000 and no scaling; layers that
compress rotate everything (queries, window keys, compressed entries, index queries and keys) with theta 160,000 and
YaRN, which is always on, at short contexts too, and applies no attention factor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from v4_jax.architecture import Architecture, Yarn


def inverse_frequencies(config: Architecture, ratio: int) -> np.ndarray:
    """Radians per position of each rotated pair, [R / 2] float32, in layers of `ratio` tokens per entry; 0: sliding."""
    size = config.qk_rope_head_dim
    theta = config.compress_rope_theta if ratio else config.rope_theta
    frequencies = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if ratio:
        ramp = _interpolated_share(size, theta, config.rope_scaling)
        frequencies = frequencies / config.rope_scaling.factor * ramp + frequencies * (1 - ramp)
    return frequencies.astype(np.float32)


def _interpolated_share(size: int, theta: float, yarn: Yarn) -> np.ndarray:
    """YaRN's ramp over the pairs: 0 keeps a frequency, 1 divides it by the factor."""

    def pair_that_turns(times: float) -> float:
        return size * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), size - 1)
    return np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)


class Turn(NamedTuple):
    """By how much tokens' rotated channels turn, [..., R] float32 each.

    Attributes:
      cos: of each channel's angle, that of its pair.
      sin: of the same, negative in the first channel of a pair: what the other channel of the pair adds.
    """

    cos: Array
    sin: Array

    @property
    def channels(self) -> int:
        """R."""
        return self.cos.shape[-1]


def turn(positions: Array, frequencies: np.ndarray) -> Turn:
    """What positions [...] int32 turn by, with the radians per position of each pair."""
    angles = positions.astype(jnp.float32)[..., None] * np.repeat(frequencies, 2)
    signs = np.tile(np.array([-1, 1], np.float32), len(frequencies))
    return Turn(jnp.cos(angles), jnp.sin(angles) * signs)


def rotate(x: Array, turn: Turn, *, inverse: bool = False) -> Array:
    """Rotates the last R channels of `x` in pairs (2i, 2i + 1).

    Args:
      x: [..., C] with the axes of the turn first; any axes between (heads, say) share a position.
      turn: by how much.
      inverse: rotate back.

    Returns:
      The same shape and dtype as `x`; the product is taken in float32.
    """
    size, leading = turn.channels, turn.cos.shape[:-1]

    def of_pairs(part: Array, which: int) -> Array:
        return part[..., which::2].reshape(*leading, *(1,) * (x.ndim - 1 - len(leading)), size // 2)

    cos, sin = of_pairs(turn.cos, 1), of_pairs(turn.sin, 1)
    if inverse:
        sin = -sin
    pairs = x[..., -size:].astype(jnp.float32).reshape(*x.shape[:-1], size // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([x[..., :-size], turned.reshape(*x.shape[:-1], size).astype(x.dtype)], axis=-1)
