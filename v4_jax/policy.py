"""Precision as one object: which dtype the matmuls run in, and whether the release's rounding is imitated."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

PolicyName = Literal["float32", "bfloat16", "released"]
Rounding = Literal["none", "keys", "index"]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Precision of the forward pass.

    Float32 regardless of the policy: router logits and scores, softmax, compressor pooling, Sinkhorn, hyper-connection
    mixing, RMSNorm statistics, rotary angles and the LM head.

    Attributes:
      compute_dtype: dtype of matmul inputs, of activations between sublayers and of the residual streams.
      fake_quant: round keys/values to E4M3 and the indexer's queries and keys to E2M1 as the released model does
        (technical report, section 5.2; the blocks and scales are those of `number_formats`).
    """

    compute_dtype: Any = jnp.bfloat16
    fake_quant: bool = False

    @classmethod
    def of(cls, policy: str | Policy) -> Policy:
        """Looks a policy up by name; a `Policy` is returned as it is.

        Raises:
          ValueError: the name is none of "float32", "bfloat16", "released".
        """
        if isinstance(policy, Policy):
            return policy
        if policy not in POLICIES:
            raise ValueError(f"unknown precision policy {policy!r}, expected one of {sorted(POLICIES)}")
        return POLICIES[policy]

    def rounding(self, kind: Rounding) -> Rounding:
        """How rows of a kind are rounded: as the kind is, or not at all."""
        return kind if self.fake_quant else "none"

    def check_cache(self, released: bool) -> None:
        """Checks that a cache's number format fits.

        Args:
          released: whether it is the release's.

        Raises:
          ValueError: it does not.
        """
        if released and not self.fake_quant:
            raise ValueError("a cache in the released formats needs the policy 'released', which rounds as they do")


POLICIES = {
    "float32": Policy(jnp.float32, fake_quant=False),
    "bfloat16": Policy(jnp.bfloat16, fake_quant=False),
    "released": Policy(jnp.bfloat16, fake_quant=True),
}


def einsum(spec: str, *operands: Array, dtype: Any, accumulate: Any = None) -> Array:
    """`jnp.einsum` with operands cast to `dtype` and true float32 products where `dtype` is float32.

    Accelerators run float32 matmuls in bfloat16 passes unless told otherwise; a policy that says float32 means it.

    Args:
      spec: einsum letters from the glossary in `v4_jax`.
      *operands: arrays of any float dtype.
      dtype: dtype the operands are cast to. Operands that are all bfloat16 stay so under float32: their products are
        exact in float32, and a weight need not be copied.
      accumulate: dtype of the result; `dtype` when None.
    """
    accumulate = dtype if accumulate is None else accumulate
    if jnp.dtype(dtype) == jnp.float32 and all(operand.dtype == jnp.bfloat16 for operand in operands):
        dtype = jnp.bfloat16
    precision = jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
    cast = (operand.astype(dtype) for operand in operands)
    return jnp.einsum(spec, *cast, precision=precision, preferred_element_type=accumulate)
