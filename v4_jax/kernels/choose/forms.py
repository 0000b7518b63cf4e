"""A function of several forms, one for each platform, and whose gradients are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from v4_jax.layer_stack import uncut
from v4_jax.sharding.platform import by_platform

Form = Callable[..., Any]


def with_gradients(function: Form, *, default: Form | None = None, **forms: Form) -> Form:
    """The function, whose gradients the platform's form takes, from operands and gradient; nothing else is kept.

    Args:
      function: maps arrays to an array.
      default: maps (operands, gradient) to the operands' gradients, None for integers; by default that of the function.
      **forms: the same for one platform.
    """

    @jax.custom_vjp
    def call(*operands: Any) -> Any:
        return function(*operands)

    def forward(*operands: Any) -> tuple[Any, Any]:
        return function(*operands), operands

    def backward(operands: Any, gradient: Any) -> Any:
        return by_platform(operands, gradient, default=default or pull(function), **forms)

    call.defvjp(forward, backward)
    return call


def without_gradients(default: Form, **forms: Form) -> Form:
    """A function that runs the platform's form, which has no gradients: where they are asked for, the default runs.

    The default gets arrays as they are; the form reads those that were cut out of a stack there.
    """

    def plain(*operands: Any) -> Any:
        return default(*uncut(operands))

    @jax.custom_vjp
    def call(*operands: Any) -> Any:
        return by_platform(*operands, default=plain, **forms)

    def forward(*operands: Any) -> tuple[Any, Any]:
        return jax.vjp(plain, *operands)

    def backward(pull: Any, gradient: Any) -> Any:
        return pull(gradient)

    call.defvjp(forward, backward)
    return call


def pull(form: Form) -> Form:
    """What maps a form's operands, and the gradient of its result, to the operands' gradients; None for integers."""

    def pull(operands: Any, gradient: Any) -> Any:
        found = jax.vjp(form, *operands)[1](gradient)
        return jax.tree.map(lambda x: None if x.dtype == jax.dtypes.float0 else x, found)

    return pull
