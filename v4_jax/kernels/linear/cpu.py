"""Products with a weight for XLA:CPU.

A weight's gradient adds up over the rows. Where they have two axes, XLA:CPU brings them to the front and calls its fast
library; where they have one it does not.
"""

from __future__ import annotations

from typing import Any

from jax import Array

from v4_jax.kernels.linear import reference


def matmul(x: Array, weight: Array, dtype: Any) -> Array:
    """See `reference.matmul`; x is [T, in]."""
    return reference.matmul(x[None], weight, dtype)[0]
