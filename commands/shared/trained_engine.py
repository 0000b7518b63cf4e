"""An engine beside training: on the same devices, with the weights that are trained, through no file."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import jax

from v4_jax.commands.shared.models import cache_format
from v4_jax.config import Config
from v4_jax.infer.checks import check_precision
from v4_jax.infer.engine.drafters import choose_drafter
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.parameter_tree import placements
from v4_jax.placement import Place
from v4_jax.policy import PolicyName
from v4_jax.sharding.mesh import make_mesh

if TYPE_CHECKING:
    from v4_jax.outputs import Kept

_PRESET = "long-context"


class TrainedEngine:
    """An `Engine` that is compiled once and given the newest weights each time.

    Args:
      config: the architecture.
      place: where training runs; the engine takes the same mesh.
      slots: answers under way at a time, rounded up to what splits over the mesh.
      dtype: how it holds weights.
      policy: precision, training's.
      length: tokens that a prompt and its answer may take together.
      prefill_chunk: prompt tokens read between two steps of generation.
      draft: what guesses tokens ahead.
      kept: decisions that answers come with.

    Raises:
      ShardingError: answers do not split evenly over the mesh.
      ValueError: precision or drafts that do not go with the model.
    """

    def __init__(
        self,
        config: Config,
        place: Place,
        *,
        slots: int,
        dtype: Literal["native", "bfloat16", "float32"],
        policy: PolicyName,
        length: int,
        prefill_chunk: int,
        draft: str = "none",
        kept: Kept = "none",
    ) -> None:
        cache = cache_format("auto", policy)
        check_precision(config, policy, cache)
        choose_drafter(config, draft)
        # A lone device is a mesh, too: trained weights are committed to it, and if all else were left to the default
        # device, programs would be compiled again for every mixture of the two.
        self._place = Place(make_mesh("data=1", jax.devices()[:1]) if place.mesh is None else place.mesh, _PRESET)
        shards = self._place.row_shards
        slots = -(-slots // shards) * shards
        self._place.check(slots)
        self._config, self._dtype = config, dtype
        self._build = functools.partial(
            Engine,
            config,
            slots=slots,
            max_length=length,
            policy=policy,
            cache_dtype=cache,
            prefill_chunk=min(prefill_chunk, length),
            draft=draft,
            verify_all=True,  # so that answers do not depend on their company
            kept=kept,
            place=self._place,
        )
        self._engine: Engine | None = None

    @contextlib.contextmanager
    def loaded(self, params: Any) -> Iterator[Engine]:
        """The engine with these weights: float32 masters, or adapters onto their base. At the end they make room."""
        held = self._hold(params)
        if self._engine is None:
            self._engine = self._build(held)
            self._engine.compile()
        else:
            self._engine.replace_parameters(held)
        yield self._engine
        self._engine.replace_parameters(None)

    @functools.cached_property
    def _hold(self) -> Callable[[Any], Any]:
        """From masters where they are trained to weights where they serve, on the devices."""
        from v4_jax.train.precision import held_as

        assert self._place.mesh is not None
        hold = functools.partial(held_as, config=self._config, dtype=self._dtype)
        return jax.jit(hold, out_shardings=placements(self._config, self._place.mesh, self._place.rules))
