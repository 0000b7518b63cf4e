"""Checkpoints of a run, by Orbax: written in the background, complete or not there at all.

RUN/checkpoints/STEP/params/      the float32 master weights, as `v4_jax.init` returns them
RUN/checkpoints/STEP/optimizer/   the optimiser's state
RUN/checkpoints/STEP/progress/    JSON: where the data stands, what the loss has been, and the settings
RUN/checkpoints/STEP/ahead/       experts chosen for coming batches, while anticipatory routing is on
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from v4_jax.checkpoint.orbax_arrays import chunking
from v4_jax.checkpoint.trained import CHECKPOINTS
from v4_jax.outputs import Routing
from v4_jax.train.objectives.pretraining import Decisions
from v4_jax.train.step import TrainState


class SaveError(Exception):
    """A checkpoint that could not be written. The message is a sentence for the user."""


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state: parameters and optimiser, on the devices that were asked for.
      progress: see the module.
      ahead: experts of coming batches, in order, on the host.
    """

    state: TrainState
    progress: dict[str, Any]
    ahead: list[Decisions]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      run: the run's directory.
      keep: how many of the newest to keep.
      keep_every: also keep those of multiples of so many steps.
    """

    def __init__(self, run: Path, *, keep: int = 3, keep_every: int | None = None) -> None:
        self._directory = run.absolute() / CHECKPOINTS
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every, enable_async_checkpointing=True, create=True
        )
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._directory,
            options=self._options,
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "progress": ocp.JsonCheckpointHandler(),
                "ahead": ocp.PyTreeCheckpointHandler(),
            },
        )

    @property
    def newest(self) -> int | None:
        """Step of the newest complete checkpoint; None without any."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: dict[str, Any], ahead: list[Decisions]) -> None:
        """Begins to save a state, which may be changed as soon as this returns.

        Raises:
          SaveError: this one or the one before cannot be written.
        """
        step = int(state.step)
        items: dict[str, Any] = {
            # One chunk a matrix, so that an export reads each of them once.
            "params": ocp.args.StandardSave(state.params, save_args=jax.tree.map(chunking, state.params)),
            "optimizer": ocp.args.StandardSave(state.optimizer),
            "progress": ocp.args.JsonSave(progress),
        }
        if ahead:
            items["ahead"] = ocp.args.PyTreeSave([_plain(decisions) for decisions in ahead])
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**items), force=True))

    def finish(self) -> None:
        """Waits until everything is written.

        Raises:
          SaveError: it cannot be.
        """
        self._guard(self._manager.wait_until_finished)

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # Orbax and TensorStore raise many kinds; all mean that nothing was saved
            kept = self.newest
            raise SaveError(
                f"the checkpoint cannot be written to {self._directory}: {_reason(error)}; "
                + (f"the newest one is that of step {kept}" if kept is not None else "there is none yet")
            ) from error

    def restore(self, shapes: TrainState, say: Callable[[str], None]) -> Saved | None:
        """The newest checkpoint that can be read; None without any.

        Those that cannot are put aside, so that the run can save the same step again.

        Args:
          shapes: what to restore, as placed `jax.ShapeDtypeStruct`s.
          say: told about each that cannot be read.
        """
        while (step := self.newest) is not None:
            try:
                return self._read(step, shapes)
            except Exception as error:  # whatever a damaged file makes the readers raise
                aside = self._directory.parent / "damaged" / str(step)
                say(f"the checkpoint of step {step} cannot be read ({_reason(error)}): put aside as {aside}")
                self._manager.close()
                if jax.process_index() == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                    aside.parent.mkdir(exist_ok=True)
                    (self._directory / str(step)).rename(aside)
                self._manager = self._open()
        return None

    def _read(self, step: int, shapes: TrainState) -> Saved:
        items: dict[str, Any] = {
            "params": ocp.args.StandardRestore(shapes.params),
            "optimizer": ocp.args.StandardRestore(shapes.optimizer),
            "progress": ocp.args.JsonRestore(),
        }
        if (self._directory / str(step) / "ahead").exists():
            items["ahead"] = ocp.args.PyTreeRestore()
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        count = jax.device_put(jnp.int32(step), shapes.step.sharding)
        ahead = [_decisions(saved) for saved in found.get("ahead") or []]
        return Saved(TrainState(count, found["params"], found["optimizer"]), found["progress"], ahead)

    def close(self) -> None:
        """Ends background work."""
        self._manager.close()


def _plain(decisions: Decisions) -> dict[str, Any]:
    """The experts chosen, as they are saved."""
    found = {"trunk": np.asarray(decisions.trunk.experts)}
    return found if decisions.mtp is None else found | {"mtp": np.asarray(decisions.mtp.experts)}


def _decisions(saved: dict[str, Any]) -> Decisions:
    """Inverse of `_plain`."""
    return Decisions(Routing(saved["trunk"]), Routing(saved["mtp"]) if "mtp" in saved else None)


def _reason(error: BaseException) -> str:
    """The first line of the error at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
