"""The training loop: batches through the step, checkpoints and metrics on the way, and what happens when it goes wrong.

Whatever ends a run, the next one with the same settings goes on from the newest checkpoint with the same batches, and
takes the same steps as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from v4_jax.checkpoint.orbax_arrays import quiet
from v4_jax.checkpoint.record import folder_of
from v4_jax.checkpoint.trained import BEST, PARAMS
from v4_jax.config import Config
from v4_jax.parameter_tree import drawn
from v4_jax.placement import Place
from v4_jax.profiler import Recorder
from v4_jax.train.batch import Batch, Rows
from v4_jax.train.checkpoints import Checkpoints, Saved
from v4_jax.train.documents import DataError
from v4_jax.train.evaluation import EVALUATION_SECONDS, Evaluation
from v4_jax.train.objectives.dspark import DSpark
from v4_jax.train.objectives.objective import Counts, Decisions
from v4_jax.train.on_policy.rollouts import RolloutError
from v4_jax.train.programs import Compiling, Programs
from v4_jax.train.rounds import Rounds, SavedPart
from v4_jax.train.schedules import stage_at
from v4_jax.train.settings import Settings, differences
from v4_jax.train.setup import record_settings
from v4_jax.train.stability import Recovery, SpikeDetector
from v4_jax.train.step import TrainState

End = Literal["done", "stopped"]

# Where a trace is asked for: steps before it, so that what is traced is compiled, and steps of it.
_SETTLED, _TRACED = 2, 3


class TrainingError(Exception):
    """Training that cannot go on. The message is a sentence for the user; the last good checkpoint is kept."""


class Log(Protocol):
    """Where metrics go."""

    def write(self, step: int, metrics: dict[str, float], over_at: float) -> None:
        """Notes the metrics of a step, counted from 1, that was over at a time of `time.monotonic`."""

    def rewind(self, step: int) -> None:
        """Forgets what was noted after a step, which will be taken again."""


class _Ready(NamedTuple):
    """A batch that was read ahead, and where the data stood after it."""

    batch: Batch
    data: dict[str, Any]


class Trainer:
    """One run on one placement.

    Args:
      settings: the run's.
      config: the architecture.
      place: the mesh, or one device.
      rows: the data, from its beginning.
      fresh: makes the parameters that a new run starts from: float32, where `place` wants them; or the base of an
        addition, where one is trained, as the settings hold it.
      log: where metrics go.
      say: told what a person at the terminal should know.
      compiling: entered while a program is compiled, which takes minutes; told which.
      profile: where to trace some of the first steps, once they are compiled.
      rounds: what the objective has made of the data, some steps at a time; None where it takes the rows as they are.
      evaluation: asks the sets of the settings; None where there are none.
      given: makes what an addition begins with, where the model has it already; None where it is drawn.
    """

    def __init__(
        self,
        settings: Settings,
        config: Config,
        place: Place,
        rows: Rows,
        fresh: Callable[[], Any],
        log: Log,
        say: Callable[[str], None],
        compiling: Compiling = lambda what: contextlib.nullcontext(),
        profile: Path | None = None,
        rounds: Rounds | None = None,
        evaluation: Evaluation | None = None,
        given: Callable[[], Any] = lambda: None,
    ) -> None:
        self._profile, self._rounds, self._evaluation = profile, rounds, evaluation
        self._trace: Recorder | None = None
        self._settings, self._config, self._place, self._rows = settings, config, place, rows
        self._fresh, self._given, self._log, self._say = fresh, given, log, say
        self._checkpoints = Checkpoints(
            settings.run,
            keep=settings.checkpoints.keep,
            keep_every=settings.checkpoints.keep_every,
            digests=settings.checkpoints.digests,
            params=PARAMS if settings.addition is None else folder_of(settings.addition),
            score=None if settings.evaluate is None else settings.evaluate.score,
            keep_best=settings.evaluate is not None and settings.evaluate.keep_best,
        )
        self._addition, self._base = settings.addition, None
        self._programs = Programs(settings, config, place, in_parts=rounds is not None, compiling=compiling)
        stability = settings.stability
        # What is made ahead is made by the parameters of then: it is not made again, nor for steps still further ahead.
        # And of DSpark's stages there is no routing to anticipate: to go back would bring the same.
        self._retries = rounds is None and not isinstance(settings.objective, DSpark)
        self._detector = SpikeDetector(stability.spike if self._retries else None, stability.window)
        self._recovery = Recovery(stability.hold, stability.rollbacks)
        self._ready: deque[_Ready] = deque()
        self._ahead: deque[Decisions] = deque()
        self._data = rows.state()
        self._asked = False

    # ---- where it stands ---------------------------------------------------------------------------------------------

    def _start(self) -> TrainState:
        """The newest checkpoint's state, or a new run's."""
        shapes = self._programs.shapes
        saved = self._checkpoints.restore(shapes, self._say, self._settings.model_dump(mode="json"))
        self._ready.clear()
        self._ahead.clear()
        if self._addition is not None and self._base is None:
            self._base = self._fresh()
        if saved is None:
            params = self._fresh() if self._addition is None else self._begun()
            places = jax.tree.map(lambda x: x.sharding, shapes.optimizer)
            state = jax.jit(self._programs.optimizer().init, out_shardings=places)(params)
            step = jax.device_put(jnp.int32(0), shapes.step.sharding)
            self._rows.restore(self._data)
            self._detector.restore(SpikeDetector(None, 1).state())
            return TrainState(step, params, state)
        self._say_changes(saved)
        self._data = saved.progress["data"]
        self._rows.restore(self._data)
        self._detector.restore(saved.progress["loss"])
        self._recovery.restore(saved.progress["recovery"])
        self._ahead.extend(self._place.put(decisions) for decisions in saved.ahead)
        return saved.state

    def _begun(self) -> Any:
        """What is trained beside the base, at first."""
        if (found := self._given()) is not None:
            return found
        key = jax.random.key(self._settings.seed)
        return drawn(self._programs.declared, key, mesh=self._place.mesh, rules=self._place.rules)

    def _whole(self, state: TrainState) -> Any:
        """The model's parameters, with what is trained beside them where one is trained."""
        return state.params if self._addition is None else self._addition.onto(self._base, state.params)

    def _say_changes(self, saved: Saved) -> None:
        """Tells what is not as it was when a checkpoint was saved."""
        step, before = int(saved.state.step), saved.progress.get("settings", {})
        changed = differences(before, self._settings.model_dump(mode="json"))
        changed.pop("run", None)  # it may lie elsewhere now
        if changed:
            said = "; ".join(f"{name} {how}" for name, how in changed.items())
            self._say(f"settings that changed since step {step:,}: {said}")
        if self._rows.edited(saved.progress["data"]):
            self._say(
                f"note: the training data's files have other names, sizes or texts than at step {step:,}: "
                "the run goes on at the same numbers of documents"
            )

    def _save(self, state: TrainState, scores: Mapping[str, float]) -> None:
        progress = {"data": self._data, "loss": self._detector.state(), "recovery": self._recovery.state()}
        progress["settings"] = self._settings.model_dump(mode="json")
        self._checkpoints.save(state, progress, list(self._ahead), scores)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> End:
        """Trains until the last stage is over, or until SIGTERM or SIGINT asks to stop.

        Raises:
          TrainingError: the loss does not come back from a spike, or is not finite.
          v4_jax.train.checkpoints.SaveError: a checkpoint cannot be written.
          v4_jax.train.checkpoints.FitError: the newest checkpoint is one of other settings.
          v4_jax.train.documents.DataError: a document cannot be used; what was learnt before it is saved.
          v4_jax.train.on_policy.rollouts.RolloutError: answers cannot be had or judged; likewise.
        """
        with self._stopping(), quiet():  # what Orbax would log reaches us as exceptions
            try:
                return self._run()
            finally:
                if self._trace is not None:
                    self._trace.close()
                self._checkpoints.close()

    def _run(self) -> End:
        begin = self._data
        state = self._start()
        step = saved = int(state.step)
        self._trace = self._recorder(step)
        record_settings(self._settings)
        if step:
            self._say(f"continuing after step {step:,} of {self._settings.steps:,}")
        self._log.rewind(step)
        last: tuple[int, Any, float | None] | None = None  # read while the next step runs
        while True:
            over = step >= self._settings.steps
            scores: dict[str, float] = {}
            if last is not None and self._evaluation_is_due(step):
                last, scores = self._evaluate(state, last)
            due = over or (step > saved and (step % self._settings.checkpoints.every == 0 or self._is_best(scores)))
            stop = self._stop_is_due(step)
            problem: DataError | RolloutError | None = None
            if not (due or stop):
                try:
                    following, metrics = self._take(state, step)
                    # Where steps are not run in the background, this one is over, and reading its loss takes no time.
                    over_at = time.monotonic() if all(x.is_ready() for x in jax.tree.leaves(metrics)) else None
                except (DataError, RolloutError) as error:
                    problem, stop = error, True  # what was learnt is saved first
            if last is not None and self._spiked(*last):
                self._data = begin
                state = self._back(last[0])
                step = saved = int(state.step)
                last = None
                continue
            if due or stop:
                last = None
                if step > saved:
                    self._save(state, scores)
                    saved = step
                if over or stop:
                    self._checkpoints.finish()
                    if problem is not None:
                        raise problem
                    self._say_skipped()
                    self._say_best()
                    return "done" if over else "stopped"
                continue
            state, step = following, step + 1
            last = step, metrics, over_at

    def _say_skipped(self) -> None:
        if skipped := self._data.get("skipped"):
            self._say(f"{skipped:,} documents could not be used and were left out, each time they came")

    def _say_best(self) -> None:
        best, chosen = self._checkpoints.best, self._settings.evaluate
        if best is not None and chosen is not None and chosen.keep_best:
            what = "the mean of all sets" if chosen.best is None else chosen.best
            where = self._settings.run / BEST
            self._say(
                f"the best checkpoint is that of step {best[0]:,}, with a score of {best[1]:.3f} ({what}): {where}"
            )

    # ---- between steps -----------------------------------------------------------------------------------------------

    def _evaluation_is_due(self, step: int) -> bool:
        chosen = self._settings.evaluate
        return chosen is not None and (step % chosen.every == 0 or step >= self._settings.steps)

    def _evaluate(
        self, state: TrainState, last: tuple[int, Any, float | None]
    ) -> tuple[tuple[int, Any, float | None], dict[str, float]]:
        """Asks the sets after a step, whose metrics the scores become, too.

        A checkpoint is saved after the line of its step is written: a run that goes on from it has the scores.
        """
        assert self._evaluation is not None and self._settings.evaluate is not None
        step, metrics, over_at = last
        jax.block_until_ready(metrics)
        begin = time.monotonic()
        scores = self._evaluation.scores(self._whole(state))
        found = self._settings.evaluate.metrics(scores) | {EVALUATION_SECONDS: time.monotonic() - begin}
        return (step, metrics | found, over_at or begin), scores

    def _is_best(self, scores: Mapping[str, float]) -> bool:
        """Whether scores are above those of all checkpoints."""
        chosen, best = self._settings.evaluate, self._checkpoints.best
        if chosen is None or not chosen.keep_best or not scores:
            return False
        return best is None or chosen.score(scores) > best[1]

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _take(self, state: TrainState, step: int) -> tuple[TrainState, Any]:
        """Begins one step."""
        if self._trace is not None:
            self._trace.at(step)
        stage = stage_at(self._settings, step)
        if self._rounds is not None:
            return self._take_parts(self._rounds, state, step, stage)
        if self._recovery.anticipates(step):
            while len(self._ahead) <= self._settings.stability.ahead:
                later = step + len(self._ahead)
                then = stage_at(self._settings, later)
                following = self._batch(step, later)
                self._ahead.append(self._programs.decide(then, state.params, following, self._base))
            decisions = self._ahead.popleft()
        else:
            self._ahead.clear()
            decisions = None
        batch = self._batch(step, step)
        self._data = self._ready.popleft().data
        given = decisions is not None
        return self._programs.step(stage, state, batch, decisions, self._base, given=given)

    def _take_parts(self, rounds: Rounds, state: TrainState, step: int, stage: int) -> tuple[TrainState, Any]:
        """Begins a step whose rows were made ahead."""
        oldest = self._checkpoints.oldest
        prepared = rounds.step(step, self._settings.steps, self._whole(state), self._data, oldest)
        counts = Counts.of(jax.tree.map(lambda *rows: np.stack(rows), *(part.rows() for part in prepared.parts)))
        counts = counts._replace(**self._place.put({"loss": counts.loss, "mtp": counts.mtp, "tokens": counts.tokens}))

        def parts() -> Iterator[Any]:
            for part in map(SavedPart.read, prepared.parts):
                batch, given = part.batch._replace(given=None), part.batch.given
                put = None if given is None else {name: self._place.put_tokens(x) for name, x in given.items()}
                decisions = jax.tree.map(lambda x: self._place.put_tokens(x, 1), part.decisions)
                yield self._place.put(batch)._replace(given=put), decisions, rounds.shared(part)

        after, metrics = self._programs.step(stage, state, parts(), counts, self._base)
        self._data = prepared.data
        return after, metrics | {name: jnp.float32(value) for name, value in prepared.metrics.items()}

    def _batch(self, step: int, later: int) -> Batch:
        """The batch of a coming step [microbatches, B, S], on devices."""
        while len(self._ready) <= later - step:
            stage = self._settings.stages[stage_at(self._settings, step + len(self._ready))]
            read = self._rows.next_batch(stage.rows, stage.length)
            cut = jax.tree.map(lambda x, stage=stage: x.reshape(stage.microbatches, -1, stage.length), read)
            self._ready.append(_Ready(cut, self._rows.state()))
        return self._place.put(self._ready[later - step].batch)

    def _spiked(self, step: int, metrics: Any, over_at: float | None) -> bool:
        """Notes a step's metrics; returns whether the loss jumped."""
        found = {name: float(value) for name, value in jax.device_get(metrics).items()}
        over_at = over_at or time.monotonic()
        spiked = self._detector.spiked(found["loss"]) or not found.pop("finite")
        anticipates = self._recovery.anticipates(step - 1)
        found |= {"learning_rate": float(self._programs.rate(step - 1)), "anticipatory_routing": float(anticipates)}
        self._log.write(step, found, over_at)
        return spiked

    def _back(self, spike: int) -> TrainState:
        """Goes back to the newest checkpoint after a spike, and on with anticipatory routing."""
        kept = self._recovery.state()
        self._checkpoints.finish()
        state = self._start()
        to = int(state.step)
        self._recovery.restore(kept)
        again = self._retries and self._recovery.back(spike, to)
        if not again:
            attempts = self._settings.stability.rollbacks if self._retries else 0
            tried = f" again after {attempts} attempts with anticipatory routing" if attempts else ""
            what = "jumped or is not finite" if self._retries else "is not finite"
            raise TrainingError(f"the loss of step {spike} {what}{tried}; the run stays at step {to}")
        self._say(
            f"the loss of step {spike:,} jumped or is not finite: back to step {to:,}, with anticipatory routing until "
            f"step {self._recovery.until:,}"
        )
        self._log.rewind(to)
        return state

    # ---- around it ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask the loop to save and end; a second SIGINT ends it at once."""

        def ask(number: int, frame: Any) -> None:
            del frame
            if self._asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_is_due(self, step: int) -> bool:
        """Whether to stop, as all processes agree."""
        if jax.process_count() == 1:
            return self._asked
        if step % self._settings.log.every:
            return False
        return bool(np.any(multihost_utils.process_allgather(np.asarray(self._asked))))

    def _recorder(self, begin: int) -> Recorder | None:
        """What traces some steps of a run that goes on at a step: those of the settings, or the first ones."""
        if self._profile is not None:
            return Recorder(self._profile, begin + _SETTLED, _TRACED)
        if self._settings.log.profile is not None:
            return Recorder(self._settings.run / "profile", *self._settings.log.profile)
        return None
