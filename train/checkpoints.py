"""Checkpoints of a run, by Orbax: written in the background, complete or not there at all.

RUN/checkpoints/STEP/params/      the float32 master weights, as `v4_jax.init` returns them
RUN/checkpoints/STEP/adapters/    or, in their place, the factors of adapters: the tree of `Adapters.declarations`
RUN/checkpoints/STEP/stages/      or DSpark's stages: the tree of `DraftStages.declarations`
RUN/checkpoints/STEP/optimizer/   the optimiser's state
RUN/checkpoints/STEP/progress/    JSON: where the data stands, what the loss has been, and the settings
RUN/checkpoints/STEP/ahead/       experts chosen for coming batches, while anticipatory routing is on
RUN/checkpoints/STEP/metrics/     JSON: the step, and its scores by set, where it was evaluated
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from v4_jax.checkpoint.digests import Digests, enabled
from v4_jax.checkpoint.orbax_arrays import chunking, open_arrays
from v4_jax.checkpoint.tensors import CheckpointError, names_in
from v4_jax.checkpoint.trained import CHECKPOINTS, PARAMS, mark_best
from v4_jax.json_files import read_object
from v4_jax.outputs import Routing
from v4_jax.train.objectives.objective import Decisions
from v4_jax.train.settings import differences
from v4_jax.train.step import TrainState

_UNFINISHED = ".orbax-checkpoint-tmp"
# Settings that parameters and optimiser take shape from.
_SHAPING = ("optimizer.matrices", "model", "architecture", "lora", "objective")


class SaveError(Exception):
    """A checkpoint that could not be written. The message is a sentence for the user."""


class FitError(ValueError):
    """A checkpoint of other settings than those it is to go on with. The message is a sentence for the user."""


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
      digests: whether to write and check digests of what is saved.
      params: what the parameters are called: `PARAMS`, or as `v4_jax.checkpoint.record.folder_of` says.
      score: of a step's scores by set, the one that makes it the best; None where no step is evaluated.
      keep_best: also keep the step with the highest score; of several the first.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        digests: bool = True,
        params: str = PARAMS,
        score: Callable[[Mapping[str, float]], float] | None = None,
        keep_best: bool = False,
    ) -> None:
        self._params, self._keep, self._score = params, keep, score
        self._directory = run.absolute() / CHECKPOINTS
        self._digests, self._saving, self._failed = digests and enabled(), 0, False
        kept: list[Any] = [LatestN(keep)]
        kept += [] if keep_every is None else [EveryNSteps(keep_every)]
        kept += [BestN(get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False)] if keep_best else []
        self._keep_best = keep_best
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept),
            best_fn=None if score is None else self._rank,  # without it no scores are saved
            enable_async_checkpointing=True,
            create=True,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._write_digests,
                # In the background they would be made after a save has failed, and what it left was taken away.
                create_directories_asynchronously=False,
            ),
        )
        self._ranks: dict[int, tuple[float, int]] = {}  # of steps that were evaluated, the one being written included
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        manager = ocp.CheckpointManager(
            self._directory,
            options=self._options,
            item_handlers={
                self._params: ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "progress": ocp.JsonCheckpointHandler(),
                "ahead": ocp.PyTreeCheckpointHandler(),
            },
        )
        if self._score is not None:
            found = {step: manager.metrics(step) for step in manager.all_steps()}
            self._ranks = {step: self._rank(metrics) for step, metrics in found.items() if metrics is not None}
            self._mark()
        return manager

    def _mark(self) -> None:
        """Says in the run's directory which checkpoint is the best."""
        if self._keep_best and jax.process_index() == 0:
            mark_best(self._directory.parent, None if self.best is None else self.best[0])

    @property
    def newest(self) -> int | None:
        """Step of the newest complete checkpoint; None without any."""
        return self._manager.latest_step()

    @property
    def oldest(self) -> int:
        """Step of the oldest of the newest checkpoints, which the run goes back to if later ones are damaged; 0 without
        any. What is kept for other reasons may be older."""
        return min(sorted(self._manager.all_steps())[-self._keep :], default=0)

    @property
    def best(self) -> tuple[int, float] | None:
        """The checkpoint with the highest score, its step and score; None as long as none has one."""
        step = max(self._ranks, key=self._ranks.__getitem__, default=None)
        return None if step is None else (step, self._ranks[step][0])

    def _rank(self, metrics: dict[str, Any]) -> tuple[float, int]:
        """Where a step stands by its score; the first of those that are alike is before the others."""
        assert self._score is not None
        return self._score(metrics["scores"]), -metrics["step"]

    def save(
        self,
        state: TrainState,
        progress: dict[str, Any],
        ahead: list[Decisions],
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to save a state, which may be changed as soon as this returns. The best one is waited for.

        Args:
          state: what to save.
          progress: see the module.
          ahead: experts chosen for coming batches.
          scores: by set, where the state was evaluated.

        Raises:
          SaveError: this one or the one before cannot be written.
        """
        self.finish()  # the one before, whose digests are written by its number
        self._saving = step = int(state.step)
        items: dict[str, Any] = {
            # One chunk a matrix, so that an export reads each of them once.
            self._params: ocp.args.StandardSave(state.params, save_args=jax.tree.map(chunking, state.params)),
            "optimizer": ocp.args.StandardSave(state.optimizer),
            "progress": ocp.args.JsonSave(progress),
        }
        if ahead:
            items["ahead"] = ocp.args.PyTreeSave([_plain(decisions) for decisions in ahead])
        metrics = {"step": step, "scores": dict(scores)} if scores else None
        if metrics is not None:
            self._ranks[step] = self._rank(metrics)
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True))
        if self._keep_best and self.best is not None and self.best[0] == step:
            self.finish()  # the one that was the best is gone then
            self._mark()

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
            self._failed = True
            raise SaveError(
                f"the checkpoint cannot be written to {self._directory}: {_reason(error)}; "
                + (f"the newest one is that of step {kept}" if kept is not None else "there is none yet")
            ) from error

    def _write_digests(self) -> None:
        """Of a checkpoint that is written and has not its final name yet: by Orbax's thread, while training goes on."""
        if self._digests:
            for step in self._directory.glob(f"{self._saving}{_UNFINISHED}*"):
                for item in step.iterdir():
                    if item.is_dir():
                        Digests(item).write()

    def _remove_unfinished(self) -> None:
        """Gives back the space that a checkpoint took which cannot be completed."""
        if jax.process_index() == 0:
            for path in self._directory.glob(f"*{_UNFINISHED}*"):
                shutil.rmtree(path, ignore_errors=True)

    def restore(self, shapes: TrainState, say: Callable[[str], None], settings: dict[str, Any]) -> Saved | None:
        """The newest checkpoint that can be read; None without any.

        Those that are damaged are put aside, so that the run can save the same step again.

        Args:
          shapes: what to restore, as placed `jax.ShapeDtypeStruct`s.
          say: told about each that is damaged.
          settings: the run's, as `Settings.model_dump` gives them.

        Raises:
          FitError: the newest one that is whole has parameters or an optimiser's state of another shape.
          OSError: the system cannot read it: it may be whole.
        """
        while (step := self.newest) is not None:
            try:
                self._check(step)
                self._check_fit(step, shapes, settings)
                return self._read(step, shapes)
            except (FitError, MemoryError, PermissionError):
                raise
            except Exception as error:  # whatever a damaged file makes the readers raise
                if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.ENOTDIR):
                    raise
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                aside = _unused(self._directory.parent / "damaged" / str(step))
                say(f"the checkpoint of step {step} cannot be read ({_reason(error)}): put aside as {aside}")
                self._manager.close()
                if jax.process_index() == 0:
                    aside.parent.mkdir(exist_ok=True)
                    (self._directory / str(step)).rename(aside)
                self._manager = self._open()
        return None

    def _check(self, step: int) -> None:
        """Checks the digests of a step, each process those of a part of it.

        Raises:
          CheckpointError: something is damaged.
        """
        if not self._digests:
            return
        part, damaged = (jax.process_index(), jax.process_count()), []
        for item in sorted((self._directory / str(step)).iterdir()):
            if item.is_dir() and (found := Digests(item)):
                damaged += [f"{item.name}: {name}" for name in found.damaged(part=part)]
        if jax.process_count() > 1 and multihost_utils.process_allgather(np.asarray(bool(damaged))).any():
            damaged = damaged or ["a part that another process read"]
        if damaged:
            raise CheckpointError(f"its bytes on disk are not those that were written: {names_in(damaged)}")

    def _check_fit(self, step: int, shapes: TrainState, settings: dict[str, Any]) -> None:
        """Checks that what was saved has the shapes that are wanted.

        Raises:
          FitError: it has not.
          CheckpointError: its arrays' descriptions cannot be read.
        """
        folder = self._directory / str(step)
        different: list[str] = []
        for item, tree in ((self._params, shapes.params), ("optimizer", shapes.optimizer)):
            found = {key: array.shape for key, array in open_arrays(folder / item)}
            wanted = {
                jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }
            different += [f"{item}: {key}" for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
        if different:
            saved = read_object(folder / "progress" / "metadata", CheckpointError).get("settings", {})
            changed = differences(saved, settings)
            cause = [f"{name} changed {how}" for name, how in changed.items() if name.startswith(_SHAPING)]
            cause = cause or [f"{name} changed {how}" for name, how in changed.items()] or ["the program has changed"]
            raise FitError(
                f"the checkpoint of step {step} does not fit these settings: {'; '.join(cause)} "
                f"({names_in(different)}); nothing was touched; expected the settings it was saved with, or a new run"
            )

    def _read(self, step: int, shapes: TrainState) -> Saved:
        items: dict[str, Any] = {
            self._params: ocp.args.StandardRestore(shapes.params),
            "optimizer": ocp.args.StandardRestore(shapes.optimizer),
            "progress": ocp.args.JsonRestore(),
        }
        if (self._directory / str(step) / "ahead").exists():
            items["ahead"] = ocp.args.PyTreeRestore()
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        count = jax.device_put(jnp.int32(step), shapes.step.sharding)
        ahead = [_decisions(saved) for saved in found.get("ahead") or []]
        return Saved(TrainState(count, found[self._params], found["optimizer"]), found["progress"], ahead)

    def close(self) -> None:
        """Ends background work, and takes away what a failed save left."""
        try:
            self._manager.close()
        except Exception:  # of the save that failed, which has been said
            if not self._failed:
                raise
        if self._failed:
            self._remove_unfinished()


def _unused(path: Path) -> Path:
    """The path, or one numbered after it that is not taken: what was put aside is never overwritten."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


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
