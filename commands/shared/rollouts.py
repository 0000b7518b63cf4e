"""The engine as training's rollouts: on the same devices, with the weights that are trained, through no file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from v4_jax.commands.shared.trained_engine import TrainedEngine
from v4_jax.config import Config
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.placement import Place
from v4_jax.policy import PolicyName

if TYPE_CHECKING:
    from v4_jax.train.on_policy.rollouts import Prompt, RolloutSettings, Sample


class EngineRollouts:
    """Answers prompts, by the newest weights each time.

    Args:
      config: the architecture.
      place: where training runs; the engine takes the same mesh.
      settings: how answers are generated.
      policy: precision, training's.
      length: tokens that prompt and answer may take together.
      working: entered while a person waits; told what for.

    Raises:
      ShardingError: answers do not split evenly over the mesh.
      ValueError: precision or drafts that do not go with the model.
    """

    def __init__(
        self,
        config: Config,
        place: Place,
        settings: RolloutSettings,
        policy: PolicyName,
        length: int,
        working: Callable[[str], contextlib.AbstractContextManager[None]] = lambda what: contextlib.nullcontext(),
    ) -> None:
        self._config, self._settings, self._working = config, settings, working
        self._engine = TrainedEngine(
            config,
            place,
            slots=max(settings.slots, settings.samples),
            dtype=settings.dtype,
            policy=policy,
            length=length,
            prefill_chunk=settings.prefill_chunk,
            draft=settings.draft,
            kept=settings.replay,
        )

    def sample(self, params: Any, prompts: Sequence[Prompt], samples: int) -> list[list[Sample]]:
        """As for `Rollouts`."""
        from v4_jax.train.on_policy.rollouts import RolloutError, Sample

        with self._working("generating answers"), self._engine.loaded(params) as engine:
            stops = [self._config.eos_token_id]
            numbers = {
                engine.submit(
                    Request(prompt.tokens, self._settings.max_tokens, Sampling(seed=prompt.seed), stops, samples)
                ): place
                for place, prompt in enumerate(prompts)
            }
            events: list[list[list[Any]]] = [[[] for _ in range(samples)] for _ in prompts]
            for event in engine.run():
                if event.finish == "error":
                    raise RolloutError(
                        f"the student's logits after {prompts[numbers[event.request]].where} are not finite numbers: "
                        "there is no answer to learn from"
                    )
                events[numbers[event.request]][event.sample].append(event)
        return [
            [
                Sample(
                    np.asarray([event.id for event in answer], np.int32),
                    np.asarray([event.logprob for event in answer], np.float32),
                    answer[-1].finish == "stop",
                    answer[-1].routing,
                )
                for answer in group
            ]
            for group in events
        ]
