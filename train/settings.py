"""A training run's settings: a YAML file and `field=value` changes to it, every field typed and explained."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from v4_jax.adapters import FAMILIES, Adapters
from v4_jax.chat import Mode
from v4_jax.draft_stages import DraftStages
from v4_jax.layers.stages import Remat
from v4_jax.parameters import Family
from v4_jax.policy import PolicyName
from v4_jax.train.evaluation import EvaluationSettings
from v4_jax.train.objectives.distillation import Distillation
from v4_jax.train.objectives.dspark import DSpark
from v4_jax.train.objectives.pretraining import Pretraining
from v4_jax.train.objectives.table import ChosenObjective
from v4_jax.train.on_policy.rollouts import RolloutSettings
from v4_jax.train.section import Section

Attention = Literal["dense", "indexer", "sparse"]


class SettingsError(ValueError):
    """Settings that cannot be used; the sentence says what was found and what is legal."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-20 is a number, as in YAML 1.2 and to everyone who writes it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class SourceSettings(Section):
    """A part of the training data."""

    path: str
    """A file, a directory or a glob; relative to where the command runs."""
    weight: PositiveFloat = 1.0
    """Its share of the documents, against those of the other sources."""
    format: Literal["auto", "text", "jsonl", "parquet", "arrayrecord"] = "auto"
    """How documents are stored; "auto" goes by the file's name."""
    teacher: str | None = None
    """Of distillation: the teacher of its texts, as `objective.teachers` calls it. Where there is one, it may be left
    out."""
    field: str = "text"
    """The field or column that holds the text; "tokens" for lists of token ids, "messages" for conversations, of which
    only what the assistant says is learnt."""


class DataSettings(Section):
    """What is trained on."""

    sources: list[SourceSettings] = Field(min_length=1)
    """The parts of the mixture."""
    shuffle: bool = True
    """Whether documents come in random order, another one each time through a source."""
    begin: bool = True
    """Whether a text begins with the begin-of-sentence token."""
    end: bool = True
    """Whether it ends with the end-of-sentence token."""
    mode: Mode | None = None
    """How conversations are answered that have no field "mode": "non-think", "low", "high" or "max"; by default "high"
    where an answer has reasoning, and "non-think" elsewhere."""
    effort_profile: Literal["auto", "preview", "official"] = "auto"
    """What the model takes reasoning efforts for; "auto" asks the encoding in the model's directory."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What a document that cannot be used does: "stop" saves and ends the run, "skip" leaves it out and counts it."""
    open_rows: PositiveInt = 16
    """Rows that are filled at once: more of them take less padding, and more memory."""
    threads: PositiveInt = 8
    """Threads that read and tokenise."""


class StageSettings(Section):
    """Some steps in a row with batches of one shape and one way to attend."""

    steps: PositiveInt
    """How many steps the stage lasts."""
    length: PositiveInt
    """Tokens of a row."""
    rows: PositiveInt
    """Rows of a step, all microbatches and devices together."""
    microbatches: PositiveInt = 1
    """Parts that a step's rows are worked on one after another, to save memory."""
    attention: Attention = "sparse"
    """How CSA layers attend: "dense", all entries, and the indexer waits; "indexer", the same, and only the indexer
    learns; "sparse", the entries that it picks, and all learn."""


class OptimizerSettings(Section):
    """How parameters are updated; the defaults are the technical report's."""

    matrices: Literal["muon", "adamw"] = "muon"
    """What updates the matrices. Embedding, head, norms, biases and gates are AdamW's in any case."""
    learning_rate: PositiveFloat = 2.7e-4
    """Its highest value, of both optimisers."""
    final_learning_rate: NonNegativeFloat | None = None
    """Where the cosine ends; a tenth of the highest value by default."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear rise from zero. The report took 2000."""
    decay_steps: NonNegativeInt = 0
    """Steps of the cosine, the run's last ones; between warm-up and cosine the rate is constant."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which Muon's momentum is kept; bfloat16 saves a quarter of what matrices' masters and momentum take."""
    rms: PositiveFloat = 0.18
    """Root mean square of the elements of a Muon update, before the learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's."""
    eps: PositiveFloat = 1e-20
    """AdamW's."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled, of both."""


class LoraSettings(Section):
    """Low-rank adapters in place of the weights, which stay as they are."""

    rank: PositiveInt = 16
    """Of each adapter."""
    alpha: PositiveFloat = 32.0
    """What adapters add counts alpha / rank."""
    families: list[Family] = Field(["attention", "shared"], min_length=1)
    """Which matrices have one: "attention", "compressor", "indexer", "router", "shared" and "experts", of all layers,
    and "mtp", the MTP block's own two."""
    base: Literal["native", "bfloat16", "float32"] = "native"
    """How the weights are held: in the formats that the model has on disk, or in one of these."""

    @property
    def adapters(self) -> Adapters:
        """What they are to the model."""
        return Adapters(self.rank, self.alpha, tuple(family for family in FAMILIES if family in self.families))


class LossSettings(Section):
    """What the losses count, where the next token's counts 1; the defaults are the technical report's."""

    mtp: NonNegativeFloat = 0.3
    """The token after the next, until the learning rate begins to fall."""
    mtp_decay: NonNegativeFloat = 0.1
    """The same from then on."""
    balance: NonNegativeFloat = 1e-4
    """Sequence-wise balance of the experts."""
    balance_speed: NonNegativeFloat = 1e-3
    """By how much a step moves the router's bias of an expert."""
    indexer: NonNegativeFloat = 1.0
    """Divergence of the indexer's scores from the attention; of stages other than "dense"."""


class StabilitySettings(Section):
    """What happens when the loss jumps: back to the last checkpoint, and on with anticipatory routing for a while."""

    spike: PositiveFloat | None = 6.0
    """A loss so many standard deviations above its running mean is a spike; null never looks for one. Of pretraining
    alone: where texts are made or read ahead for some steps, or DSpark's stages are trained, only a loss that is not
    finite ends the run."""
    window: PositiveInt = 100
    """Steps over which mean and deviation are taken, and before which nothing is a spike."""
    ahead: PositiveInt = 4
    """Anticipatory routing takes the experts that the parameters so many steps ago choose."""
    hold: PositiveInt = 200
    """Steps for which it stays on."""
    rollbacks: NonNegativeInt = 3
    """So many times in a row, without passing the step of the spike, the run goes back; then it stops."""


class CheckpointSettings(Section):
    """When the state is saved."""

    every: PositiveInt = 500
    """Steps between checkpoints; one more is made at the end and when the run is asked to stop."""
    keep: PositiveInt = 3
    """How many of the newest to keep."""
    keep_every: PositiveInt | None = None
    """Also keep those of multiples of so many steps, for ever."""
    digests: bool = True
    """Whether to write digests of every array with a checkpoint, and to check them when a run is continued."""


class LogSettings(Section):
    """What is written down."""

    every: PositiveInt = 10
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Whether to write them for TensorBoard too."""
    wandb: str | None = None
    """A project of Weights & Biases to send them to."""
    mlflow: str | None = None
    """An experiment of MLflow to send them to."""
    profile: tuple[NonNegativeInt, PositiveInt] | None = None
    """First step and number of steps to record with jax.profiler, in the run's directory."""


class Settings(Section):
    """A training run."""

    run: Path
    """The run's directory: it is made, or continued where it exists."""
    model: Path | None = None
    """A released, converted or trained directory to start from; or give `architecture`."""
    architecture: Path | dict[str, Any] | None = None
    """A fresh model: a config.json, or its fields."""
    tokenizer: Path | None = None
    """A directory with tokenizer.json; by default the model's, or bytes for a small fresh vocabulary."""
    data: DataSettings
    """What is trained on."""
    stages: list[StageSettings] = Field(min_length=1)
    """Batch shapes and ways to attend, in order. A ramp of the batch size is a list of stages."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How parameters are updated."""
    objective: ChosenObjective = Pretraining()
    """What is made of the next tokens."""
    lora: LoraSettings | None = None
    """Trains low-rank adapters, and no weight; by default all weights are trained."""
    losses: LossSettings = LossSettings()
    """What is minimised."""
    stability: StabilitySettings = StabilitySettings()
    """What happens when the loss jumps."""
    checkpoints: CheckpointSettings = CheckpointSettings()
    """When the state is saved."""
    evaluate: EvaluationSettings | None = None
    """Questions that are asked between steps; by default none."""
    log: LogSettings = LogSettings()
    """What is written down."""
    seed: NonNegativeInt = 0
    """Of fresh weights and of the data's order."""
    policy: PolicyName = "bfloat16"
    """Precision of the forward pass; "released" also rounds keys, values, index queries and index keys."""
    fp4_experts: bool = False
    """Round experts to FP4 in the forward pass, for a model that will be released so."""
    remat: Remat = "sublayers"
    """What the backward pass recomputes: "none", "sublayers" or "layers"."""
    mesh: str | None = None
    """Devices by axis, as in data=2,seq=4,expert=2,tensor=1; "one", for one device; the best that fits by default."""

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def adapters(self) -> Adapters | None:
        """What is trained in place of the weights; None where the weights are."""
        return None if self.lora is None else self.lora.adapters

    @property
    def addition(self) -> Adapters | DraftStages | None:
        """What is trained beside weights that stay as they are: adapters or DSpark's stages; None: the weights are."""
        return DraftStages() if isinstance(self.objective, DSpark) else self.adapters

    @property
    def held(self) -> Literal["native", "bfloat16", "float32"]:
        """How weights are held: as float32 masters, or as the base of what is trained beside them."""
        if isinstance(self.objective, DSpark):
            return self.objective.base
        return "float32" if self.lora is None else self.lora.base

    @property
    def rollouts(self) -> RolloutSettings | None:
        """How the objective has answers generated; None where it does not."""
        return getattr(self.objective, "rollouts", None)

    def sources_of(self, teacher: str) -> list[SourceSettings]:
        """The sources of a teacher's texts."""
        return [source for source in self.data.sources if source.teacher in (None, teacher)]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Settings:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("expected either model, a directory to start from, or architecture, of a fresh one")
        if self.lora is not None:
            self._check_lora(self.lora)
        if isinstance(self.objective, DSpark):
            self._check_dspark(self.objective)
        teachers = self.objective.teachers if isinstance(self.objective, Distillation) else {}
        for i, source in enumerate(self.data.sources):
            if source.teacher not in teachers and (source.teacher is not None or len(teachers) > 1):
                legal = f"expected one of {', '.join(teachers)}" if teachers else "this objective has none"
                raise ValueError(f"data.sources.{i}.teacher is {source.teacher}; {legal}")
        rollouts = self.rollouts
        for i, stage in enumerate(self.stages):
            if rollouts is not None and rollouts.max_tokens >= stage.length:
                raise ValueError(
                    f"stages.{i}.length is {stage.length}, which has no room for a prompt and an answer of "
                    f"objective.rollouts.max_tokens {rollouts.max_tokens}"
                )
            if stage.rows % stage.microbatches:
                raise ValueError(f"stages.{i}: {stage.rows} rows do not divide into {stage.microbatches} microbatches")
        if self.optimizer.warmup_steps + self.optimizer.decay_steps > self.steps:
            raise ValueError(
                f"optimizer: warmup_steps {self.optimizer.warmup_steps} and decay_steps {self.optimizer.decay_steps} "
                f"exceed the run's {self.steps} steps"
            )
        return self

    def _check_dspark(self, objective: DSpark) -> None:
        if self.model is None:
            raise ValueError("objective dspark trains stages on a trunk: expected model, the directory of one")
        if self.lora is not None:
            raise ValueError("objective dspark leaves the trunk as it is, and lora adapts it: leave one of them out")
        if self.fp4_experts and objective.base != "native":
            raise ValueError(
                f"fp4_experts rounds all experts that are held in floats, as the trunk's are by objective.base "
                f"{objective.base}: expected native"
            )
        for i, stage in enumerate(self.stages):
            if stage.attention != "sparse":
                raise ValueError(
                    f"stages.{i}.attention is {stage.attention}, and objective dspark leaves the trunk as it is: "
                    "expected sparse"
                )
            if stage.length <= objective.anchors:
                raise ValueError(
                    f"stages.{i}.length is {stage.length}, which has no room for objective.anchors {objective.anchors}"
                )

    def _check_lora(self, lora: LoraSettings) -> None:
        if self.model is None:
            raise ValueError("lora trains adapters of a model: expected model, a directory with its weights")
        if self.fp4_experts:
            raise ValueError("fp4_experts rounds weights that are trained, and lora trains none: leave one of them out")
        indexer, others = "indexer" in lora.families, bool(set(lora.families) - {"indexer"})
        for i, stage in enumerate(self.stages):
            if (stage.attention == "indexer" and not indexer) or (stage.attention == "dense" and not others):
                learns = "nothing but the indexer" if stage.attention == "indexer" else "all but the indexer"
                raise ValueError(
                    f"stages.{i}.attention is {stage.attention}, where {learns} learns, and lora.families are "
                    f"{', '.join(lora.families)}: expected what learns among them, or another attention"
                )


def read_settings(path: Path | None, changes: Sequence[str] = ()) -> Settings:
    """Reads a YAML file and applies `field=value` changes to it.

    Args:
      path: the file; None for changes alone.
      changes: as in "optimizer.learning_rate=1e-3" or "stages.0.steps=100"; values are YAML.

    Raises:
      SettingsError: a field that does not exist, a value of the wrong type or out of range, or no YAML.
      OSError: the file cannot be read.
    """
    values: Any = {}
    if path is not None:
        values = _parse(path.read_text(encoding="utf-8-sig"), str(path))
        if not isinstance(values, dict):
            raise SettingsError(f"{path} holds no settings; expected YAML with fields such as run, model and data")
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise SettingsError(f"{change!r} is no change of a setting; expected field=value")
        _set(values, name, _parse(text, change))
    try:
        return Settings.model_validate(values)
    except pydantic.ValidationError as error:
        where = f"{path}: " if path else ""
        raise SettingsError(where + "; ".join(_sentence(problem) for problem in error.errors())) from None


def write_settings(settings: Settings) -> str:
    """The settings as YAML that `read_settings` reads back, defaults included."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Which settings changed: field -> "from old to new"; those that both have, as `Settings.model_dump` gives them."""
    found: dict[str, str] = {}
    for name in [key for key in now if key in before]:
        old, new = before[name], now[name]
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            old, new = dict(enumerate(old)), dict(enumerate(new))
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found[f"{prefix}{name}"] = f"from {json.dumps(old)} to {json.dumps(new)}"
    return found


def describe(section: type[Section] = Settings, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields (field, default, what it means) of every setting, sections first named and then opened.

    Where there is a choice of sections, a field of several of them comes once, with all that it means.
    """
    for name, field in section.model_fields.items():
        inner = _sections_of(field.annotation)
        required = field.is_required()
        default = "required" if required else "" if inner else yaml.safe_dump(field.default).split("\n")[0]
        yield prefix + name, default, " ".join((field.description or "").split())
        listed = typing.get_origin(field.annotation) is list
        mapped = typing.get_origin(field.annotation) is dict
        opened: dict[str, tuple[str, list[str]]] = {}
        for one in inner:
            for place, its_default, meaning in describe(
                one, f"{prefix}{name}.{'N.' if listed else 'NAME.' if mapped else ''}"
            ):
                meanings = opened.setdefault(place, (its_default, []))[1]
                meanings.extend([] if meaning in meanings else [meaning])
        yield from ((place, its_default, " ".join(meanings)) for place, (its_default, meanings) in opened.items())


def _sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold, alone, in a list or by name."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for inner in typing.get_args(annotation) for section in _sections_of(inner)]


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SettingsError(f"{what} is not YAML: {' '.join(str(error).split())}") from None


def _set(values: Any, name: str, value: Any) -> None:
    """Puts a value at a dotted name, making sections on the way."""
    *path, last = name.split(".")
    for i, key in enumerate(path):
        if isinstance(values, list):
            values = _element(values, key, name)
        elif isinstance(values, dict):
            values = values.setdefault(key, {})
        else:
            raise SettingsError(f"{name}: {'.'.join(path[:i])} is {values!r}, which has no fields")
    if isinstance(values, list):
        _element(values, last, name)
        values[int(last)] = value
    elif isinstance(values, dict):
        values[last] = value
    else:
        raise SettingsError(f"{name}: {'.'.join(path)} is {values!r}, which has no fields")


def _element(values: list[Any], key: str, name: str) -> Any:
    if not key.isdecimal() or int(key) >= len(values):
        raise SettingsError(f"{name}: found {key!r} in a list of {len(values)}, expected 0 to {len(values) - 1}")
    return values[int(key)]


def _sentence(problem: Any) -> str:
    """One of pydantic's errors as a clause."""
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        *path, _ = problem["loc"]
        return f"unknown field {place}; expected one of {', '.join(_fields(path))}"
    if problem["type"] == "missing":
        return f"{place} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place} is {problem['input']!r}: {message[0].lower()}{message[1:]}" if place else message


def _fields(path: Sequence[Any]) -> list[str]:
    """The legal fields of the section at a place."""
    sections: list[type[Section]] = [Settings]
    for key in path:
        chosen = [one for one in sections if one.model_fields.get("kind") and one.model_fields["kind"].default == key]
        found = [one.model_fields[key] for one in sections if isinstance(key, str) and key in one.model_fields]
        sections = chosen or [one for field in found for one in _sections_of(field.annotation)] or sections
    return sorted({name for section in sections for name in section.model_fields})
