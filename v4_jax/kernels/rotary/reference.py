"""Norm, rotation and rounding of projected rows, and the end of attention's softmax, written for XLA."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array

from v4_jax.layers.norm import rms_norm
from v4_jax.layers.rotary import Turn, rotate
from v4_jax.number_formats import fake_quant_index, fake_quant_kv
from v4_jax.policy import Rounding


class Steps(NamedTuple):
    """What becomes of projected rows.

    Attributes:
      eps: epsilon of their RMS norm; None: no norm.
      rounding: as keys (E4M3 but for the rotated channels) or as the indexer's queries and keys (E2M1 after a Hadamard
        rotation), see `number_formats`; or none.
    """

    eps: float | None = None
    rounding: Rounding = "none"


def norm_rotate(x: Array, weight: Array | None, turn: Turn | None, steps: Steps) -> Array:
    """Norms, rotates and rounds rows, each step in float32 and its result in the dtype of `x`.

    Args:
      x: [B, S, C] or [B, S, H, C].
      weight: [C] of the norm, or None.
      turn: by how much the last channels of each token turn; None: not at all.
      steps: which of these happen.
    """
    if steps.eps is not None:
        x = rms_norm(x, weight, steps.eps)
    if turn is not None:
        x = rotate(x, turn)
    if steps.rounding == "index":
        return fake_quant_index(x)
    if steps.rounding == "keys":
        return fake_quant_kv(x, 0 if turn is None else turn.channels)
    return x
