"""What the engine's slots hold on the devices, from one program to the next."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array

from v4_jax.cache.cache import Cache
from v4_jax.infer.engine.history import History


class State(NamedTuple):
    """What the slots hold.

    Attributes:
      cache: keys, values and entries of the tokens so far, a row for each slot.
      history: counts of these tokens, which penalties look at.
      confidence: [B, depth] float32 of each row's next drafts; None if the drafter makes no such estimate.
    """

    cache: Cache
    history: History
    confidence: Array | None = None
