"""The engine as training's rollouts: on the same devices, with the weights that are trained, through no file."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from v4_jax.commands.shared.models import cache_format
from v4_jax.config import Config
from v4_jax.infer.checks import check_precision
from v4_jax.infer.engine.drafters import choose_drafter
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.parameter_tree import placements
from v4_jax.placement import Place
from v4_jax.policy import PolicyName
from v4_jax.sharding.mesh import make_mesh

if TYPE_CHECKING:
    from v4_jax.train.on_policy.rollouts import Prompt, RolloutSettings, Sample

_PRESET = "long-context"


class EngineRollouts:
    """Answers prompts with an `Engine` that is compiled once and given the newest weights each time.

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
        cache = cache_format("auto", policy)
        check_precision(config, policy, cache)
        choose_drafter(config, settings.draft)
        self._config, self._settings, self._working = config, settings, working
        # A lone device is a mesh, too: trained weights are committed to it, and if all else were left to the default
        # device, programs would be compiled again for every mixture of the two.
        self._place = Place(make_mesh("data=1", jax.devices()[:1]) if place.mesh is None else place.mesh, _PRESET)
        shards = self._place.row_shards
        slots = -(-max(settings.slots, settings.samples) // shards) * shards
        self._place.check(slots)
        self._build = functools.partial(
            Engine,
            config,
            slots=slots,
            max_length=length,
            policy=policy,
            cache_dtype=cache,
            prefill_chunk=min(settings.prefill_chunk, length),
            draft=settings.draft,
            verify_all=True,  # so that answers do not depend on their company
            kept=settings.replay,
            place=self._place,
        )
        self._engine: Engine | None = None

    def sample(self, params: Any, prompts: Sequence[Prompt], samples: int) -> list[list[Sample]]:
        """As for `Rollouts`."""
        from v4_jax.train.on_policy.rollouts import RolloutError, Sample

        with self._working("generating answers"):
            engine = self._loaded(params)
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

    def _loaded(self, params: Any) -> Engine:
        """The engine with these weights."""
        if self._engine is None:
            self._engine = self._build(self._hold(params))
            self._engine.compile()
        else:
            self._engine.replace_parameters(None)  # there is no room for both
            self._engine.replace_parameters(self._hold(params))
        return self._engine

    @functools.cached_property
    def _hold(self) -> Any:
        """From masters where they are trained to weights where they serve, on the devices."""
        from v4_jax.train.precision import held_as

        assert self._place.mesh is not None
        hold = functools.partial(held_as, config=self._config, dtype=self._settings.dtype)
        return jax.jit(hold, out_shardings=placements(self._config, self._place.mesh, self._place.rules))
