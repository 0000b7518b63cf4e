"""The copy of the master weights that the forward pass computes with, and FP4 quantisation-aware training."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from v4_jax.architecture import Architecture
from v4_jax.low_rank import Adapted, merged
from v4_jax.number_formats import E2M1, BlockScaled, dequantise, layout, quantise, straight_through
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import Parameter, is_parameter
from v4_jax.policy import Policy

_FLOAT = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def compute_copy(params: Any, config: Architecture, policy: Policy, *, fp4_experts: bool = False) -> Any:
    """The parameters as the forward pass takes them; gradients go straight through to the float32 masters.

    What the release stores in 16 bits or fewer is cast to the compute dtype before it is joined over devices, but for
    experts, which stay where they are and are cast one by one: their gradients then add up in float32. What the release
    stores in float32 stays so. Weights in blocks stay in them; the factors of an update are cast as their weight is.

    Args:
      params: float32 masters; or adapters onto a base of any format.
      config: the architecture.
      policy: precision.
      fp4_experts: round experts to E2M1 in 1x32 blocks (technical report, section 5.2).
    """

    def copy(parameter: Parameter, value: Any) -> Any:
        if isinstance(value, Adapted):
            return Adapted(*(copy(parameter, part) for part in (value.base, value.a, value.b)), value.scale)
        if isinstance(value, BlockScaled):
            return value
        if parameter.storage == "expert":
            if not fp4_experts:
                return value
            return straight_through(dequantise(quantise(jax.lax.stop_gradient(value), E2M1), jnp.float32), value)
        return value.astype(policy.compute_dtype) if parameter.storage in ("fp8", "bf16") else value

    return jax.tree.map(copy, declarations(config), params, is_leaf=is_parameter)


def held_as(params: Any, config: Architecture, dtype: Literal["native", "bfloat16", "float32"]) -> Any:
    """Float32 masters as `v4_jax.load` would return them of what an export writes.

    Args:
      params: float32 masters; or adapters onto a base of any format, which are merged, one layer at a time.
      config: the architecture.
      dtype: "native" rounds to the released formats; "bfloat16" rounds what they hold in 16 bits or fewer to that.
    """

    def hold(parameter: Parameter, value: Any) -> Any:
        if isinstance(value, Adapted):
            one = lambda weight: hold(parameter, merged(weight))  # noqa: E731
            for _ in range(value.ndim - 2):
                one = functools.partial(jax.lax.map, one)
            return one(value)
        if isinstance(value, BlockScaled):
            return value if dtype == "native" else dequantise(value, _FLOAT[dtype])
        if dtype == "float32" or parameter.storage in ("f32", "i64"):
            return value
        held = layout(parameter.storage, config.expert_dtype) if dtype == "native" else None
        return value.astype(jnp.bfloat16) if held is None else quantise(value, held.codes, held.scales)

    return jax.tree.map(hold, declarations(config), params, is_leaf=is_parameter)
