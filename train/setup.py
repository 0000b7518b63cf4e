"""From settings to a run that is ready to go: its directory, its model's origin, its data."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from v4_jax.architecture import RATIO_OF_ROLE
from v4_jax.chat import EffortProfile, read_profile
from v4_jax.checkpoint import Checkpoint, load, local, open_checkpoint
from v4_jax.checkpoint.record import Record, folder_of, read_record
from v4_jax.checkpoint.released import companions
from v4_jax.checkpoint.trained import RECORD, RUN, STAGES, run_of
from v4_jax.config import Config
from v4_jax.draft_stages import DSPARK
from v4_jax.files import complete, try_lock
from v4_jax.parameter_tree import declarations, init
from v4_jax.placement import Place
from v4_jax.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from v4_jax.train.batch import Rows
from v4_jax.train.corpus import Corpus
from v4_jax.train.documents import Source
from v4_jax.train.objectives.distillation import Distillation
from v4_jax.train.objectives.dspark import DSpark
from v4_jax.train.objectives.grpo import Grpo
from v4_jax.train.objectives.sft import Conversations
from v4_jax.train.on_policy.advantages import GroupAdvantages
from v4_jax.train.on_policy.prompts import Prompts
from v4_jax.train.on_policy.rollouts import Rollouts, RolloutSettings
from v4_jax.train.on_policy.rows import Judge, OnPolicy, unjudged
from v4_jax.train.packing import PackedRows
from v4_jax.train.rounds import GivenTexts, Rounds, Supply
from v4_jax.train.schedules import stage_at
from v4_jax.train.settings import Settings, SettingsError, SourceSettings, write_settings
from v4_jax.train.teachers.reading import TOKENIZER, Teachers
from v4_jax.train.teachers.rows import TeacherRows

SETTINGS = "settings.yaml"


class Origin(NamedTuple):
    """What a run starts from.

    Attributes:
      config: the architecture of what is trained, fresh stages included.
      tokenizer: of its texts.
      files: companions to carry along: name -> file.
      profile: what the model takes reasoning efforts for, by its own encoding; None if that says nothing.
      checkpoint: weights to start from; None for fresh ones.
      drafts: the objective, where DSpark's stages are what is trained.
    """

    config: Config
    tokenizer: Tokenizer
    files: Mapping[str, Path]
    checkpoint: Checkpoint | None
    profile: EffortProfile | None = None
    drafts: DSpark | None = None

    @classmethod
    def of(cls, settings: Settings) -> Origin:
        """Looks at what the settings name.

        Raises:
          SettingsError, ValueError, OSError: it is not there or cannot be used.
        """
        checkpoint, directory = None, settings.tokenizer
        drafts = settings.objective if isinstance(settings.objective, DSpark) else None
        if settings.model is not None:
            checkpoint = open_checkpoint(settings.model)
            config, directory = checkpoint.config, directory or run_of(settings.model) or local(settings.model)
            config = drafts.of(config) if drafts else config
        elif isinstance(settings.architecture, Path):
            config = Config.from_hf(settings.architecture)
        else:
            config = Config.from_hf(settings.architecture or {})
        if directory is None:
            return cls(config, ByteTokenizer(config.vocab_size), {}, checkpoint, None, drafts)
        tokenizer, profile = load_tokenizer(directory, config.vocab_size), read_profile(directory)
        return cls(config, tokenizer, companions(directory), checkpoint, profile, drafts)

    def fresh(self, place: Place, seed: int, held: Literal["native", "bfloat16", "float32"] = "float32") -> Any:
        """The parameters that a run starts from, placed: float32 masters, or the base of an addition as it is held."""
        if self.checkpoint is None:
            return init(self.config, jax.random.key(seed), mesh=place.mesh, rules=place.rules)
        wanted = declarations(self.config.trunk() if self.drafts else self.checkpoint.config)
        return load(self.checkpoint, dtype=held, mesh=place.mesh, rules=place.rules, only=wanted.__contains__)[1]

    def stages(self, place: Place) -> Any:
        """The stages that the model has, where such are trained, placed: float32 masters. None: they are fresh."""
        if self.drafts is None or self.checkpoint is None or self.drafts.begins_fresh(self.checkpoint.config):
            return None
        return load(self.checkpoint, dtype="float32", mesh=place.mesh, rules=place.rules, only=DSPARK.__eq__)[1]


def open_rows(settings: Settings, origin: Origin, say: Callable[[str], None] = lambda text: None) -> Rows:
    """The run's data, from its beginning.

    Args:
      settings: the run's.
      origin: whose tokenizer reads it.
      say: told about the first documents that are left out.

    Raises:
      v4_jax.train.documents.DataError: a source cannot be opened.
    """
    if settings.rollouts is not None:
        return _open_prompts(settings, origin, settings.rollouts, say)
    if isinstance(settings.objective, Distillation):
        sources = {name: settings.sources_of(name) for name in settings.objective.teachers}
        rows = {name: _open_rows(settings, origin, found, say) for name, found in sources.items() if found}
        return TeacherRows(rows, {name: sum(source.weight for source in sources[name]) for name in rows})
    return _open_rows(settings, origin, settings.data.sources, say)


def _open_rows(
    settings: Settings, origin: Origin, sources: Sequence[SourceSettings], say: Callable[[str], None]
) -> PackedRows:
    """Rows of some of the run's sources."""
    data, tokenizer = settings.data, origin.tokenizer
    corpus = Corpus(
        [Source(**source.model_dump(exclude={"teacher"})) for source in sources],
        tokenizer.encode,
        vocab_size=origin.config.vocab_size,
        bos_id=tokenizer.bos_id if data.begin else None,
        eos_id=tokenizer.eos_id if data.end else None,
        seed=settings.seed,
        shuffle=data.shuffle,
        on_bad=_Skipped(say) if data.on_bad == "skip" else None,
        conversations=_conversations(settings, origin),
    )
    return PackedRows(corpus, open_rows=data.open_rows, threads=data.threads)


def open_rounds(
    settings: Settings,
    origin: Origin,
    place: Place,
    rows: Rows,
    rollouts: Rollouts | None = None,
    loading: Callable[[str], contextlib.AbstractContextManager[None]] = lambda what: contextlib.nullcontext(),
) -> Rounds | None:
    """What is made some steps ahead; None where the objective needs nothing made.

    Args:
      settings: the run's.
      origin: what it starts from.
      place: where it runs.
      rows: from `open_rows`.
      rollouts: what answers prompts, where the objective has them answered.
      loading: entered while a teacher is loaded; told which.

    Raises:
      SettingsError, ValueError, OSError: a teacher cannot be used.
    """
    objective = settings.objective
    if settings.rollouts is None and not objective.readers:
        return None
    file = origin.files.get(TOKENIZER)
    read: Any = functools.partial(
        Teachers, config=origin.config, place=place, tokenizer=file.read_bytes() if file else None, loading=loading
    )
    teachers: Teachers | None = None
    judge: Judge = unjudged
    if isinstance(objective, Distillation):
        known = "top" if objective.top_k else "hidden"
        teachers = read(objective.readers, known=known, top_k=objective.top_k, keep=objective.keep_teachers)
    elif isinstance(objective, Grpo):
        judge = GroupAdvantages(objective, origin.tokenizer)
        teachers = read(objective.readers, known="score") if objective.readers else None

    def part(step: int) -> tuple[int, int]:
        stage = settings.stages[stage_at(settings, step)]
        return stage.rows // stage.microbatches, stage.length

    def parts(step: int) -> tuple[int, int, int]:
        return settings.stages[stage_at(settings, step)].microbatches, *part(step)

    supply: Supply
    if isinstance(rows, Prompts):
        assert rollouts is not None and settings.rollouts is not None
        supply = OnPolicy(rows, rollouts, settings.rollouts, part, RATIO_OF_ROLE["csa"], judge)
    else:
        supply = GivenTexts(rows, parts)
    made_for = settings.model_dump(mode="json", exclude={"run", "log", "checkpoints", "evaluate"})
    return Rounds(settings.run, getattr(objective, "round", 1), supply, teachers, made_for)


def _open_prompts(settings: Settings, origin: Origin, rollouts: RolloutSettings, say: Callable[[str], None]) -> Prompts:
    """The run's prompts."""
    data, tokenizer, objective = settings.data, origin.tokenizer, settings.objective
    only = next(iter(objective.readers), "")
    return Prompts(
        [Source(**source.model_dump(exclude={"teacher"})) for source in data.sources],
        [source.teacher or only for source in data.sources],
        tokenizer.encode,
        vocab_size=origin.config.vocab_size,
        bos_id=tokenizer.bos_id if data.begin else None,
        seed=settings.seed,
        shuffle=data.shuffle,
        on_bad=_Skipped(say) if data.on_bad == "skip" else None,
        conversations=_conversations(settings, origin),
        answer=rollouts.max_tokens,
    )


def effort_profile(settings: Settings, origin: Origin) -> EffortProfile:
    """What the run's model takes reasoning efforts for."""
    chosen = settings.data.effort_profile
    return origin.profile or "preview" if chosen == "auto" else chosen


def _conversations(settings: Settings, origin: Origin) -> Conversations:
    """How the run's conversations become texts."""
    return Conversations(settings.data.mode, effort_profile(settings, origin))


class _Skipped:
    """Says each of the first documents that are left out once; more of them only count."""

    def __init__(self, say: Callable[[str], None], most: int = 10) -> None:
        self._say, self._most, self._said = say, most, set[str]()

    def __call__(self, problem: str) -> None:
        if problem in self._said or len(self._said) > self._most:
            return
        self._said.add(problem)
        more = len(self._said) > self._most
        self._say("left out: more documents, which only count from here" if more else f"left out: {problem}")


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds a run for this command alone, by its first process; the lock ends with the process, however it ends.

    Raises:
      SettingsError: another process trains it.
    """
    if jax.process_index():
        yield
        return
    with (run / ".lock").open("a+b") as file:
        if not try_lock(file.fileno()):
            raise SettingsError(f"{run} is being trained by another process; expected one process a run")
        yield


def record_settings(settings: Settings) -> None:
    """Notes what a run goes on with, when it does."""
    if jax.process_index() == 0:
        with complete(settings.run / SETTINGS) as working:
            working.write_text(write_settings(settings), encoding="utf-8")


def open_run(settings: Settings, origin: Origin) -> None:
    """Makes the run's directory, or checks that the one there is of this model: the first process for all.

    Raises:
      SettingsError: the directory is something else, or of another architecture.
      OSError: it cannot be made.
    """
    problem: Exception | None = None
    if jax.process_index() == 0:
        try:
            _open_run(settings, origin)
        except (SettingsError, OSError) as error:
            problem = error
    if jax.process_count() > 1:
        fine = multihost_utils.broadcast_one_to_all(np.asarray(problem is None))
        if not fine and problem is None:
            raise SettingsError(f"the first process cannot use {settings.run}, as it says itself")
    if problem is not None:
        raise problem


def check_run(settings: Settings, origin: Origin) -> None:
    """Checks that a run's directory can be made, or that the one there is of this model.

    Raises:
      SettingsError: the directory is something else, of another architecture, or where nothing can be made.
    """
    run = settings.run
    if run.exists() and not (run / RUN).exists() and (not run.is_dir() or any(run.iterdir())):
        raise SettingsError(f"{run} exists and is not a training run; expected a new name, or a run to continue")
    config = origin.config.to_hf()
    if (run / RUN).exists():
        found = json.loads((run / "config.json").read_text(encoding="utf-8"))
        if different := sorted(key for key in {*found, *config} if found.get(key) != config.get(key)):
            raise SettingsError(
                f"{run} is a run of another architecture (it differs in {', '.join(different)}); expected a new name"
            )
        check_record(settings, origin)
    there = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise SettingsError(f"{run} cannot be made in {there}; expected a directory that can be written")


def record_of(settings: Settings, origin: Origin) -> Record | None:
    """What a run's adapters, or stages, belong to; None where the whole model is trained.

    Raises:
      SettingsError: the model has nothing that they could be beside.
    """
    addition = settings.addition
    if addition is None or settings.model is None or origin.checkpoint is None:
        return None
    if not addition.declarations(origin.config):
        families = ", ".join(settings.adapters.families if settings.adapters else ())
        raise SettingsError(f"lora.families are {families}, and {settings.model} has no such matrices; expected others")
    return Record.of(settings.model, origin.checkpoint, addition)


def check_record(settings: Settings, origin: Origin) -> None:
    """Checks that a run that is there trains what it trained: the weights, or this addition to this model.

    Raises:
      SettingsError: it does not.
      v4_jax.checkpoint.CheckpointError: its record cannot be read.
    """
    run, found, wanted = settings.run, read_record(settings.run), record_of(settings, origin)
    before, now = ("weights" if record is None else folder_of(record.addition) for record in (found, wanted))
    if before != now:
        told = "objective" if STAGES in (before, now) else "lora"
        raise SettingsError(
            f"{run} trains {before}, and {told} says otherwise; expected a new name, or {told} as it was"
        )
    if found is None or wanted is None:
        return
    if found.addition != wanted.addition:
        raise SettingsError(f"{run} has {found.addition} and lora says {wanted.addition}; expected a new name")
    if found.fingerprint != wanted.fingerprint:
        raise SettingsError(
            f"{run} has {now} of {found.model} as it was then, and {wanted.model} holds other weights: expected the "
            "model that the run began with, or a new name"
        )


def _open_run(settings: Settings, origin: Origin) -> None:
    check_run(settings, origin)
    run, config = settings.run, origin.config.to_hf()
    run.mkdir(parents=True, exist_ok=True)
    for name, file in origin.files.items():
        if not (run / name).exists():
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            with complete(run / name) as working:
                shutil.copyfile(file, working)
    if not (run / RUN).exists():
        record_settings(settings)
    if (record := record_of(settings, origin)) is not None:
        record.write(run)
    for name, text in {
        "config.json": json.dumps(config, indent=2) + "\n",
        RUN: json.dumps(RECORD) + "\n",
    }.items():  # the mark when all else is there
        with complete(run / name) as working:
            working.write_text(text, encoding="utf-8")


def notes(settings: Settings, origin: Origin) -> list[str]:
    """What is legal and probably not meant, or not expected."""
    config = origin.config
    found = []
    if origin.drafts:
        if origin.checkpoint is not None and origin.checkpoint.config.num_nextn_predict_layers:
            found.append("the model's multi-token-prediction block is left out: DSpark's stages take its place")
        return found
    if "csa" in {layer.attention for layer in config.layers}:
        for i, stage in enumerate(settings.stages):
            entries = stage.length // RATIO_OF_ROLE["csa"]
            if stage.attention != "dense" and settings.losses.indexer and entries <= config.index_topk:
                found.append(
                    f"stages.{i}: a row of {stage.length:,} tokens has {entries:,} compressed entries, no more than "
                    f"index_topk {config.index_topk:,}: every entry is picked, and the indexer cannot learn to choose"
                )
    return found
