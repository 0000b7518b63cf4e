"""Pallas calls whose loops all have a known length, for the compiler's estimate: those that their authors name."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from v4_jax.kernels.turns import told, told_visits

_POSITIONS = ("program_id", "num_programs")


def inner_jaxprs(equation: Any) -> list[Any]:
    """Jaxprs among an equation's parameters, without what closes them."""
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
    return [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in leaves if _is_jaxpr(x)]


def tells_visits(equation: Any) -> bool:
    """Whether an equation, of a Pallas call, does other work on a group's first visit than on later ones."""
    within = (inner for jaxpr in inner_jaxprs(equation) for inner in jaxpr.eqns)
    return told_visits(equation) is not None or any(map(tells_visits, within))


def with_turns(equation: Any, *, first: bool = True) -> Any:
    """A Pallas call in which loops and grids that depend on the data have as many turns as `about` says; what is done
    under a condition is done if it says once, and is not if it says never; and transfers that it says never are left
    out.

    What it computes is another thing: this is for counting alone. Loops of which nothing is said stay as they are.

    Args:
      equation: the call.
      first: whether all visits are a group's first, or none is.
    """
    params = dict(equation.params)
    params["jaxpr"] = _counted(params["jaxpr"], first)
    grid, turns = params["grid_mapping"], told(equation)
    known = 0
    if turns is not None:
        known = grid.num_dynamic_grid_bounds
        sizes = (size if isinstance(size, int) else turns for size in grid.grid)
        params["grid_mapping"] = grid.replace(grid=tuple(sizes))
    return equation.replace(params=params, invars=equation.invars[known:])  # the bounds come first


def shortened(equation: Any, steps: int) -> tuple[Any, int, int]:
    """A Pallas call with a grid of so many steps at most, how many it then has, and how many it had.

    The estimate goes through a kernel step by step, some minutes for grids of hundreds; every step costs the same in
    it, since it knows no data. Even dimensions stay even, so that two cores share them as before.
    """
    grid = equation.params["grid_mapping"]
    sizes = list(grid.grid)
    if not all(isinstance(size, int) for size in sizes):
        return equation, 1, 1
    while (count := math.prod(sizes)) > steps:
        longest = max(range(len(sizes)), key=lambda i: sizes[i])
        half = -(-sizes[longest] // 2)
        sizes[longest] = half + half % 2 if half > 1 else half
        if math.prod(sizes) == count:
            break
    few = equation.replace(params=equation.params | {"grid_mapping": grid.replace(grid=tuple(sizes))})
    return few, count, math.prod(grid.grid)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)


def _counted(jaxpr: Any, first: bool) -> Any:
    if isinstance(jaxpr, ClosedJaxpr):
        return jaxpr.replace(jaxpr=_counted(jaxpr.jaxpr, first))
    return jaxpr.replace(eqns=[counted for equation in jaxpr.eqns for counted in _equation(equation, first)])


def _equation(equation: Any, first: bool) -> list[Any]:
    """What an equation becomes: one, or none."""
    params = jax.tree.map(lambda x: _counted(x, first) if _is_jaxpr(x) else x, dict(equation.params), is_leaf=_is_jaxpr)
    turns, of_first = told(equation), told_visits(equation)
    if of_first is not None:
        turns = int(of_first == first)
    if equation.primitive is jax.lax.cond_p and turns in (0, 1):
        if equation.outvars:  # the same whichever is taken
            branches = (params["branches"][turns],) * len(params["branches"])
            return [equation.replace(params=params | {"branches": branches})]
        # Not a condition with two equal branches: transfers that both of them start would count twice.
        _, *operands = equation.invars
        return [_loop(equation, params["branches"][1], turns, operands, len(operands))] if turns else []
    if equation.primitive is not jax.lax.while_p or turns is None:
        return [] if turns == 0 and not equation.outvars else [equation.replace(params=params)]
    operands = equation.invars[params["cond_nconsts"] :]
    return [_loop(equation, params["body_jaxpr"], turns, operands, params["body_nconsts"])]


def _loop(equation: Any, body: Any, turns: int, operands: list[Any], constants: int) -> Any:
    """A loop of so many turns instead of an equation; the first of its operands are constants."""
    carried = len(equation.outvars)
    params = {"jaxpr": body, "length": turns, "reverse": False, "unroll": 1}
    params |= {"num_consts": constants, "num_carry": carried}
    return equation.replace(primitive=jax.lax.scan_p, params=params, invars=operands)


def tells_all(equation: Any) -> bool:
    """Whether the compiler's estimate of a Pallas call says what it takes, after `with_turns`.

    The estimate takes the positions in a grid as they are, and data to be zeros. So a kernel must have told of loops
    and conditions that depend on data, where products are in them.
    """
    jaxprs = [jaxpr for jaxpr in inner_jaxprs(equation) if any(_multiplies(inner) for inner in jaxpr.eqns)]
    return all(_tells(jaxpr, set()) for jaxpr in jaxprs)


def _multiplies(equation: Any) -> bool:
    if equation.primitive is jax.lax.dot_general_p:
        return True
    return any(_multiplies(inner) for jaxpr in inner_jaxprs(equation) for inner in jaxpr.eqns)


def _tells(jaxpr: Any, known: set[Any]) -> bool:
    """The same of a jaxpr, of whose variables those `known` depend on positions alone."""

    def is_known(operand: Any) -> bool:
        return isinstance(operand, Literal) or operand in known

    for equation in jaxpr.eqns:
        inner, operands = inner_jaxprs(equation), equation.invars
        if equation.primitive is jax.lax.cond_p:
            predicate, *operands = operands
            if not is_known(predicate) and _multiplies(equation):
                return False
        elif equation.primitive is jax.lax.while_p and _multiplies(equation):
            return False
        elif not inner and (equation.primitive.name in _POSITIONS or (operands and all(map(is_known, operands)))):
            known |= set(equation.outvars)
        for one in inner:
            passed = zip(one.invars, operands, strict=False) if len(one.invars) == len(operands) else ()
            if not _tells(one, {variable for variable, operand in passed if is_known(operand)}):
                return False
    return True
