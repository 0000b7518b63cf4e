"""Pretraining, and supervised fine-tuning (`sft` says on which tokens): the cross-entropy of the next token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from jax import Array

from v4_jax.train.batch import Batch
from v4_jax.train.objectives.objective import cross_entropy
from v4_jax.train.section import Section
from v4_jax.train.teachers.settings import TeacherSettings
from v4_jax.transformer import Transformer


class Pretraining(Section):
    """Next tokens are those of the data."""

    imitates: ClassVar[bool] = True

    kind: Literal["pretraining"] = "pretraining"
    """What is learnt: "pretraining", the next token of the data."""

    @property
    def readers(self) -> Mapping[str, TeacherSettings]:
        """As for `Objective`: nobody."""
        return {}

    def loss(
        self, model: Transformer, params: Any, streams: Array, batch: Batch, shared: Any
    ) -> tuple[Array, dict[str, Array]]:
        """As for `Objective`: the negative log-probability of the next tokens."""
        del shared
        return cross_entropy(model, params, streams, batch, ahead=1), {}
