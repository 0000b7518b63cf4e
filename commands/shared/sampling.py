"""How a command samples: its options, over what the model's directory says."""

from __future__ import annotations

import dataclasses

from v4_jax.commands.shared.console import CommandError
from v4_jax.commands.shared.models import GenerationDefaults
from v4_jax.commands.shared.options import Flag, OptionalFloat, OptionalInt
from v4_jax.infer.engine.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, where a request does not say.

    Attributes:
      temperature: 0 takes the best token each time. Default: generation_config.json's, or 1.
      top_p: Sample from the fewest best tokens with this much probability. Default: generation_config.json's, or 1.
      top_k: Sample from this many best tokens; 0 is all. Default: generation_config.json's, or 0.
      min_p: Sample from tokens at least this fraction as likely as the best. Default: generation_config.json's, or 0.
      greedy: Short for --temperature 0.
    """

    temperature: OptionalFloat = None
    top_p: OptionalFloat = None
    top_k: OptionalInt = None
    min_p: OptionalFloat = None
    greedy: Flag = False

    def over(self, defaults: GenerationDefaults, seed: int) -> Sampling:
        """The defaults with what the options say instead.

        Raises:
          CommandError: greedy, and a temperature that is not.
          ValueError: a value out of range.
        """
        if self.greedy and self.temperature:
            raise CommandError(
                f"--greedy means --temperature 0, but --temperature is {self.temperature:g}; give one of them"
            )
        temperature = 0.0 if self.greedy else self.temperature
        return Sampling(
            defaults.temperature if temperature is None else temperature,
            defaults.top_p if self.top_p is None else self.top_p,
            defaults.top_k if self.top_k is None else self.top_k,
            defaults.min_p if self.min_p is None else self.min_p,
            seed,
        )
