"""Drafters: who guesses the tokens after a row's newest one, for the model to check all at once (`speculative`).

A drafter sees what the trunk returns about the tokens that it reads, in prefill and in every step, and may have a part
of the cache of its own. Trunk and drafter have always read equally many tokens of a row: a drafter's own guesses are
taken back before it returns.

Drafts are sampled with the same random numbers as the tokens that they stand for. The two draws agree more often than
independent ones would, because what the noise favours it favours in both: with equal distributions, always.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.cache import pages
from v4_jax.cache.cache import Cache, RingRole
from v4_jax.cache.ring import MOST_ROLLED_BACK
from v4_jax.config import Config
from v4_jax.infer.engine.sampling import SamplingBatch, sample
from v4_jax.infer.engine.speculative import StepOutput
from v4_jax.outputs import Output
from v4_jax.placement import Place

# `Transformer.apply` with the parameters bound: calls the trunk, or the method that `method` names.
Apply = Callable[..., Any]


class Drafts(NamedTuple):
    """Guesses of the tokens after each row's newest one.

    Attributes:
      ids: [B, depth] int32.
      confidence: [B, depth] float32 the drafter's own estimate, before a sigmoid, that each is right if those before it
        are; None if it makes none.
    """

    ids: Array
    confidence: Array | None = None


class Drafter(Protocol):
    """Guesses tokens within the engine's programs; its methods are pure functions of what they are given."""

    @property
    def kind(self) -> str:
        """Tells drafters apart whose parts of the cache are of no use to each other."""

    @property
    def depth(self) -> int:
        """Tokens that it guesses in every step."""

    @property
    def confident(self) -> bool:
        """Whether it estimates how far its drafts are right (`Drafts.confidence`)."""

    @property
    def trunk_options(self) -> Mapping[str, Any]:
        """Keyword arguments of every trunk call, which make it return what the drafter needs."""

    @property
    def reach(self) -> int:
        """Tokens that a step may write into the drafter's part of the cache, drafts that are taken back included."""

    def prefill(self, apply: Apply, output: Output, tokens: Array, lengths: Array, cache: Cache) -> Cache:
        """Reads a chunk of prompts that the trunk has just read.

        Args:
          apply: the model.
          output: the trunk's, of the chunk.
          tokens: [P, C + 1] int32 the chunk, and one token more: a row's next one, where it has one.
          lengths: [P] int32 tokens of the chunk that are the row's.
          cache: the trunk's, after the chunk.

        Returns:
          The cache in which the drafter has read the chunk too.
        """

    def draft(
        self, apply: Apply, output: Output, step: StepOutput, sampling: SamplingBatch, cache: Cache, place: Place
    ) -> tuple[Drafts, Cache]:
        """Reads the tokens that a step accepted, and guesses those that follow the newest one.

        Args:
          apply: the model.
          output: the trunk's, of the 1 + depth tokens that the step fed.
          step: what was sampled after them; where its counts are 0, the row takes no part.
          sampling: how each row is sampled.
          cache: the trunk's, whose lengths [B] include the accepted tokens.
          place: where the program runs.

        Returns:
          The drafts, and the cache in which the drafter has read what was accepted, and none of its drafts.
        """

    def at(self, cache: Cache, lengths: Array) -> Cache:
        """The cache as if the drafter had read `lengths` [B] int32 tokens of each row, at most as many as it has."""

    def tail_sizes(self, cache: Cache, config: Config) -> dict[RingRole, int]:
        """What a prefix cache is to keep of a row's end, so that trunk and drafter go on from there: tokens by role."""

    def tokens_to_refill(self, config: Config) -> int:
        """How many tokens to read again until the windows of trunk and drafter are right, whatever they held before."""


@dataclasses.dataclass(frozen=True)
class PlainDecoding:
    """No drafts: one token a step. Arguments are as in `Drafter`."""

    kind: ClassVar[str] = "none"
    depth: ClassVar[int] = 0
    confident: ClassVar[bool] = False
    trunk_options: ClassVar[Mapping[str, Any]] = {}
    reach: ClassVar[int] = 0

    def prefill(self, apply: Apply, output: Output, tokens: Array, lengths: Array, cache: Cache) -> Cache:
        """Has nothing to read."""
        return cache

    def draft(
        self, apply: Apply, output: Output, step: StepOutput, sampling: SamplingBatch, cache: Cache, place: Place
    ) -> tuple[Drafts, Cache]:
        """No drafts: ids [B, 0]."""
        return Drafts(jnp.zeros((step.counts.shape[0], 0), jnp.int32)), cache

    def at(self, cache: Cache, lengths: Array) -> Cache:
        """The cache as it is: there is no part of a drafter's."""
        return cache

    def tail_sizes(self, cache: Cache, config: Config) -> dict[RingRole, int]:
        """Those of the trunk alone."""
        return pages.tail_sizes(cache, config, draft=False)

    def tokens_to_refill(self, config: Config) -> int:
        """Those of the trunk alone."""
        return pages.tokens_to_refill(config, draft=False)


class _WithRing:
    """What drafters with keys of their own in the ring "draft" have in common. Arguments are as in `Drafter`."""

    def at(self, cache: Cache, lengths: Array) -> Cache:
        """Sets the counts of tokens that were read into the ring."""
        return cache.rolled_back(draft_lengths=lengths)

    def tail_sizes(self, cache: Cache, config: Config) -> dict[RingRole, int]:
        """Those of the trunk, and the ring's windows."""
        return pages.tail_sizes(cache, config, draft=True)

    def tokens_to_refill(self, config: Config) -> int:
        """A window for each of the trunk's layers, and one for the ring: its layers all read the same."""
        return pages.tokens_to_refill(config, draft=True)


def _sampled(logits: Array, number: Array | int, sampling: SamplingBatch, cache: Cache, place: Place) -> Array:
    """The draft [B] in place `number`, from its logits [B, V], as the row's own sampling would draw it there."""
    ids, _ = sample(*place.keep((logits, sampling, cache.lengths + 1 + number)))
    return ids


@dataclasses.dataclass(frozen=True)
class MtpDrafter(_WithRing):
    """The multi-token-prediction block (DeepSeek-V3 technical report, section 5.4.3). Arguments are as in `Drafter`.

    The block reads a token together with the trunk's streams of the one before, which warms its window. From the
    newest token on it goes over its own streams, and samples one draft after another.

    Attributes:
      depth: tokens that it guesses, 1 to `DEEPEST`.
    """

    DEEPEST: ClassVar[int] = 4  # it was trained to look one token ahead, and gets worse with every further one

    kind: ClassVar[str] = "mtp"
    confident: ClassVar[bool] = False
    trunk_options: ClassVar[Mapping[str, Any]] = {}

    depth: int

    @property
    def reach(self) -> int:
        """1 + depth tokens with the trunk's streams, and then all drafts but the last."""
        return 2 * self.depth

    def prefill(self, apply: Apply, output: Output, tokens: Array, lengths: Array, cache: Cache) -> Cache:
        """Reads each token of the chunk with the next one, of which the chunk's last has one more."""
        read = apply(output.streams, tokens[:, 1:], lengths=lengths, cache=cache, logits="none", method="mtp")
        assert read.cache is not None
        return read.cache

    def draft(
        self, apply: Apply, output: Output, step: StepOutput, sampling: SamplingBatch, cache: Cache, place: Place
    ) -> tuple[Drafts, Cache]:
        """Samples one draft after another, each from what the block makes of the one before."""
        going = jnp.minimum(step.counts, 1)

        def block(streams: Array, next_tokens: Array, lengths: Array, cache: Cache) -> tuple[Array, Array, Cache]:
            """The block's streams, logits [B, V] of each row's last token, and the cache."""
            read = apply(streams, next_tokens, lengths=lengths, cache=cache, logits="last", method="mtp")
            assert read.logits is not None and read.cache is not None
            return read.streams, read.logits[:, 0], read.cache

        guess = functools.partial(_sampled, sampling=sampling, cache=cache, place=place)

        def further(carry: tuple[Array, Array, Cache], number: Array) -> tuple[tuple[Array, Array, Cache], Array]:
            streams, token, cache = carry
            streams, logits, cache = block(streams, token[:, None], going, cache)
            token = guess(logits, number)
            return (streams, token, cache), token

        streams, logits, read = block(output.streams, step.ids, step.counts, cache)
        first = guess(logits, 0)
        last = jnp.maximum(step.counts - 1, 0)[:, None, None, None]
        start = jnp.take_along_axis(streams, last, axis=1), first, read
        (_, _, after), others = jax.lax.scan(further, start, jnp.arange(1, self.depth, dtype=jnp.int32))
        return Drafts(jnp.concatenate([first[:, None], others.T], axis=1)), self.at(after, read.draft_lengths)


@dataclasses.dataclass(frozen=True)
class DSparkDrafter(_WithRing):
    """DSpark's stages (arXiv 2607.05147): a whole block at once. Arguments are as in `Drafter`.

    The stages read what the trunk taps of every token, which fills their windows. Of the block that they draft they
    keep nothing, so that there is nothing to take back.

    Attributes:
      depth: tokens that they guess: the block that they were trained for.
    """

    kind: ClassVar[str] = "dspark"
    confident: ClassVar[bool] = True
    trunk_options: ClassVar[Mapping[str, Any]] = {"return_taps": True}

    depth: int

    @property
    def reach(self) -> int:
        """The tokens of a step that were accepted."""
        return 1 + self.depth

    def prefill(self, apply: Apply, output: Output, tokens: Array, lengths: Array, cache: Cache) -> Cache:
        """Reads the chunk's taps."""
        return apply(output.taps, lengths=lengths, cache=cache, method="dspark_read")

    def draft(
        self, apply: Apply, output: Output, step: StepOutput, sampling: SamplingBatch, cache: Cache, place: Place
    ) -> tuple[Drafts, Cache]:
        """Reads the taps of what was accepted but the newest token, with which the block begins."""
        newest = jnp.take_along_axis(step.ids, jnp.maximum(step.counts - 1, 0)[:, None], axis=1)[:, 0]
        choose = functools.partial(_sampled, sampling=sampling, cache=cache, place=place)
        draft = apply(output.taps, newest, lengths=step.counts, cache=cache, choose=choose, method="dspark")
        return Drafts(draft.tokens, draft.confidence), draft.cache


DEEPEST = MOST_ROLLED_BACK - 1  # drafts of a step that the cache can take back
assert MtpDrafter.DEEPEST <= DEEPEST

LEGAL = f"none, mtp:1 to mtp:{MtpDrafter.DEEPEST}, dspark or auto"


def choose_drafter(config: Config, draft: str) -> Drafter:
    """What drafts with a model.

    Args:
      config: the architecture.
      draft: "none"; "mtp:N", N tokens a step by the multi-token-prediction block; "dspark"; or "auto", what the model
        has: DSpark, or one token by the multi-token-prediction block.

    Raises:
      ValueError: no such drafter, or one that the model lacks.
    """
    if draft == "auto":
        draft = "dspark" if config.dspark_stages else "mtp:1" if config.num_nextn_predict_layers else "none"
    name, _, depth = draft.partition(":")
    if draft == "none":
        return PlainDecoding()
    if draft == "dspark":
        if not config.dspark_stages:
            raise ValueError(f"draft is 'dspark', but this model has no DSpark stages; expected {_legal(config)}")
        if config.dspark_block_size > DEEPEST:
            raise ValueError(f"this model drafts {config.dspark_block_size} tokens at once, expected at most {DEEPEST}")
        return DSparkDrafter(config.dspark_block_size)
    if name != "mtp" or depth not in map(str, range(1, MtpDrafter.DEEPEST + 1)):
        raise ValueError(f"draft is {draft!r}, expected {LEGAL}")
    if not config.num_nextn_predict_layers:
        raise ValueError(
            f"draft is {draft!r}, but this model has no multi-token-prediction block; expected {_legal(config)}"
        )
    return MtpDrafter(int(depth))


def _legal(config: Config) -> str:
    """What a model can be asked for."""
    if config.dspark_stages:
        return "none, dspark or auto"
    return f"none, mtp:1 to mtp:{MtpDrafter.DEEPEST} or auto" if config.num_nextn_predict_layers else "none or auto"
