"""What the engine is asked and what it answers: a prompt to continue and how, and one generated token after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

from v4_jax.config import Config
from v4_jax.infer.checks import check_ids, check_samples, check_vocabulary
from v4_jax.infer.engine.grammar import Grammar, token_mask
from v4_jax.infer.engine.guide import Guide
from v4_jax.infer.engine.sampling import MOST_ALTERNATIVES, Sampling
from v4_jax.infer.engine.speculative import Acceptance
from v4_jax.outputs import Routing

Finish = Literal["stop", "length", "error"]

NOT_FINITE = (
    "the model's logits for this text are not finite numbers, so it has no next token: the weights are damaged, or the "
    "settings or the precision do not fit them"
)


class TooLong(ValueError):
    """A prompt and its continuation that no slot has room for."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
      prompt: token ids, at least one.
      max_tokens: most tokens to generate, per sample; 0 is legal with `echo`.
      sampling: how to sample; sample number i uses the seed plus i.
      stop_ids: tokens that end a sample; the model's end-of-sentence token when None.
      n: samples, which share the reading of the prompt.
      top_logprobs: most probable tokens to report with each generated one, up to 20.
      constraint: a grammar that the text keeps to. Stop ids are then legal where it may end (where they are also
        tokens of text, wherever the grammar has them), and a text to which nothing can be added ends with "stop".
      reasoning_end: tokens that end the reasoning which the prompt opened; a constraint holds only after them,
        and tokens that end a sample are none before them where a constraint or an opening is yet to come.
      reasoning_budget: tokens after which reasoning is ended: `reasoning_end`, or what is missing of it, is then
        generated, unless it was before.
      opening: tokens that the answer begins with, after any reasoning; stop ids among them do not end it.
      salt: the prefix cache has nothing for it but what requests of the same salt left there.
      echo: whether the events of each sample begin with the prompt's tokens after the first, to learn how probable they
        are. Such a prompt is read whole: the prefix cache does not know.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)
    stop_ids: Sequence[int] | None = None
    n: int = 1
    top_logprobs: int = 0
    constraint: Grammar | None = None
    reasoning_end: Sequence[int] = ()
    reasoning_budget: int | None = None
    opening: Sequence[int] = ()
    salt: bytes = b""
    echo: bool = False

    def check(self, config: Config, slots: int, max_length: int) -> None:
        """Checks that it can be served.

        Args:
          config: the model's.
          slots: samples that are generated at the same time.
          max_length: tokens that each of them has room for.

        Raises:
          ValueError: it never can; `TooLong` if that is for want of room.
        """
        check_ids(self.prompt, config)
        told = (*self.sampling.logit_bias, *self.reasoning_end, *self.opening, *(self.stop_ids or ()))
        check_vocabulary(told, config)
        least = 0 if self.echo and len(self.prompt) > 1 else 1
        for name, value, smallest in (("max_tokens", self.max_tokens, least), ("n", self.n, 1)):
            if value < smallest:
                raise ValueError(f"{name} is {value}, expected at least {smallest}")
        check_samples(self.n, slots)
        if len(self.prompt) + self.max_tokens > max_length:
            raise TooLong(
                f"a prompt of {len(self.prompt)} tokens and a continuation of {self.max_tokens} exceed the "
                f"{max_length} tokens that a slot has room for"
            )
        most = min(MOST_ALTERNATIVES, config.vocab_size)
        if not 0 <= self.top_logprobs <= most:
            raise ValueError(f"top_logprobs is {self.top_logprobs}, expected 0 to {most}")
        if self.constraint is not None:
            if self.constraint.vocab_size != config.vocab_size:
                raise ValueError(
                    f"the constraint was compiled for {self.constraint.vocab_size} tokens, but the model's vocabulary "
                    f"has {config.vocab_size}"
                )
            if not self.stops(config):
                raise ValueError("a constrained text needs stop_ids to end with, found none")
            if self.opening:
                raise ValueError("an opening and a constraint; expected one of them, or a constraint that begins so")
        if self.reasoning_budget is not None:
            if self.reasoning_budget < 0:
                raise ValueError(f"reasoning_budget is {self.reasoning_budget}, expected 0 or more tokens")
            if not self.reasoning_end:
                raise ValueError("reasoning_budget needs reasoning_end, the tokens that end the reasoning")

    def stops(self, config: Config) -> frozenset[int]:
        """Tokens that end a sample."""
        return frozenset([config.eos_token_id] if self.stop_ids is None else self.stop_ids)

    def guide(self, config: Config) -> Guide | None:
        """What leads a new sample, if anything does."""
        stops = self.stops(config)
        matcher = None if self.constraint is None else self.constraint.start(stops)
        going_on = None
        if self.reasoning_end and (matcher is not None or self.opening):
            going_on = ~token_mask(stops - {*self.reasoning_end}, config.vocab_size)
        guide = Guide(matcher, self.reasoning_end, self.reasoning_budget, self.opening, going_on)
        return None if guide.spent else guide


class Event(NamedTuple):
    """One generated token, or one of a prompt that is echoed.

    Attributes:
      request: the number that `Engine.submit` returned.
      sample: which of the request's samples it continues.
      id: the token.
      logprob: its log-probability under the model, before bias, penalties, constraint, temperature and filters.
      finish: "stop" or "length" with the sample's last token, else None; "error" where there is no token, as the logits
        are not finite: the sample ends, and `id` means nothing.
      alternatives: the most probable tokens and their log-probabilities, best first, as many as were asked for.
      cached: tokens of the prompt that were not read for this request, as they were in the prefix cache.
      drafts: how often drafts of the sample's tokens were right so far, by depth.
      routing: with the sample's last token, decisions for all tokens of prompt and sample but that one, where they are
        kept: numpy arrays [layers, tokens, ...].
    """

    request: int
    sample: int
    id: int
    logprob: float
    finish: Finish | None
    alternatives: tuple[tuple[int, float], ...] = ()
    cached: int = 0
    drafts: tuple[Acceptance, ...] = ()
    routing: Routing | None = None
