"""How often loops turn whose length is known only at run time: a plan counts them so (`v4_jax.planning.kernels`).

The TPU compiler's estimate takes each such loop, and each such dimension of a grid, to have 42 turns. A kernel that has
one says beside it how many it takes at the end of a context.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import jax


def about(turns: int) -> contextlib.AbstractContextManager[None]:
    """Around a loop of a kernel's body, or around a call whose grid has a dimension known only at run time; or around a
    condition, as a loop of at most one turn; or around transfers, none of which a plan then counts but by their bytes.

    Args:
      turns: what a plan counts; the computation does not depend on it.
    """
    return jax.named_scope(f"about_{turns}_turns")


def told(equation: Any) -> int | None:
    """What `about` said of an equation of a jaxpr; None where it said nothing."""
    found = re.findall(r"about_(\d+)_turns", str(equation.source_info.name_stack))
    return int(found[-1]) if found else None


def visits(*, first: bool) -> contextlib.AbstractContextManager[None]:
    """Around a condition for what only a group's first visit does, or only its later ones: a plan counts a kernel once
    as if all visits were first ones, and once as if none was."""
    return jax.named_scope(f"{'first' if first else 'later'}_visits")


def told_visits(equation: Any) -> bool | None:
    """Whether an equation of a jaxpr is of first visits; None where `visits` said nothing."""
    found = re.findall(r"(first|later)_visits", str(equation.source_info.name_stack))
    return found[-1] == "first" if found else None
