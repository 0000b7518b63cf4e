"""What the data pipeline hands to the training step."""

from __future__ import annotations

from typing import Any, NamedTuple


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
