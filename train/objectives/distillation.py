"""Distillation from teachers: how far the model's distribution of the next token is from a teacher's, KL(model || it).

Technical report, post-training: specialists are joined into one student over the full vocabulary, each text with the
teacher of its domain. Of a teacher the last hidden states are known, and its head makes logits of them, a block of
tokens at a time; or, for wide vocabularies, the likeliest tokens of each place are, where the others count as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import jax.numpy as jnp
from jax import Array
from pydantic import Field, NonNegativeInt, PositiveInt

from v4_jax.train.batch import Batch
from v4_jax.train.objectives.objective import targets
from v4_jax.train.on_policy.rollouts import RolloutSettings
from v4_jax.train.section import Section
from v4_jax.train.teachers.settings import TeacherSettings
from v4_jax.transformer import Transformer


class Distillation(Section):
    """Next tokens are distributed as teachers say."""

    imitates: ClassVar[bool] = False

    kind: Literal["distillation"] = "distillation"
    """"distillation": the distributions of teachers, each over the texts of the sources that name it."""
    teachers: dict[str, TeacherSettings] = Field(min_length=1)
    """The teachers, by the name that sources call them."""
    top_k: NonNegativeInt = 0
    """Tokens of a teacher's distribution that are told apart, the likeliest ones, while all others count as one; 0 for
    the full vocabulary."""
    round: PositiveInt = 8
    """Steps whose texts are read by teachers at once: each teacher is loaded once in so many steps."""
    rollouts: RolloutSettings | None = None
    """On-policy: the sources hold prompts, and the student's own answers are what teachers read. Without it they hold
    texts."""
    keep_teachers: bool = False
    """Whether teachers stay on the devices, where there is room for all of them, in place of being loaded anew."""

    @property
    def readers(self) -> Mapping[str, TeacherSettings]:
        """As for `Objective`: the teachers."""
        return self.teachers

    def loss(
        self, model: Transformer, params: Any, streams: Array, batch: Batch, shared: Any
    ) -> tuple[Array, dict[str, Array]]:
        """As for `Objective`: the divergence from the teacher of these rows, in nats.

        `batch.given` has the teacher's "hidden" states, or "ids" and "scores" of its likeliest tokens; `shared` its
        "head", where it is needed, and "weight". See `Transformer.divergence`.
        """
        counted = targets(batch, 1).astype(jnp.float32)
        known = shared | (batch.given or {})
        teacher = {name: known[name] for name in ("hidden", "head", "ids", "scores") if name in known}
        found = cast(Array, model.apply({"params": params}, streams, counted, **teacher, method="divergence"))
        return shared["weight"] * found, {"divergence": found}
