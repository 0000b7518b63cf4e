"""Where on a TPU a kernel's operands lie, and how many cores it has."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import Array
from jax.experimental.pallas import tpu as pltpu


def kept_in_hbm(x: Array, arrays: Sequence[Array], *, interpret: bool) -> tuple[Array, list[Array]]:
    """Arrays from which a kernel fetches what it needs itself: weights or cache entries of all layers.

    Else the compiler copies what fits to VMEM first, the whole stack in every layer; a spec's memory space is no bar.
    Tied to `x`, an operand of the layer, lest an array leaves a loop over layers with its memory space, which JAX
    refuses.

    Returns:
      `x` and the arrays, to be used in their place.
    """
    if interpret:
        return x, list(arrays)
    x, arrays = jax.lax.optimization_barrier((x, list(arrays)))
    return x, [pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays]


def cores() -> int:
    """TensorCores of the chip that is traced for, which share a kernel's grid where it has a parallel dimension."""
    try:
        return pltpu.get_tpu_info().num_cores
    except ValueError:  # no TPU: interpret mode
        return 1
