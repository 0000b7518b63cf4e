"""Sampling: one token per row from its logits, by parameters of its own.

A row's random numbers come from its seed and from the position of the token being sampled, and from nothing else: not
from its neighbours in the batch, not from how the prompt was cut into chunks, not from how many steps run in one call.
The same seed therefore gives the same text wherever the logits are the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from v4_jax.infer.engine.history import History
from v4_jax.layers.head import log_probability

MOST_BIASES = 300  # entries of `Sampling.logit_bias`, as in OpenAI's interface
ALL = np.uint32(2**32 - 1)  # 32 tokens that may be drawn
MOST_ALTERNATIVES = 20  # likewise, tokens whose log-probabilities can be asked for at each position


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one row is sampled. The defaults are the release's: the model's own distribution.

    Bias and penalties change the logits themselves, in the order below, and count for greedy rows too. Filters act on
    the distribution after the temperature: first `top_k`, then `top_p` on what is left of it, while `min_p` compares
    with the best token alone. The best token always survives, and of equal tokens the lower id does.

    Attributes:
      temperature: divides the logits; 0 takes the best token (greedy) and ignores filters and seed.
      top_p: keep the fewest best tokens whose probabilities sum to at least this; 1 keeps all, 0 the best one.
      top_k: keep this many best tokens; 0 keeps all.
      min_p: keep tokens at least this fraction as probable as the best one; 0 keeps all.
      seed: selects the random numbers.
      logit_bias: what is added to the logits of some tokens, by id, -100 to 100 (OpenAI's definition).
      repetition_penalty: divides positive logits of tokens that are in the prompt or were generated, and multiplies
        negative ones (CTRL, https://arxiv.org/abs/1909.05858, section 4.1); 1 changes nothing.
      frequency_penalty: taken from a token's logit for each time that it was generated, -2 to 2 (OpenAI's definition).
      presence_penalty: taken from it once if it was generated at all, -2 to 2.

    Raises:
      ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self):
        for name, largest in (("temperature", math.inf), ("top_p", 1.0), ("min_p", 1.0)):
            value = getattr(self, name)
            if not (0 <= value <= largest and math.isfinite(value)):
                legal = "a finite number from 0 up" if largest == math.inf else f"a number from 0 to {largest:g}"
                raise ValueError(f"{name} is {value}, expected {legal}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (keep all tokens) or a positive number of tokens")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, expected an integer from 0 to {2**32 - 1}")
        if not (0 < self.repetition_penalty < math.inf):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, expected a finite number above 0")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            if not -2 <= value <= 2:
                raise ValueError(f"{name} is {value}, expected a number from -2 to 2")
        if len(self.logit_bias) > MOST_BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} entries, expected at most {MOST_BIASES}")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias of token {token} is {bias}, expected a number from -100 to 100")

    @property
    def penalizes(self) -> bool:
        """Whether it looks at the tokens before, for which someone has to keep a `History`."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)


GREEDY = Sampling(temperature=0.0)


class SamplingBatch(struct.PyTreeNode):
    """The `Sampling` of every row of a batch, as arrays.

    Attributes:
      temperature: [B] float32.
      top_p: [B] float32.
      top_k: [B] int32.
      min_p: [B] float32.
      seed: [B] uint32.
      repetition_penalty: [B] float32.
      frequency_penalty: [B] float32.
      presence_penalty: [B] float32.
      biased: [B, MOST_BIASES] int32 ids of tokens; a large number where there is none.
      bias: [B, MOST_BIASES] float32.
    """

    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array
    seed: Array
    repetition_penalty: Array
    frequency_penalty: Array
    presence_penalty: Array
    biased: Array
    bias: Array

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> SamplingBatch:
        """Stacks the parameters of all rows, on the host."""

        def column(values: Iterable[float], dtype: type) -> Any:  # numpy's, where the fields are the devices'
            return np.asarray(list(values), dtype)

        biased: Any = np.full((len(samplings), MOST_BIASES), _NO_TOKEN, np.int32)
        bias: Any = np.zeros((len(samplings), MOST_BIASES), np.float32)
        for row, sampling in enumerate(samplings):
            count = len(sampling.logit_bias)
            biased[row, :count] = list(sampling.logit_bias)
            bias[row, :count] = list(sampling.logit_bias.values())
        return cls(
            temperature=column((one.temperature for one in samplings), np.float32),
            top_p=column((one.top_p for one in samplings), np.float32),
            top_k=column((one.top_k for one in samplings), np.int32),
            min_p=column((one.min_p for one in samplings), np.float32),
            seed=column((one.seed for one in samplings), np.uint32),
            repetition_penalty=column((one.repetition_penalty for one in samplings), np.float32),
            frequency_penalty=column((one.frequency_penalty for one in samplings), np.float32),
            presence_penalty=column((one.presence_penalty for one in samplings), np.float32),
            biased=biased,
            bias=bias,
        )


_NO_TOKEN = 2**31 - 1  # outside of every vocabulary; a negative number would count from its end


@jax.named_scope("engine.sample")
def sample(
    logits: Array,
    sampling: SamplingBatch,
    positions: Array,
    history: History | None = None,
    allowed: Array | None = None,
    forced: Array | None = None,
) -> tuple[Array, Array]:
    """Draws one token per row.

    Args:
      logits: [B, V] float32.
      sampling: the parameters of each row.
      positions: [B] int32 position that the new token will have in its row; folded into the row's key.
      history: the tokens before; without it no row is penalised.
      allowed: [B, ceil(V / 32)] uint32, a bit for each token that may be drawn, the lowest first; without it all may.
      forced: [B] int32 tokens to take instead; -1 for none.

    Returns:
      Token ids [B] int32, and their log-probabilities [B] float32 under the model itself: before bias, penalties,
      constraint, temperature and filters, so that they can be compared with those of scored text.
    """
    adjusted = adjust(logits, sampling, history)
    if allowed is not None:
        adjusted = restrict(adjusted, allowed)
    greedy = jnp.argmax(adjusted, axis=-1)

    def draw() -> Array:
        divisor = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
        scaled = (adjusted - jnp.max(adjusted, axis=-1, keepdims=True)) / divisor
        noisy = scaled + _noise(sampling.seed, positions, logits.shape[-1])
        filtering = ((sampling.top_p < 1) | (sampling.top_k > 0) | (sampling.min_p > 0)) & (sampling.temperature > 0)
        # Filters sort the vocabulary, which is most of the work: skipped unless some row has one.
        kept = jax.lax.cond(jnp.any(filtering), lambda: keep(scaled, sampling), lambda: jnp.ones(scaled.shape, bool))
        return jnp.where(sampling.temperature > 0, jnp.argmax(jnp.where(kept, noisy, -jnp.inf), axis=-1), greedy)

    tokens = jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy).astype(jnp.int32)
    if forced is not None:
        tokens = jnp.where(forced >= 0, forced, tokens)
    return tokens, log_probability(logits, tokens)


def adjust(logits: Array, sampling: SamplingBatch, history: History | None) -> Array:
    """Logits [B, V] with bias and penalties. Work that no row asks for is skipped; a row that asks not stays as it is.

    Args:
      logits: [B, V] float32.
      sampling: the parameters of each row.
      history: the tokens before; without it no row is penalised.
    """

    def biased() -> Array:
        return logits.at[jnp.arange(logits.shape[0])[:, None], sampling.biased].add(sampling.bias, mode="drop")

    logits = jax.lax.cond(jnp.any(sampling.biased != _NO_TOKEN), biased, lambda: logits)
    if history is None:
        return logits
    factor = sampling.repetition_penalty[:, None]
    per_use, once = sampling.frequency_penalty[:, None], sampling.presence_penalty[:, None]

    def penalized() -> Array:
        used = history.generated > 0
        repeated = jnp.where(logits > 0, logits / factor, logits * factor)
        repeats = (history.prompted | used) & (factor != 1)
        return jnp.where(repeats, repeated, logits) - per_use * history.generated - once * used

    return jax.lax.cond(jnp.any((factor != 1) | (per_use != 0) | (once != 0)), penalized, lambda: logits)


def restrict(logits: Array, allowed: Array) -> Array:
    """Logits [B, V], minus infinity where a bit of `allowed` [B, ceil(V / 32)] uint32 is not set, the lowest first."""

    def masked() -> Array:
        bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[-1]] == 1, logits, -jnp.inf)

    return jax.lax.cond(jnp.any(allowed != ALL), masked, lambda: logits)


def best(logits: Array) -> tuple[Array, Array]:
    """The most probable tokens of each row of logits [B, V], best first.

    Returns:
      Ids [B, K] int32 and log-probabilities [B, K] float32, where K is `MOST_ALTERNATIVES` or the whole vocabulary if
      that is smaller. Of equal tokens the lower id comes first.
    """
    values, ids = jax.lax.top_k(logits, min(MOST_ALTERNATIVES, logits.shape[-1]))
    nothing = jnp.full(logits.shape[:1], -1, jnp.int32)  # whose log-probability is minus the log of the normaliser
    return ids.astype(jnp.int32), values + log_probability(logits, nothing)[:, None]


def keep(scaled: Array, sampling: SamplingBatch) -> Array:
    """Which tokens survive the filters: [B, V] bool, for `scaled` [B, V] logits after the temperature."""
    order = jnp.argsort(-scaled, axis=-1, stable=True)  # of equal tokens, the lower id is the better one
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(scaled.shape[-1])
    top_k = jnp.where(sampling.top_k > 0, sampling.top_k, scaled.shape[-1])[:, None]
    probabilities = jax.nn.softmax(jnp.where(rank < top_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the better tokens
    # top_p = 1 means all; a cumulated sum rounds to just below or above 1 and must not decide about the last tokens.
    nucleus = (before < sampling.top_p[:, None]) | (sampling.top_p >= 1)[:, None]
    likely = probabilities >= sampling.min_p[:, None] * probabilities[:, :1]
    kept = (rank == 0) | ((rank < top_k) & nucleus & likely)
    return jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)


def _noise(seeds: Array, positions: Array, size: int) -> Array:
    """Gumbel noise [B, V] of each row's seed and position: adding it makes the largest logit a fair draw."""

    def row(seed: Array, position: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (size,))

    return jax.vmap(row)(seeds, positions)
