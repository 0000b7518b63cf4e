"""DSpark's stages (arXiv 2607.05147) as what is trained, beside a trunk that is not, whatever format it is held in."""

from __future__ import annotations

import dataclasses
from typing import Any

from v4_jax.architecture import Architecture
from v4_jax.parameter_tree import declarations

DSPARK = "dspark"  # their name in the parameter tree


@dataclasses.dataclass(frozen=True)
class DraftStages:
    """The stages of a model and their heads. What a run needs of them is what it needs of `adapters.Adapters`."""

    def declarations(self, config: Architecture) -> Any:
        """A tree like the model's, of the stages' parameters alone."""
        return {DSPARK: declarations(config)[DSPARK]}

    def onto(self, base: Any, stages: Any) -> Any:
        """A model's parameters, of those of its trunk and the tree of `declarations`, unboxed."""
        return base | stages


def without_stages(declared: Any) -> Any:
    """The declarations, or any tree like them, without the stages."""
    return {name: node for name, node in declared.items() if name != DSPARK}
