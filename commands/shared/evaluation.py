"""Question sets asked between the steps of a training run, by an engine with the weights that are trained."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from v4_jax.chat import EffortProfile
from v4_jax.commands.shared.console import read_text
from v4_jax.commands.shared.contexts import room
from v4_jax.commands.shared.trained_engine import TrainedEngine
from v4_jax.config import Config
from v4_jax.infer.evaluation.asking import ask
from v4_jax.infer.evaluation.form import Asked, Form, fitting
from v4_jax.infer.evaluation.tasks import TASKS, TaskName, read_set
from v4_jax.placement import Place
from v4_jax.policy import PolicyName
from v4_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from v4_jax.train.evaluation import EvaluationSet, EvaluationSettings


class _Set(NamedTuple):
    """A set that was read: what is asked, in which form, and what of it does not fit."""

    task: TaskName
    form: Form
    asked: list[Asked]
    skipped: int


class EngineEvaluation:
    """Asks the sets of a run; see `v4_jax.train.evaluation.Evaluation`. Answers are greedy, as `v4-jax eval`'s are.

    Args:
      config: the architecture.
      tokenizer: the model's.
      place: where training runs; the engine takes the same mesh.
      settings: what is asked, and how.
      policy: precision, training's.
      profile: what the model takes reasoning efforts for.
      bos: plain text begins with the begin-of-sentence token.
      working: entered while a person waits; told what for.

    Raises:
      CommandError: a set cannot be read.
      ValueError: a set has a line that is no question of its kind, or none that fits; the sentence says which.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        place: Place,
        settings: EvaluationSettings,
        policy: PolicyName,
        *,
        profile: EffortProfile,
        bos: bool,
        working: Callable[[str], contextlib.AbstractContextManager[None]] = lambda what: contextlib.nullcontext(),
    ) -> None:
        self._tokenizer, self._working = tokenizer, working
        longest = config.max_position_embeddings
        self._sets: dict[str, _Set] = {}
        for name, chosen in settings.sets.items():
            form = Form(tokenizer, None if chosen.mode == "raw" else chosen.mode, profile, bos)
            self._sets[name] = _read(name, chosen, form, longest)
        every = [one.encoded for found in self._sets.values() for one in found.asked]
        self._engine = TrainedEngine(
            config,
            place,
            slots=min(settings.slots, max(len(found.asked) for found in self._sets.values())),
            dtype=settings.dtype,
            policy=policy,
            length=room(max(len(one.ids) + one.max_tokens for one in every), longest),
            prefill_chunk=settings.prefill_chunk,
        )

    def facts(self) -> list[str]:
        """Of each set, how many questions it has and how they are asked."""
        return [
            f"{name}: {len(found.asked):,} {found.task}, {found.form.mode or 'raw'}"
            + (f", {found.skipped:,} too long" if found.skipped else "")
            for name, found in self._sets.items()
        ]

    def scores(self, params: Any) -> dict[str, float]:
        """As for `Evaluation`: the mean of the leading grade of each set."""
        scores: dict[str, float] = {}
        with self._engine.loaded(params) as engine:
            for name, (task, form, asked, _) in self._sets.items():
                prompts = [one.encoded for one in asked]
                with self._working(f"asking {name}"):
                    answers = ask(engine, self._tokenizer, prompts, thinking_mode=form.thinking_mode)
                leading = TASKS[task].metrics[0]
                pairs = zip(asked, answers, strict=True)
                grades = [TASKS[task].grade(one.question, form.said(answer)) for one, answer in pairs]
                scores[name] = math.fsum(grade[leading] for grade in grades) / len(grades)
        return scores


def _read(name: str, chosen: EvaluationSet, form: Form, longest: int) -> _Set:
    path = Path(chosen.path)
    text = read_text(path)
    try:
        questions = read_set(chosen.task, text.split("\n"))
        asked, skipped = fitting(questions, form, longest, chosen.max_tokens)
    except ValueError as error:
        raise ValueError(f"evaluate.sets.{name}: {path}: {error}") from None
    return _Set(chosen.task, form, asked, len(skipped))
