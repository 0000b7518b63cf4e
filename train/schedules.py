"""What changes with the step: learning rate, loss weights, stage.

Technical report, section 4.2.2: linear warm-up, a long constant rate, a cosine to a tenth; from the beginning of the
decay on, the MTP loss counts less.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import Array

from v4_jax.layers.stages import Stage
from v4_jax.parameters import Loss
from v4_jax.train.objectives.objective import Weights
from v4_jax.train.settings import Attention, Settings, StageSettings


def learning_rate(settings: Settings) -> optax.Schedule:
    """Step -> learning rate."""
    chosen = settings.optimizer
    final = chosen.learning_rate / 10 if chosen.final_learning_rate is None else chosen.final_learning_rate
    pieces = [optax.constant_schedule(chosen.learning_rate)]
    ends: list[int] = []
    if chosen.warmup_steps:
        # The first step already counts: a rate of zero would waste it.
        first = chosen.learning_rate / chosen.warmup_steps
        pieces.insert(0, optax.linear_schedule(first, chosen.learning_rate, max(1, chosen.warmup_steps - 1)))
        ends.append(chosen.warmup_steps)
    if chosen.decay_steps:
        pieces.append(
            optax.cosine_decay_schedule(chosen.learning_rate, chosen.decay_steps, final / chosen.learning_rate)
        )
        ends.append(settings.steps - chosen.decay_steps)
    return optax.join_schedules(pieces, ends)


def loss_weights(settings: Settings, stage: StageSettings, step: Array) -> Weights:
    """What each loss counts at a step of a stage."""
    losses = settings.losses
    decays = step >= settings.steps - settings.optimizer.decay_steps
    return Weights(
        model=0.0 if stage.attention == "indexer" else 1.0,
        mtp=jnp.where(decays, losses.mtp_decay, losses.mtp) if settings.optimizer.decay_steps else losses.mtp,
        balance=losses.balance,
        indexer=0.0 if stage.attention == "dense" else losses.indexer,
    )


def stage_at(settings: Settings, step: int) -> int:
    """The number of the stage that a step belongs to; the last one beyond the end."""
    end = 0
    for number, stage in enumerate(settings.stages):
        end += stage.steps
        if step < end:
            return number
    return len(settings.stages) - 1


def attention(stage: StageSettings) -> Stage:
    """The model's side of a stage."""
    return Stage(dense=stage.attention != "sparse", indexer_loss=stage.attention != "dense")


def trained_loss(stage: StageSettings) -> Loss | None:
    """The loss whose parameters a stage trains; None for all of them."""
    losses: dict[Attention, Loss | None] = {"dense": "model", "indexer": "indexer", "sparse": None}
    return losses[stage.attention]
