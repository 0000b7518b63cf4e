"""Reinforcement learning by groups (GRPO, https://arxiv.org/abs/2402.03300): of a prompt's answers, better than usual.

An answer's advantage is its reward against the mean of its group, in standard deviations. Each of its tokens is made
likelier by that, or less likely, as long as its probability is near the one it was generated with: the engine's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import jax.numpy as jnp
from jax import Array
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from v4_jax.chat import Mode
from v4_jax.train.batch import Batch
from v4_jax.train.objectives.objective import shift, targets
from v4_jax.train.on_policy.rewards import Reward
from v4_jax.train.on_policy.rollouts import RolloutSettings
from v4_jax.train.section import Section
from v4_jax.train.teachers.settings import TeacherSettings
from v4_jax.transformer import Transformer


class LengthPenalty(Section):
    """What long answers cost."""

    free: NonNegativeInt = 0
    """Tokens that cost nothing."""
    rate: NonNegativeFloat
    """What 1,000 tokens beyond those take from the reward."""


class Grpo(Section):
    """Answers that are rewarded more than others to the same prompt become likelier."""

    imitates: ClassVar[bool] = False

    kind: Literal["grpo"] = "grpo"
    """"grpo": the student's own answers, by their rewards."""
    rollouts: RolloutSettings
    """What is asked, and how it is answered."""
    rewards: list[Reward] = Field(min_length=1)
    """What makes an answer good: the rewards of all add up."""
    length: dict[Mode, LengthPenalty] = {}
    """What long answers cost, by the mode that they are given in."""
    round: PositiveInt = 1
    """Steps whose prompts are answered at once, by the weights before the first of them."""
    scale: bool = True
    """Whether an advantage is in standard deviations of its group; otherwise it is in rewards."""
    clip: PositiveFloat = 0.2
    """How far the probability of a token may have fallen, as a share of the engine's, and still be moved further."""
    clip_above: PositiveFloat | None = None
    """How far it may have risen; as far as `clip` by default."""
    kl: NonNegativeFloat = 0.0
    """What a nat of divergence from the reference costs."""
    reference: TeacherSettings | None = None
    """A model to stay near to, as the one that the run started from."""

    @model_validator(mode="after")
    def _groups(self) -> Grpo:
        if self.rollouts.samples < 2:
            raise ValueError(f"rollouts.samples is {self.rollouts.samples}; expected a group of at least 2")
        if self.kl and self.reference is None:
            raise ValueError("kl has a cost, and there is no reference; expected one")
        if self.reference is not None and self.reference.weight != 1:
            raise ValueError(f"reference.weight is {self.reference.weight:g}; what the reference counts is kl")
        return self

    @property
    def readers(self) -> Mapping[str, TeacherSettings]:
        """As for `Objective`: the reference."""
        return {} if self.reference is None else {"reference": self.reference}

    def loss(
        self, model: Transformer, params: Any, streams: Array, batch: Batch, shared: Any
    ) -> tuple[Array, dict[str, Array]]:
        """As for `Objective`: the clipped surrogate, and the divergence from the reference.

        `batch.given` has "logprobs" and "advantage" of each token of an answer, and "reference", its log-probability
        under the reference, where there is one. Divergences are estimated by exp(d) - 1 - d, where d is the difference
        of two log-probabilities: never negative, and right in the mean (http://joschu.net/blog/kl-approx.html).
        """
        del shared
        counted = targets(batch, 1)
        ours = cast(Array, model.apply({"params": params}, streams, shift(batch.tokens, 1), method="log_probabilities"))
        given = {name: jnp.where(counted, shift(value, 1), 0) for name, value in (batch.given or {}).items()}
        ours = jnp.where(counted, ours, 0)
        moved = ours - given["logprobs"]
        ratio, advantage = jnp.exp(moved), given["advantage"]
        above = self.clip if self.clip_above is None else self.clip_above
        clipped = jnp.clip(ratio, 1 - self.clip, 1 + above)
        surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
        total = -jnp.sum(surrogate)
        found = {
            "clipped": jnp.sum(surrogate < ratio * advantage),
            "inference_divergence": jnp.sum(ratio - 1 - moved),
        }
        if self.reference is not None:
            from_reference = given["reference"] - ours
            found["reference_divergence"] = jnp.sum(jnp.exp(from_reference) - 1 - from_reference)
            total = total + self.kl * found["reference_divergence"]
        return total, {name: value.astype(jnp.float32) for name, value in found.items()}
