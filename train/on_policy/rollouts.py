"""Rollouts: what a student says to prompts. Whoever generates it is handed in; training knows this protocol of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import PositiveInt

from v4_jax.chat import Mode
from v4_jax.outputs import Kept, Routing
from v4_jax.train.section import Section


class RolloutError(Exception):
    """A student that says nothing of use. The message is a sentence for the user."""


class RolloutSettings(Section):
    """What a student is asked, and how it answers: sampled from its own distribution, by the weights of a round."""

    prompts: PositiveInt
    """Prompts of a step."""
    samples: PositiveInt = 8
    """Answers to each."""
    max_tokens: PositiveInt
    """Tokens of an answer; a longer one is cut. A row has room for prompt and answer."""
    slots: PositiveInt = 64
    """Answers that are generated at the same time."""
    dtype: Literal["native", "bfloat16", "float32"] = "bfloat16"
    """How weights are held meanwhile: rounded to the released formats, to bfloat16, or as they are trained."""
    replay: Kept = "experts"
    """Which of the engine's decisions training takes over: "none"; "experts"; or "all", the compressed entries that it
    picked, too, which take 4 bytes for each pick, token and CSA layer on disk."""
    prefill_chunk: PositiveInt = 512
    """Prompt tokens that are read between two steps of generation."""
    draft: str = "none"
    """What guesses tokens ahead: "none", "mtp:N", "dspark" or "auto"; the answers are those of "none"."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is to be answered.

    Attributes:
      tokens: its ids.
      seed: of the first answer; the next ones have the numbers after it.
      fields: what its line of the data says besides.
      reference: the answer that the data has; None without one.
      mode: how it is to be answered; None of what is no conversation.
      teacher: whose source it is from; "" where nobody teaches.
      where: file and place, for messages.
    """

    tokens: tuple[int, ...]
    seed: int = 0
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reference: str | None = None
    mode: Mode | None = None
    teacher: str = ""
    where: str = ""


class Sample(NamedTuple):
    """An answer.

    Attributes:
      tokens: [n] int32, the token that ends it included.
      logprobs: [n] float32 their log-probabilities, as whoever generated it had them.
      ended: whether it came to an end; otherwise it was cut.
      routing: decisions of prompt and answer but its last token, which was not read: experts [layers, t, k] and entries
        [CSA layers, t, K], numbered from its own first one; None where nobody says.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    ended: bool
    routing: Routing | None = None


class Rollouts(Protocol):
    """Generates answers on the devices that train."""

    def sample(self, params: Any, prompts: Sequence[Prompt], samples: int) -> list[list[Sample]]:
        """Answers prompts: the same of the same weights, prompts and seeds, whatever else is asked.

        Args:
          params: the student's, float32 masters where training has them.
          prompts: what is asked.
          samples: answers to each.

        Raises:
          RolloutError: the student's numbers are not finite.
        """
