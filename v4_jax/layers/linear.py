"""Matrix products with weights that may be block-scaled."""

from __future__ import annotations

from typing import Any

from jax import Array

from v4_jax.number_formats import Weight, dequantise
from v4_jax.policy import einsum


def linear(x: Array, weight: Weight, dtype: Any) -> Array:
    """[..., in] times a released-layout [out, in] weight: [..., out] of `dtype`.

    A block-scaled weight is expanded here, for this product alone.
    """
    if x.ndim == 2:
        # A weight's gradient adds up over the rows. Where they have two axes, XLA:CPU brings them to the front and
        # calls its fast library; where they have one it does not.
        return linear(x[None], weight, dtype)[0]
    return einsum("...i,oi->...o", x, dequantise(weight, dtype), dtype=dtype)
