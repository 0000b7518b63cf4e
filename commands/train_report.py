"""What `v4-jax train --dry-run` says: what a run would do, and whether its state fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from v4_jax import costs
from v4_jax.checkpoint.trained import steps
from v4_jax.commands.info_report import make_table
from v4_jax.commands.shared.sizes import bytes_text, operations_text, share_text
from v4_jax.config import Config
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


def task_of(settings: Settings) -> Literal["train", "sft", "dspark"]:
    """What `plan` calls a run of these settings."""
    if settings.objective.kind == "dspark":
        return "dspark"
    return "train" if settings.lora is None else "sft"


def flops_of(settings: Settings, config: Config, length: int) -> int:
    """FLOPs of a token of a run, in rows of so many tokens; see `v4_jax.costs`."""
    if settings.objective.kind == "dspark":
        return costs.stage_training_flops(config, length, settings.objective.anchors)
    return costs.training_flops(config, length, frozen=settings.lora is not None)


@dataclasses.dataclass(frozen=True)
class DryRun:
    """A run that was looked at and not begun.

    Attributes:
      settings: the run's.
      origin: what it starts from.
      place: its devices.
      filled: of each stage's first batch, the share of tokens that are no padding.
      state: bytes of masters, moments and what else a device keeps from step to step, the base of an addition included.
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
          v4_jax.train.documents.DataError: a document cannot be used, or there is none.
        """
        from v4_jax.train.programs import Programs

        filled = [
            float((np.asarray(rows.next_batch(stage.rows, stage.length).segment_ids) > 0).mean())
            for stage in settings.stages
        ]
        config = origin.config
        state = bytes_per_device(Programs(settings, config, place).shapes)
        if settings.addition is not None:
            whole = place.mesh or abstract_mesh(dict.fromkeys(MESH_AXES, 1))
            dtype: WeightFormat = "native" if settings.held == "native" else "bfloat16"
            held = config.trunk() if task_of(settings) == "dspark" else config
            base = bytes_per_device(abstract_params(held, whole, place.rules, dtype))
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
        return f"{said}; a step's temporaries come on top, which v4-jax plan --task {task_of(self.settings)} counts"

    def objective(self) -> str:
        """What is made of the next tokens, and who takes part in it."""
        chosen, rollouts = self.settings.objective, self.settings.rollouts
        said: list[str] = [chosen.kind]
        if rollouts is not None:
            said.append(f"{rollouts.prompts:,} prompts a step, {rollouts.samples:,} answers to each")
        said += [f"{name}: {settings.model}" for name, settings in chosen.readers.items()]
        return "; ".join(said)

    def addition(self) -> list[str]:
        """A line on what is trained in place of the weights."""
        settings, config = self.settings, self.origin.config
        if settings.addition is None:
            return []
        leaves = jax.tree.leaves(settings.addition.declarations(config), is_leaf=is_parameter)
        trained = f"{sum(math.prod(leaf.shape) for leaf in leaves):,} parameters"
        if settings.adapters is not None:
            families = ", ".join(settings.adapters.families)
            what = f"adapters: rank {settings.adapters.rank} of {families}, {trained}; weights"
        else:
            drafts, origin = self.origin.drafts, self.origin.checkpoint
            assert drafts is not None and origin is not None
            fresh = drafts.begins_fresh(origin.config)
            layers = ", ".join(map(str, config.dspark_target_layer_ids))
            what = (
                f"stages: {config.dspark_stages}, {'fresh' if fresh else 'those that are there'}, which draft "
                f"{config.dspark_block_size} tokens from layers {layers}, {trained}; the trunk"
            )
        return [f"{what} {settings.held}, left as {'they are' if settings.adapters else 'it is'}"]

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
            *self.addition(),
            f"objective: {self.objective()}",
            f"data: {sources} source{'' if sources == 1 else 's'}, first batches read",
            f"checkpoints: every {every:,} steps, {settings.checkpoints.keep} kept",
            *self.evaluation(),
            self.memory(),
        ]

    def table(self) -> Table:
        """The stages."""
        names = ("stage", "steps", "rows", "length", "attention", "tokens", "FLOPs", "filled")
        table = make_table("Stages", *names)
        for number, (stage, filled) in enumerate(zip(self.settings.stages, self.filled, strict=True)):
            tokens = stage.steps * stage.rows * stage.length
            flops = tokens * flops_of(self.settings, self.origin.config, stage.length)
            row = (number, f"{stage.steps:,}", stage.rows, f"{stage.length:,}", stage.attention, f"{tokens:,}")
            table.add_row(*map(str, row), operations_text(flops), share_text(filled))
        return table
