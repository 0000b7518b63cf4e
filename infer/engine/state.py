"""What the engine's slots hold on the devices, from one program to the next."""

from __future__ import annotations

from typing import NamedTuple

from v4_jax.cache.cache import Cache
from v4_jax.infer.engine.history import History


class State(NamedTuple):
    """What the slots hold.

    Attributes:
      cache: keys, values and entries of the tokens so far, a row for each slot.
      history: counts of these tokens, which penalties look at.
    """

    cache: Cache
    history: History
