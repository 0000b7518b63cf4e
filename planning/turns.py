"""Pallas calls whose loops all have a known length, for the compiler's estimate: those that their authors name."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from v4_jax.kernels.turns import told


def with_turns(equation: Any) -> Any:
    """A Pallas call in which loops and grids that depend on the data have as many turns as `about` says.

    What it computes is another thing: this is for counting alone. Loops of which nothing is said stay as they are.
    """
    params = dict(equation.params)
    params["jaxpr"] = _counted(params["jaxpr"])
    grid, turns = params["grid_mapping"], told(equation)
    known = 0
    if turns is not None:
        known = grid.num_dynamic_grid_bounds
        sizes = (size if isinstance(size, int) else turns for size in grid.grid)
        params["grid_mapping"] = grid.replace(grid=tuple(sizes))
    return equation.replace(params=params, invars=equation.invars[known:])  # the bounds come first


def _counted(jaxpr: Any) -> Any:
    if isinstance(jaxpr, ClosedJaxpr):
        return jaxpr.replace(jaxpr=_counted(jaxpr.jaxpr))
    return jaxpr.replace(eqns=[_equation(equation) for equation in jaxpr.eqns])


def _equation(equation: Any) -> Any:
    is_jaxpr = lambda x: isinstance(x, Jaxpr | ClosedJaxpr)  # noqa: E731
    params = jax.tree.map(lambda x: _counted(x) if is_jaxpr(x) else x, dict(equation.params), is_leaf=is_jaxpr)
    if equation.primitive is not jax.lax.while_p or (turns := told(equation)) is None:
        return equation.replace(params=params)
    unused, used = params["cond_nconsts"], params["body_nconsts"]
    params = dict(
        jaxpr=params["body_jaxpr"],
        length=turns,
        reverse=False,
        unroll=1,
        num_consts=used,
        num_carry=len(equation.outvars),
    )
    return equation.replace(primitive=jax.lax.scan_p, params=params, invars=equation.invars[unused:])
