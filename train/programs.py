"""What a run compiles: the step of each stage, and the choice of experts ahead of it; and its optimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import optax

from v4_jax.config import Config
from v4_jax.layers.stages import SPARSE
from v4_jax.parameters import Loss
from v4_jax.placement import Place
from v4_jax.policy import Policy
from v4_jax.train.objectives.dspark import DSpark
from v4_jax.train.optimizer import optimizer, whole
from v4_jax.train.schedules import attention, learning_rate, loss_weights, trained_loss
from v4_jax.train.settings import Settings
from v4_jax.train.step import JittedParts, abstract_state, jit_step, make_decide, make_partial_step, make_step
from v4_jax.transformer import Transformer

Compiling = Callable[[str], contextlib.AbstractContextManager[None]]


class Programs:
    """The programs of a run, each of which is compiled when it is called for the first time.

    Args:
      settings: the run's.
      config: the architecture.
      place: the mesh, or one device.
      in_parts: whether a step takes its rows part by part, as those that were made ahead.
      compiling: entered while a program is compiled, which takes minutes; told which.

    Attributes:
      declared: the declarations of what is trained: of all parameters, or of an addition.
      rate: the learning rate by step.
      shapes: shapes, dtypes and places of the state.
    """

    def __init__(
        self,
        settings: Settings,
        config: Config,
        place: Place,
        *,
        in_parts: bool = False,
        compiling: Compiling = lambda what: contextlib.nullcontext(),
    ) -> None:
        self._settings, self._config, self._place = settings, config, place
        self._in_parts, self._compiling = in_parts, compiling
        self._made: dict[tuple[int, str], Any] = {}
        addition = settings.addition
        self.declared = whole(config) if addition is None else addition.declarations(config)
        self.rate = learning_rate(settings)
        self.shapes = abstract_state(config, self.optimizer(), place, self.declared)

    def optimizer(self, loss: Loss | None = None) -> optax.GradientTransformation:
        """What updates the parameters; those alone that learn from a loss, where one is given."""
        chosen = self._settings.optimizer
        return optimizer(
            self._config,
            self.rate,
            matrices=chosen.matrices,
            momentum=chosen.momentum,
            momentum_dtype=chosen.momentum_dtype,
            betas=(chosen.beta1, chosen.beta2),
            eps=chosen.eps,
            weight_decay=chosen.weight_decay,
            rms=chosen.rms,
            balance_speed=self._settings.losses.balance_speed,
            dtype=Policy.of(self._settings.policy).compute_dtype,
            mesh=self._place.mesh,
            rules=self._place.rules,
            loss=loss,
            declared=self.declared,
        )

    def step(self, stage: int, *arguments: Any, given: bool = False) -> Any:
        """Takes a step of a stage, with or without experts given."""
        return self._call(stage, "the step with given experts" if given else "the step", self._step, arguments)

    def decide(self, stage: int, *arguments: Any) -> Any:
        """Chooses the experts of a later step."""
        return self._call(stage, "the choice of experts", self._decide, arguments)

    def _call(self, stage: int, what: str, make: Callable[[int], Any], arguments: tuple[Any, ...]) -> Any:
        if (program := self._made.get((stage, what))) is not None:
            return program(*arguments)
        program = self._made[stage, what] = make(stage)
        with self._compiling(f"{what} of stage {stage + 1} of {len(self._settings.stages)}"):
            return program(*arguments)

    def _step(self, stage: int) -> Any:
        chosen = self._settings.stages[stage]
        make, jit = (make_partial_step, JittedParts) if self._in_parts else (make_step, jit_step)
        step: Any = make(
            self._model(stage),
            self.optimizer(trained_loss(chosen)),
            lambda step: loss_weights(self._settings, chosen, step),
            self._settings.objective,
            fp4_experts=self._settings.fp4_experts,
            addition=self._settings.addition,
        )
        return jit(step, self.shapes, self._place)

    def _decide(self, stage: int) -> Any:
        fp4_experts, addition = self._settings.fp4_experts, self._settings.addition
        decide = make_decide(self._model(stage), fp4_experts=fp4_experts, addition=addition)
        return jax.jit(decide, out_shardings=self._place.replicated)

    def _model(self, stage: int) -> Transformer:
        drafts = isinstance(self._settings.objective, DSpark)
        return Transformer(
            self._config,
            policy=self._settings.policy,
            mesh=self._place.mesh,
            rules=self._place.rules,
            stage=SPARSE if drafts else attention(self._settings.stages[stage]),
            remat=self._settings.remat,
        )
