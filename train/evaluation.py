"""Evaluation between steps: which sets are asked, how often, and by which score the best checkpoint is kept.

Whoever asks and grades is handed in; training knows this protocol of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from pydantic import Field, PositiveInt, model_validator

from v4_jax.train.section import Section

# Metrics: the score that counts, whose name those of the sets begin with, and what asking took.
SCORE, EVALUATION_SECONDS = "score", "evaluation_seconds"

_NAME = re.compile(r"[\w.-]+")


class EvaluationSet(Section):
    """Questions, as `v4-jax eval` takes them."""

    path: str
    """JSON lines with the questions; relative to where the command runs."""
    task: Literal["chats", "needle", "mrcr", "questions"] = "chats"
    """What the lines are. "chats": conversations as training has them, up to the assistant's last turn, and scored by
    exact match with "answer", or with what that turn says."""
    mode: Literal["non-think", "low", "high", "max", "raw"] = "non-think"
    """How they are answered; "raw" goes on with plain text, for base models."""
    max_tokens: PositiveInt | None = None
    """Tokens of a reply; by default twice the longest answer and 32 more, and with reasoning 32K more."""


class EvaluationSettings(Section):
    """Questions that are asked between steps."""

    sets: dict[str, EvaluationSet] = Field(min_length=1)
    """What is asked, by name. Each has a score of 0 to 1, the share that is right."""
    every: PositiveInt
    """Steps between evaluations; one more is made at the end."""
    best: str | None = None
    """The set whose score makes a checkpoint the best; the mean of all by default."""
    keep_best: bool = True
    """Whether to save a step that is better than all before, and to keep that checkpoint beside the newest."""
    slots: PositiveInt = 64
    """Answers that are generated at the same time."""
    dtype: Literal["native", "bfloat16", "float32"] = "bfloat16"
    """How weights are held meanwhile: rounded to the released formats, to bfloat16, or as they are trained."""
    prefill_chunk: PositiveInt = 512
    """Prompt tokens that are read between two steps of generation."""

    @model_validator(mode="after")
    def _names(self) -> EvaluationSettings:
        for name in self.sets:
            if not _NAME.fullmatch(name):
                raise ValueError(f"the set {name!r} has a name that no metric can have; expected letters and digits")
        if self.best is not None and self.best not in self.sets:
            raise ValueError(f"best is {self.best}, and the sets are {', '.join(self.sets)}; expected one of them")
        return self

    def score(self, scores: Mapping[str, float]) -> float:
        """What makes a checkpoint the best: of the sets' scores one, or the mean; below all where a set is missing."""
        wanted = list(self.sets) if self.best is None else [self.best]
        if any(name not in scores for name in wanted):
            return -math.inf
        return math.fsum(scores[name] for name in wanted) / len(wanted)

    def metrics(self, scores: Mapping[str, float]) -> dict[str, float]:
        """The scores as a step's metrics."""
        return {SCORE: self.score(scores)} | {f"{SCORE}_{name}": score for name, score in scores.items()}


class Evaluation(Protocol):
    """Asks the sets on the devices that train."""

    def scores(self, params: Any) -> dict[str, float]:
        """The score of each set, 0 to 1: a function of the weights alone.

        Args:
          params: float32 masters where training has them; adapters onto their base where these are trained.
        """
