"""Rounds: what some steps in a row need is made before the first of them, and kept on disk until they are over.

RUN/rounds/STEP/round.json       where the data stands after each step from STEP on, and what the round was made for
RUN/rounds/STEP/STEP-PART.npz    the arrays of a part of a step

A run that goes on amid a round finds it there, so that it takes the same steps: what has been made once, by weights
that have changed since, is not made again. A round is named only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from v4_jax.outputs import Routing
from v4_jax.train.batch import Batch
from v4_jax.train.objectives.objective import Decisions
from v4_jax.train.teachers.reading import Teachers
from v4_jax.train.teachers.rows import Part

ROUNDS = "rounds"
_RECORD = "round.json"


class Supply(Protocol):
    """Where a round's rows come from."""

    def steps(
        self, first: int, count: int, params: Any
    ) -> Iterator[tuple[list[Part], dict[str, Any], dict[str, float]]]:
        """The parts of some steps, where the data stands after each of them, and metrics of it.

        Args:
          first: number of the first step, from 0.
          count: how many.
          params: the student's, float32 masters, which rollouts are made with.

        Raises:
          v4_jax.train.documents.DataError: a document cannot be used.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where the data stood."""


class SavedPart(NamedTuple):
    """A part of a step, on disk.

    Attributes:
      path: its file.
      teacher: as for `Part`.
    """

    path: Path
    teacher: str

    def rows(self) -> Batch:
        """The rows alone."""
        with np.load(self.path) as file:
            trained = file["trained"] if "trained" in file.files else None
            return Batch(file["tokens"], file["segment_ids"], trained)

    def read(self) -> Part:
        """All of it."""
        with np.load(self.path) as file:
            arrays = {name: _typed(file[name]) for name in file.files}

        def below(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

        given, decisions = below("given."), below("decisions.")
        batch = Batch(arrays["tokens"], arrays["segment_ids"], arrays.get("trained"), given or None)
        return Part(batch, self.teacher, Decisions(Routing(**decisions), None) if decisions else None)


class Prepared(NamedTuple):
    """A step that is ready to be taken.

    Attributes:
      parts: its rows, on disk.
      data: where the data stands after it.
      metrics: of what was made.
    """

    parts: list[SavedPart]
    data: dict[str, Any]
    metrics: dict[str, float]


class Rounds:
    """The rounds of a run.

    Args:
      run: the run's directory.
      length: steps of a round; rounds begin at multiples of it.
      supply: makes the rows.
      teachers: read them; None without any.
      made_for: what rounds depend on besides weights and data, as JSON: those of another are made anew.
    """

    def __init__(self, run: Path, length: int, supply: Supply, teachers: Teachers | None, made_for: Any) -> None:
        self._folder, self._length, self._supply, self._teachers = run / ROUNDS, length, supply, teachers
        self._made_for = json.loads(json.dumps(made_for))

    def step(self, step: int, last: int, params: Any, data: dict[str, Any], oldest: int) -> Prepared:
        """A step, whose round is made unless it is there.

        Args:
          step: its number, from 0.
          last: number of the run's steps.
          params: the student's, now.
          data: where the data stands before it.
          oldest: the oldest step that the run may go back to; rounds before it are removed.

        Raises:
          v4_jax.train.documents.DataError: a document cannot be used.
          OSError: the round cannot be kept.
        """
        found = self._find(step)
        if found is None:
            self._remove(oldest)
            end = min(last, (step // self._length + 1) * self._length)
            self._supply.restore(data)
            self._make(step, end - step, params)
            found = self._find(step)
            assert found is not None
        folder, record = found
        of_step = record["steps"][step - record["first"]]
        parts = [
            SavedPart(folder / f"{step}-{number}.npz", teacher) for number, teacher in enumerate(of_step["teachers"])
        ]
        return Prepared(parts, of_step["data"], of_step["metrics"])

    def shared(self, part: Part) -> Any:
        """What a part shares with its teacher's others; see `Teachers.shared`."""
        return self._teachers.shared(part.teacher) if self._teachers is not None else None

    def _find(self, step: int) -> tuple[Path, dict[str, Any]] | None:
        """The round that a step is in, and its record."""
        for folder in self._folder.glob("[0-9]*"):
            first = int(folder.name) if folder.name.isdecimal() else step + 1
            if first <= step < (first // self._length + 1) * self._length and (folder / _RECORD).exists():
                record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
                if record["made_for"] == self._made_for and step - first < len(record["steps"]):
                    return folder, record
        return None

    def _make(self, first: int, count: int, params: Any) -> None:
        """Makes a round and writes it, the first process for all."""
        writes = jax.process_index() == 0
        working, folder = self._folder / f".{first}", self._folder / str(first)
        if writes:
            for old in (working, folder):
                shutil.rmtree(old, ignore_errors=True)
            working.mkdir(parents=True)
        steps: list[dict[str, Any]] = []
        by_teacher: dict[str, list[tuple[Path, Part]]] = {}
        for step, (parts, data, metrics) in enumerate(self._supply.steps(first, count, params), first):
            steps.append({"teachers": [part.teacher for part in parts], "data": data, "metrics": metrics})
            for number, part in enumerate(parts):
                by_teacher.setdefault(part.teacher, []).append((working / f"{step}-{number}.npz", part))
        for name, found in by_teacher.items():
            paths, parts = [path for path, _ in found], [part for _, part in found]
            read = self._teachers.read(name, parts) if self._teachers is not None else iter(parts)
            for path, part in zip(paths, read, strict=True):
                if writes:
                    _write(path, part)
        if writes:
            record = {"first": first, "made_for": self._made_for, "steps": steps}
            (working / _RECORD).write_text(json.dumps(record), encoding="utf-8")
            working.rename(folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"round {first}")

    def _remove(self, oldest: int) -> None:
        """Removes rounds that are over before the oldest step that the run may go back to."""
        if jax.process_index():
            return
        for folder in self._folder.glob("[0-9]*"):
            if folder.name.isdecimal() and (int(folder.name) // self._length + 1) * self._length <= oldest:
                shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, part: Part) -> None:
    batch, decisions = part.batch, part.decisions
    arrays = {"tokens": batch.tokens, "segment_ids": batch.segment_ids}
    arrays |= {} if batch.trained is None else {"trained": batch.trained}
    arrays |= {f"given.{name}": value for name, value in (batch.given or {}).items()}
    if decisions is not None:
        kept = {"experts": decisions.trunk.experts, "entries": decisions.trunk.entries}
        arrays |= {f"decisions.{name}": value for name, value in kept.items() if value is not None}
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _typed(array: np.ndarray) -> np.ndarray:
    """NumPy's files know no bfloat16: there it is two bytes of anything."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


class GivenTexts:
    """The rows of given texts, for a round: off-policy distillation.

    Args:
      rows: the texts of each teacher.
      shape: of a step's parts: how many, rows of each, tokens of a row.
    """

    def __init__(self, rows: Any, shape: Callable[[int], tuple[int, int, int]]) -> None:
        self._rows, self._shape = rows, shape

    def steps(
        self, first: int, count: int, params: Any
    ) -> Iterator[tuple[list[Part], dict[str, Any], dict[str, float]]]:
        """As for `Supply`."""
        del params
        for step in range(first, first + count):
            parts = self._rows.next_parts(*self._shape(step))
            yield parts, self._rows.state(), {}

    def restore(self, state: dict[str, Any]) -> None:
        """As for `Supply`."""
        self._rows.restore(state)
