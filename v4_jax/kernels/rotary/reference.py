"""Norm, rotation and rounding of projected rows, and the end of attention's softmax, written for XLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import struct
from jax import Array

from v4_jax.kernels.linear.reference import parts
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


class Settle(struct.PyTreeNode):
    """What becomes of a product: see `norm_rotate`.

    Attributes:
      norm: [C] weight of the norm, or None.
      turn: by how much the tokens turn, or None.
      steps: which steps are taken.
    """

    norm: Any
    turn: Turn | None
    steps: Steps = struct.field(pytree_node=False)


class Projection(NamedTuple):
    """A product with a layer's input.

    Attributes:
      weight: [out, in].
      dtype: of the product and its result; float32 products are those of the operands as they are.
      detached: whether no gradient flows back to the input.
      then: what becomes of it; None: it is handed on as it is.
    """

    weight: Any
    dtype: Any
    detached: bool = False
    then: Settle | None = None


def settle(sums: Array, projections: Sequence[Projection], thens: Sequence[Settle | None]) -> list[Array]:
    """Products [T, out] of a layer's input, from their sums side by side.

    Args:
      sums: [T, all of them] float32, as `linear.reference.parts` has them.
      projections: the products.
      thens: what becomes of each.
    """
    found = []
    for part, projection, then in zip(parts(sums, [p.weight for p in projections]), projections, thens, strict=True):
        part = part.astype(projection.dtype)
        if then is not None:
            turn = None if then.turn is None else Turn(*(x.reshape(len(sums), 1, -1) for x in then.turn))
            part = norm_rotate(part[:, None], then.norm, turn, then.steps)[:, 0]
        found.append(part)
    return found


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
