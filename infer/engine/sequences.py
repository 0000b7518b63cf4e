"""What the engine knows of the samples in its slots, and of the prompts that are being read into them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from v4_jax.config import Config
from v4_jax.infer.engine.guide import Guide
from v4_jax.infer.engine.programs import PromptScores
from v4_jax.infer.engine.requests import Event, Finish, Request
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.engine.speculative import DraftCounts, StepOutput
from v4_jax.infer.prefix_cache.hashes import BlockHashes
from v4_jax.outputs import Routing


@dataclasses.dataclass(eq=False)
class SequenceState:
    """A sample in its slot.

    Attributes:
      request: its request's number.
      sample: which sample it is.
      slot: its row of the cache.
      sampling: with its own seed.
      stops: tokens that end it.
      top_logprobs: most probable tokens to report.
      guide: what else decides about its tokens; None once nothing does.
      tokens_left: tokens that it may still generate; 0 once it has ended.
      last_prompt_token: the prompt's last token until a step takes it; None from then on.
      newest_token: the token that its next step takes, as far as the host knows.
      hashes: of the tokens before the newest one; None without a prefix cache.
      cached_tokens: tokens of its prompt that were in the prefix cache.
      drafts: how often drafts of its tokens were right.
      routing: decisions for the tokens that were read, piece by piece, where they are kept.
      echo_left: tokens of its prompt that it has still to echo.
    """

    request: int
    sample: int
    slot: int
    sampling: Sampling
    stops: frozenset[int]
    top_logprobs: int
    guide: Guide | None
    tokens_left: int
    last_prompt_token: int | None
    newest_token: int
    hashes: BlockHashes | None = None
    cached_tokens: int = 0
    drafts: DraftCounts = dataclasses.field(default_factory=DraftCounts)
    routing: list[Routing] = dataclasses.field(default_factory=list)
    echo_left: int = 0

    @classmethod
    def of(cls, request: Request, number: int, sample: int, slot: int, config: Config, depth: int = 0) -> SequenceState:
        """A sample of a request that is admitted to a slot.

        Args:
          request: what is asked.
          number: the request's.
          sample: which of its samples it is.
          slot: where it goes.
          config: the architecture.
          depth: drafts of a step.
        """
        seed = (request.sampling.seed + sample) % 2**32
        return cls(
            request=number,
            sample=sample,
            slot=slot,
            sampling=dataclasses.replace(request.sampling, seed=seed),
            stops=request.stops(config),
            top_logprobs=request.top_logprobs,
            guide=request.guide(config),
            tokens_left=request.max_tokens,
            last_prompt_token=request.prompt[-1],
            newest_token=request.prompt[-1],
            drafts=DraftCounts(depth),
            echo_left=len(request.prompt) - 1 if request.echo else 0,
        )

    @property
    def ended(self) -> bool:
        """Whether nothing comes of it any more."""
        return not (self.tokens_left or self.echo_left)

    @property
    def takes_drafts(self) -> bool:
        """Whether its next step may take drafts: rows go one token at a time in prompts and while a guide leads."""
        return self.last_prompt_token is None and self.guide is None

    @property
    def constrained(self) -> bool:
        """Whether a grammar decides about its next token."""
        return self.guide is not None and self.guide.constrained

    def finish(self, token: int, logprob: float) -> Finish | None:
        """Whether it ends with a token that it has got, and why; its guide takes note of the token.

        A log-probability is finite if and only if the logits are, apart from single ones of minus infinity, which are
        never drawn: no other flag has to come from the devices.
        """
        if not math.isfinite(logprob):
            return "error"
        complete = token in self.stops and not (self.guide is not None and self.guide.opens)
        if self.guide is not None:
            complete = complete or self.guide.read(token)
            if self.guide.spent:
                self.guide = None
        if complete:
            return "stop"
        return None if self.tokens_left else "length"

    def event(self, output: StepOutput, index: int, finish: Finish | None) -> Event:
        """What is said about a token.

        Args:
          output: of the step that yielded it, on the host.
          index: which of the sequence's tokens in that step it is.
          finish: why the sequence ends with it, if it does.
        """
        at = self.slot, index
        token, logprob = int(output.ids[at]), float(output.logprobs[at])
        return self._event(token, logprob, finish, output.alternatives, at)

    def echo(self, scores: PromptScores, row: int, index: int, token: int) -> Event:
        """What is said about the next token of its prompt.

        Args:
          scores: of the chunk that the token before it was read in, on the host.
          row: of the chunk.
          index: where in the chunk the token before it stands.
          token: the token.
        """
        self.echo_left -= 1
        logprob, finish = float(scores.logprobs[row, index]), None
        if not math.isfinite(logprob):
            finish = "error"
        elif self.ended:
            finish = "length"
        return self._event(token, logprob, finish, scores.alternatives, (row, index))  # type: ignore[arg-type]

    def _event(
        self, token: int, logprob: float, finish: Finish | None, alternatives: Any, at: tuple[int, int]
    ) -> Event:
        said = {"cached": self.cached_tokens, "drafts": self.drafts.by_depth}
        event = Event(self.request, self.sample, token, logprob, finish, **said)  # type: ignore[arg-type]
        if not self.top_logprobs:
            return event
        ids, logprobs = (x[at][: self.top_logprobs].tolist() for x in alternatives)
        return event._replace(alternatives=tuple(zip(ids, logprobs, strict=True)))


@dataclasses.dataclass(eq=False)
class PrefillState:
    """A prompt that is being read: into the first sample's slot, up to its last token.

    Attributes:
      prompt: its tokens.
      sequences: the samples that go on from it.
      tokens_read: tokens that were read or loaded from the prefix cache; None before it begins.
      sealed: tokens whose entries were loaded from the prefix cache.
      hashes: of what there is to read; None without a prefix cache.
      salt: the request's.
      echo: likewise.
      routing: decisions for what was read, piece by piece, where they are kept.
    """

    prompt: Sequence[int]
    sequences: list[SequenceState]
    tokens_read: int | None = None
    sealed: int = 0
    hashes: BlockHashes | None = None
    salt: bytes = b""
    echo: bool = False
    routing: list[Routing] = dataclasses.field(default_factory=list)

    @property
    def slot(self) -> int:
        """Where it is read into."""
        return self.sequences[0].slot

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return all(sequence.ended for sequence in self.sequences)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to read."""
        return self.tokens_read == len(self.prompt) - 1


class EchoedChunk(NamedTuple):
    """Tokens of a prompt that were read, and whose followers are echoed.

    Attributes:
      prefill: the prompt.
      begin: the first token.
      end: behind the last.
    """

    prefill: PrefillState
    begin: int
    end: int
