"""A model that reads texts for another one that learns."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveFloat

from v4_jax.policy import PolicyName
from v4_jax.train.section import Section


class TeacherSettings(Section):
    """A teacher."""

    model: Path
    """A released, converted or trained directory: of any size, with the student's vocabulary."""
    weight: PositiveFloat = 1.0
    """What a token of its texts counts."""
    dtype: Literal["native", "bfloat16", "float32"] = "native"
    """How its weights are held: as released, or expanded."""
    policy: PolicyName = "bfloat16"
    """Precision of its forward pass."""
