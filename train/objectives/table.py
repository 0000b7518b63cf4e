"""The objectives there are.

To add one, write a module beside this: a section of settings with a `kind` of its own and a method `loss`
(`v4_jax.train.objectives.objective.Objective`); and name it here. One that is not about next tokens has losses of its
own (`Losses`).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from v4_jax.train.objectives.distillation import Distillation
from v4_jax.train.objectives.dspark import DSpark
from v4_jax.train.objectives.grpo import Grpo
from v4_jax.train.objectives.objective import Losses, Objective, OfNextTokens
from v4_jax.train.objectives.pretraining import Pretraining

ChosenObjective = Annotated[
    Pretraining | Distillation | Grpo | DSpark,
    Field(discriminator="kind"),
]


def losses_of(objective: Objective | DSpark) -> Losses:
    """What a step minimises by an objective."""
    return objective if isinstance(objective, DSpark) else OfNextTokens(objective)
