"""What `v4-jax train --dry-run` says: what a run would do, and whether its state fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from v4_jax import costs
from v4_jax.checkpoint.trained import steps
from v4_jax.commands.info_report import make_table
from v4_jax.commands.shared.sizes import bytes_text, operations_text, share_text
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import is_parameter
from v4_jax.placement import Place, bytes_per_device
from v4_jax.planning.job import WeightFormat, abstract_params
from v4_jax.planning.measure import free_bytes
from v4_jax.sharding.axes import MESH_AXES
from v4_jax.sharding.mesh import abstract_mesh, format_mesh

if TYPE_CHECKING:
    from v4_jax.train.batch import Rows
    from v4_jax.train.settings import Settings
    from v4_jax.train.setup import Origin


@dataclasses.dataclass(frozen=True)
class DryRun:
    """A run that was looked at and not begun.

    Attributes:
      settings: the run's.
      origin: what it starts from.
      place: its devices.
      filled: of each stage's first batch, the share of tokens that are no padding.
      state: bytes of masters, moments and what else a device keeps from step to step, the base of adapters included.
      free: bytes that each device has; None where nothing says.
      sets: what is asked between steps, one a set.
    """

    settings: Settings
    origin: Origin
    place: Place
    filled: list[float]
    state: int
    free: int | None
    sets: Sequence[str] = ()

    @classmethod
    def of(cls, settings: Settings, origin: Origin, place: Place, rows: Rows, sets: Sequence[str] = ()) -> DryRun:
        """Reads each stage's first batch, and counts what is kept.

        Raises:
          v4_jax.train.data.DataError: a document cannot be used, or there is none.
        """
        from v4_jax.train.optimizer import optimizer
        from v4_jax.train.step import abstract_state

        filled = [
            float((np.asarray(rows.next_batch(stage.rows, stage.length).segment_ids) > 0).mean())
            for stage in settings.stages
        ]
        adapters = settings.adapters
        declared = declarations(origin.config) if adapters is None else adapters.declarations(origin.config)
        transform = optimizer(
            origin.config,
            settings.optimizer.learning_rate,
            matrices=settings.optimizer.matrices,
            mesh=place.mesh,
            rules=place.rules,
            declared=declared,
        )
        state = bytes_per_device(abstract_state(origin.config, transform, place, declared))
        if adapters is not None:
            whole = place.mesh or abstract_mesh(dict.fromkeys(MESH_AXES, 1))
            dtype: WeightFormat = "native" if settings.held == "native" else "bfloat16"
            base = bytes_per_device(abstract_params(origin.config, whole, place.rules, dtype))
            state += base * (2 if settings.held == "float32" else 1)
        mesh = Mesh(np.array(jax.devices()[:1]), ("one",)) if place.mesh is None else place.mesh
        return cls(settings, origin, place, filled, state, free_bytes(mesh), sets)

    @property
    def fits(self) -> bool:
        """Whether the state does; what a step needs besides is known when it is compiled."""
        return self.free is None or self.state <= self.free

    def memory(self) -> str:
        """A sentence on that."""
        has = "which do not say what they have" if self.free is None else f"of {bytes_text(self.free)} free"
        said = f"state: {bytes_text(self.state)} of each device, {has}"
        if not self.fits:
            return f"{said}: it has no room; expected a mesh of more devices, or a smaller model"
        task = "train" if self.settings.lora is None else "sft"
        return f"{said}; a step's temporaries come on top, which v4-jax plan --task {task} counts"

    def objective(self) -> str:
        """What is made of the next tokens, and who takes part in it."""
        chosen, rollouts = self.settings.objective, self.settings.rollouts
        said: list[str] = [chosen.kind]
        if rollouts is not None:
            said.append(f"{rollouts.prompts:,} prompts a step, {rollouts.samples:,} answers to each")
        said += [f"{name}: {settings.model}" for name, settings in chosen.readers.items()]
        return "; ".join(said)

    def adapters(self) -> list[str]:
        """A line on what is trained in place of the weights."""
        lora, adapters = self.settings.lora, self.settings.adapters
        if lora is None or adapters is None:
            return []
        factors = jax.tree.leaves(adapters.declarations(self.origin.config), is_leaf=is_parameter)
        trained = sum(math.prod(factor.shape) for factor in factors)
        families = ", ".join(adapters.families)
        return [
            f"adapters: rank {lora.rank} of {families}, {trained:,} parameters; weights {lora.base}, left as they are"
        ]

    def evaluation(self) -> list[str]:
        """A line on what is asked between steps."""
        chosen = self.settings.evaluate
        if chosen is None:
            return []
        kept = f"; the best by {chosen.best or 'their mean'} is kept" if chosen.keep_best else ""
        return [f"evaluation: every {chosen.every:,} steps; {'; '.join(self.sets)}{kept}"]

    def facts(self) -> list[str]:
        """Lines on all but the stages."""
        settings, origin = self.settings, self.origin
        done = steps(settings.run)[-1:]
        begins = "from fresh weights" if origin.checkpoint is None else f"from {settings.model}"
        goes = f"goes on after step {done[0]:,} of {settings.steps:,}" if done else f"new, {begins}"
        mesh = "one device" if self.place.mesh is None else format_mesh(self.place.mesh.shape)
        parameters = costs.parameter_counts(origin.config).total
        every, sources = settings.checkpoints.every, len(settings.data.sources)
        return [
            f"run: {settings.run} ({goes})",
            f"model: {origin.config.num_hidden_layers} layers, {parameters:,} parameters",
            f"mesh: {mesh} of {jax.device_count()}",
            *self.adapters(),
            f"objective: {self.objective()}",
            f"data: {sources} source{'' if sources == 1 else 's'}, first batches read",
            f"checkpoints: every {every:,} steps, {settings.checkpoints.keep} kept",
            *self.evaluation(),
            self.memory(),
        ]

    def table(self) -> Table:
        """The stages."""
        names = ("stage", "steps", "rows", "length", "attention", "tokens", "FLOPs", "filled")
        table, frozen = make_table("Stages", *names), self.settings.lora is not None
        for number, (stage, filled) in enumerate(zip(self.settings.stages, self.filled, strict=True)):
            tokens = stage.steps * stage.rows * stage.length
            flops = tokens * costs.training_flops(self.origin.config, stage.length, frozen=frozen)
            row = (number, f"{stage.steps:,}", stage.rows, f"{stage.length:,}", stage.attention, f"{tokens:,}")
            table.add_row(*map(str, row), operations_text(flops), share_text(filled))
        return table
