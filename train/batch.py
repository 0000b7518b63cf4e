"""What the data pipeline hands to the training step."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Batch(NamedTuple):
    """Packed rows, on the host or on devices.

    Attributes:
      tokens: [..., B, S] int32, 0 where nothing stands.
      segment_ids: [..., B, S] int32 document of each token within its row, counted from 1; 0 is padding.
      trained: [..., B, S] bool tokens that the model is to predict; None for all of them. The others are read.
      given: what an objective wants to know besides, by name: arrays [..., B, S, ...].
    """

    tokens: Any
    segment_ids: Any
    trained: Any = None
    given: dict[str, Any] | None = None


class Rows(Protocol):
    """An endless stream of rows, or of what becomes rows."""

    def next_batch(self, rows: int, length: int) -> Batch:
        """The next rows [rows, length].

        Raises:
          v4_jax.train.documents.DataError: a document cannot be used.
        """

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here; JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
          v4_jax.train.documents.DataError: it was taken with other data.
        """

    def edited(self, state: dict[str, Any]) -> bool:
        """Whether files have other names or sizes than when `state` was taken."""
