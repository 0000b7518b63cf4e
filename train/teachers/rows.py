"""Rows of which each belongs to one teacher, and a step's ordered by teacher, so that one head serves after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from v4_jax.train.batch import Batch
from v4_jax.train.documents import DataError
from v4_jax.train.objectives.objective import Decisions
from v4_jax.train.packing import PackedRows


class Part(NamedTuple):
    """Rows that a step works on at once.

    Attributes:
      batch: the rows [B, S], on the host.
      teacher: whose they are; "" where nobody is.
      decisions: to replay, on the host; None for none.
    """

    batch: Batch
    teacher: str = ""
    decisions: Decisions | None = None


class TeacherRows:
    """Packs the texts of each teacher into rows of their own.

    Args:
      rows: of each teacher, by name.
      shares: of all rows, relative to each other; kept to one part in the long run.
    """

    def __init__(self, rows: Mapping[str, PackedRows], shares: Mapping[str, float]) -> None:
        self._rows, total = dict(rows), sum(shares.values())
        self._shares = {name: shares[name] / total for name in self._rows}
        self._given = dict.fromkeys(self._rows, 0)

    def next_parts(self, count: int, rows: int, length: int) -> list[Part]:
        """The next parts, ordered by teacher.

        Args:
          count: how many.
          rows: of each.
          length: tokens of a row.

        Raises:
          DataError: a document cannot be used.
        """
        given = dict(self._given)
        for _ in range(count):  # to whoever is furthest behind
            behind = {name: share * (sum(given.values()) + 1) - given[name] for name, share in self._shares.items()}
            given[max(behind, key=lambda name: behind[name])] += 1
        parts = [
            Part(self._rows[name].next_batch(rows, length), name)
            for name in self._rows
            for _ in range(given[name] - self._given[name])
        ]
        self._given = given
        return parts

    def next_batch(self, rows: int, length: int) -> Batch:
        """The next rows, ordered by teacher; as for `PackedRows`."""
        batches = [marked(part.batch) for part in self.next_parts(rows, 1, length)]
        return jax.tree.map(lambda *found: np.concatenate(found), *batches)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to hand out exactly the following rows; JSON."""
        teachers = {name: rows.state() for name, rows in self._rows.items()}
        skipped = sum(state["skipped"] for state in teachers.values())
        return {"given": self._given, "skipped": skipped, "teachers": teachers}

    def edited(self, state: dict[str, Any]) -> bool:
        """Whether files have other names or sizes than when `state` was taken."""
        found = state.get("teachers", {})  # of other teachers it is `restore` that has a word to say
        return any(rows.edited(found[name]) for name, rows in self._rows.items() if name in found)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
          DataError: it was taken with other teachers or texts.
        """
        found = sorted(state.get("teachers", {}))
        if found != sorted(self._rows):
            before = f"the teachers {', '.join(found)}" if found else "no teachers"
            raise DataError(
                f"the data state was saved with {before}, and they are now {', '.join(sorted(self._rows))}; expected "
                "the data as it was, or a new run"
            )
        for name, rows in self._rows.items():
            rows.restore(state["teachers"][name])
        self._given = dict(state["given"])


def marked(batch: Batch) -> Batch:
    """The rows, which say of every token whether it is trained."""
    return batch if batch.trained is not None else batch._replace(trained=np.asarray(batch.segment_ids) > 0)
