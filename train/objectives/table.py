"""The objectives there are.

To add one, write a module beside this: a section of settings with a `kind` of its own and a method `loss`
(`v4_jax.train.objectives.objective.Objective`); and name it here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from v4_jax.train.objectives.distillation import Distillation
from v4_jax.train.objectives.grpo import Grpo
from v4_jax.train.objectives.pretraining import Pretraining

ChosenObjective = Annotated[
    Pretraining | Distillation | Grpo,
    Field(discriminator="kind"),
]
