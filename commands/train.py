"""`v4-jax train`: continued pretraining, fine-tuning, distillation and reinforcement, from a settings file."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import jax
import tyro
from rich.table import Table

from v4_jax.checkpoint import CheckpointError
from v4_jax.commands import INTERRUPTED
from v4_jax.commands.shared import devices
from v4_jax.commands.shared.console import CommandError, bad_input, needs, say, show, working
from v4_jax.commands.shared.evaluation import EngineEvaluation
from v4_jax.commands.shared.options import Flag, OptionalCount, OptionalFile
from v4_jax.commands.shared.profiling import check_profile
from v4_jax.commands.shared.rollouts import EngineRollouts
from v4_jax.commands.train_report import DryRun, flops_of, task_of
from v4_jax.commands.train_rows import print_rows
from v4_jax.config import Config
from v4_jax.placement import Place, check_mesh
from v4_jax.planning.mesh_choice import Demand
from v4_jax.sharding.axes import Preset, ShardingError
from v4_jax.sharding.mesh import abstract_mesh

if TYPE_CHECKING:
    from v4_jax.train.batch import Rows
    from v4_jax.train.metrics import Metrics
    from v4_jax.train.rounds import Rounds
    from v4_jax.train.settings import Settings
    from v4_jax.train.setup import Origin

Words = Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SETTINGS.yaml FIELD=VALUE", help_behavior_hint="")
]


def train(
    words: Words = (),
    /,
    *,
    fields: Flag = False,
    dry_run: Flag = False,
    show_rows: OptionalCount = None,
    profile: OptionalFile = None,
    distributed: Flag = False,
) -> int:
    """Trains a model: from released weights, from a run of this command, or from nothing.

    A run lives in a directory, which the settings name. The same command again continues it after whatever ended it:
    from the newest checkpoint, with the same batches, to the same losses. SIGTERM and Ctrl-C save first. The exit code
    is 0 when all steps are done, and 130 when the run was asked to stop.

    Examples:
      v4-jax train --fields
      v4-jax train flash.yaml
      v4-jax train flash.yaml --dry-run
      v4-jax train chats.yaml --show-rows 4
      v4-jax train flash.yaml optimizer.learning_rate=1e-4 stages.0.steps=2000
      v4-jax plot runs/flash
      v4-jax export runs/flash trained

    Args:
      words: A YAML file, and settings to change in it, as in optimizer.learning_rate=1e-4.
      fields: List every setting with its default, and end.
      dry_run: Check settings, data and whether the state fits, say what the run would do, and end; nothing is trained
        or written. Exit code 1: it does not fit.
      show_rows: Print so many of the first rows as text, with what is trained green, or in brackets where there are no
        colours, and end. Of conversations that is what the assistant says.
      profile: A directory for a trace of three steps after the first two, for XProf or Perfetto.
      distributed: Join the other processes of the job, each with devices of its own.
    """
    with needs("train"):
        from v4_jax.train.settings import describe, read_settings

    if fields:
        show(_table(describe()))
        return 0
    if not words:
        raise CommandError("there are no settings; expected a YAML file (v4-jax train --fields lists what it may hold)")
    path = None if "=" in words[0] else Path(words[0])
    with bad_input():
        settings = read_settings(path, words if path is None else words[1:])
    check_profile(profile)
    if show_rows is not None:
        return _show_rows(settings, show_rows)
    return _train(settings, distributed, dry_run, profile)


def _train(settings: Settings, distributed: bool, dry_run: bool, profile: Path | None) -> int:
    with needs("train"):
        from v4_jax.train.metrics import Metrics
        from v4_jax.train.setup import Origin, check_run, locked, notes, open_rounds, open_rows, open_run
        from v4_jax.train.trackers import Tracker, wanted

    services = wanted(settings)
    for service in services:
        with needs(service):
            importlib.import_module(service)

    devices.join(distributed)
    with bad_input():
        origin = Origin.of(settings)
        place = _place(settings, origin.config)
        rows = open_rows(settings, origin, say)
        rounds = open_rounds(settings, origin, place, rows, _rollouts(settings, origin, place), _loading)
        evaluation = _evaluation(settings, origin, place)
        if dry_run:
            check_run(settings, origin)
        else:
            open_run(settings, origin)
    for note in notes(settings, origin):
        say(f"note: {note}")
    if dry_run:
        with bad_input():
            found = DryRun.of(settings, origin, place, rows, evaluation.facts() if evaluation else [])
        print("\n".join(found.facts()))
        show(found.table())
        return 0 if found.fits else 1
    with contextlib.ExitStack() as stack:
        with bad_input():
            stack.enter_context(locked(settings.run))
            metrics = None
            if not jax.process_index():
                trackers = [Tracker(service, settings, say) for service in services]
                metrics = Metrics(settings.run, tensorboard=settings.log.tensorboard, trackers=trackers)
        stack.enter_context(metrics or contextlib.nullcontext())
        return _run(settings, origin, place, rows, rounds, evaluation, metrics, profile)


def _show_rows(settings: Settings, count: int) -> int:
    with needs("train"):
        from v4_jax.train.setup import Origin, open_rows

    with bad_input():
        origin = Origin.of(settings)
        batch = open_rows(settings, origin, say).next_batch(count, settings.stages[0].length)
    print_rows(batch, origin.tokenizer)
    return 0


def _run(
    settings: Settings,
    origin: Origin,
    place: Place,
    rows: Rows,
    rounds: Rounds | None,
    evaluation: EngineEvaluation | None,
    metrics: Metrics | None,
    profile: Path | None,
) -> int:
    from v4_jax.train.checkpoints import FitError, SaveError
    from v4_jax.train.documents import DataError
    from v4_jax.train.loop import Trainer, TrainingError
    from v4_jax.train.metrics import MetricsError, Report
    from v4_jax.train.on_policy.rollouts import RolloutError
    from v4_jax.train.schedules import stage_at
    from v4_jax.train.settings import SettingsError

    given = (CheckpointError, DataError, FitError, MetricsError, SettingsError, ShardingError)
    report = Report(
        metrics,
        steps=settings.steps,
        every=settings.log.every,
        length=lambda step: settings.stages[stage_at(settings, step)].length,
        flops=functools.partial(flops_of, settings, origin.config),
        say=say,
    )
    try:
        with bad_input(kinds=given):
            end = Trainer(
                settings,
                origin.config,
                place,
                rows,
                lambda: origin.fresh(place, settings.seed, settings.held),
                report,
                say,
                compiling=_compiling,
                profile=profile,
                rounds=rounds,
                evaluation=evaluation,
                given=lambda: origin.stages(place),
            ).run()
    except (RolloutError, SaveError, TrainingError) as error:
        raise CommandError(str(error)) from None
    say(f"{end} at step {report.step:,} of {settings.steps:,}: {settings.run}")
    return 0 if end == "done" else INTERRUPTED


@contextlib.contextmanager
def _compiling(what: str) -> Iterator[None]:
    """Says what a silence of minutes is for, and shows that it goes on."""
    say(f"compiling {what}")
    with working(f"compiling {what}"):
        yield


def _rollouts(settings: Settings, origin: Origin, place: Place) -> EngineRollouts | None:
    """The engine that answers prompts, where the objective has them."""
    if settings.rollouts is None:
        return None
    length = max(stage.length for stage in settings.stages)
    return EngineRollouts(origin.config, place, settings.rollouts, settings.policy, length, working)


def _evaluation(settings: Settings, origin: Origin, place: Place) -> EngineEvaluation | None:
    """What asks the sets between steps, where there are some."""
    from v4_jax.train.setup import effort_profile

    if settings.evaluate is None:
        return None
    return EngineEvaluation(
        origin.config,
        origin.tokenizer,
        place,
        settings.evaluate,
        settings.policy,
        profile=effort_profile(settings, origin),
        bos=settings.data.begin,
        working=working,
    )


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Shows that something is loaded."""
    with working(f"loading {what}"):
        yield


def _place(settings: Settings, config: Config) -> Place:
    """The mesh of the settings, or the best that fits, which every stage's batches split evenly over."""
    mesh = devices.wanted_mesh(settings.mesh)
    preset = devices.training_preset(config, mesh)
    if mesh == devices.AUTO:
        first = settings.stages[0]
        rows = first.rows // first.microbatches
        demand = Demand(config, first.length, rows, preset, settings.held, task=task_of(settings))
        return devices.best_place(demand, lambda sizes: _splits(settings, config, sizes, preset))
    place = Place()
    for stage in settings.stages:
        rows = stage.rows // stage.microbatches
        place = devices.place(config, mesh, preset, batch=rows, length=stage.length, dtype=settings.held)
    return place


def _splits(settings: Settings, config: Config, sizes: dict[str, int], preset: Preset) -> bool:
    """Whether every stage's batches split evenly over a mesh."""
    mesh, native = abstract_mesh(sizes), settings.held == "native"
    try:
        for stage in settings.stages:
            rows = stage.rows // stage.microbatches
            check_mesh(config, mesh, preset, batch=rows, length=stage.length, native=native)
    except ShardingError:
        return False
    return True


def _table(fields: Iterable[tuple[str, str, str]]) -> Table:
    table = Table(title="Settings of v4-jax train", title_justify="left")
    table.add_column("field", no_wrap=True)
    table.add_column("default", overflow="fold")
    table.add_column("meaning", overflow="fold")
    for row in fields:
        table.add_row(*row)
    return table
