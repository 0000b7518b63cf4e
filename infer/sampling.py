"""Sampling: one token per row from its logits, by parameters of its own.

A row's random numbers come from its seed and from the position of the token being sampled, and from nothing else: not
from its neighbours in the batch, not from how the prompt was cut into chunks, not from how many steps run in one call.
The same seed therefore gives the same text wherever the logits are the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from v4_jax.head import log_probability


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one row is sampled. The defaults are the release's: the model's own distribution.

    Filters act on the distribution after the temperature: first `top_k`, then `top_p` on what is left of it, while
    `min_p` compares with the best token alone. The best token always survives, and of equal tokens the lower id does.

    Attributes:
      temperature: divides the logits; 0 takes the best token (greedy) and ignores everything else.
      top_p: keep the fewest best tokens whose probabilities sum to at least this; 1 keeps all, 0 the best one.
      top_k: keep this many best tokens; 0 keeps all.
      min_p: keep tokens at least this fraction as probable as the best one; 0 keeps all.
      seed: selects the random numbers.

    Raises:
      ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0

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


GREEDY = Sampling(temperature=0.0)


class SamplingRows(struct.PyTreeNode):
    """The `Sampling` of every row of a batch, as arrays.

    Attributes:
      temperature: [B] float32.
      top_p: [B] float32.
      top_k: [B] int32.
      min_p: [B] float32.
      seed: [B] uint32.
    """

    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array
    seed: Array

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> SamplingRows:
        """Stacks the rows' parameters."""

        def column(name: str, dtype: type) -> Array:
            return jnp.asarray(np.asarray([getattr(row, name) for row in rows], dtype))

        return cls(
            column("temperature", np.float32),
            column("top_p", np.float32),
            column("top_k", np.int32),
            column("min_p", np.float32),
            column("seed", np.uint32),
        )


def sample(logits: Array, rows: SamplingRows, positions: Array) -> tuple[Array, Array]:
    """Draws one token per row.

    Args:
      logits: [B, V] float32.
      rows: the parameters of each row.
      positions: [B] int32 position that the new token will have in its row; folded into the row's key.

    Returns:
      Token ids [B] int32, and their log-probabilities [B] float32 under the model itself: before temperature and
      filters, so that they can be compared with those of scored text.
    """
    greedy = jnp.argmax(logits, axis=-1)

    def draw() -> Array:
        divisor = jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / divisor
        noisy = scaled + _noise(rows.seed, positions, logits.shape[-1])
        filtering = ((rows.top_p < 1) | (rows.top_k > 0) | (rows.min_p > 0)) & (rows.temperature > 0)
        # Filters sort the vocabulary, which is most of the work: skipped unless some row has one.
        kept = jax.lax.cond(jnp.any(filtering), lambda: keep(scaled, rows), lambda: jnp.ones(scaled.shape, bool))
        return jnp.where(rows.temperature > 0, jnp.argmax(jnp.where(kept, noisy, -jnp.inf), axis=-1), greedy)

    tokens = jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: greedy).astype(jnp.int32)
    return tokens, log_probability(logits, tokens)


def keep(scaled: Array, rows: SamplingRows) -> Array:
    """Which tokens survive the filters: [B, V] bool, for `scaled` [B, V] logits after the temperature."""
    order = jnp.argsort(-scaled, axis=-1, stable=True)  # of equal tokens, the lower id is the better one
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(scaled.shape[-1])
    top_k = jnp.where(rows.top_k > 0, rows.top_k, scaled.shape[-1])[:, None]
    probabilities = jax.nn.softmax(jnp.where(rank < top_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the better tokens
    # top_p = 1 means all; a cumulated sum rounds to just below or above 1 and must not decide about the last tokens.
    nucleus = (before < rows.top_p[:, None]) | (rows.top_p >= 1)[:, None]
    likely = probabilities >= rows.min_p[:, None] * probabilities[:, :1]
    kept = (rank == 0) | ((rank < top_k) & nucleus & likely)
    return jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)


def _noise(seeds: Array, positions: Array, size: int) -> Array:
    """Gumbel noise [B, V] of each row's seed and position: adding it makes the largest logit a fair draw."""

    def row(seed: Array, position: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (size,))

    return jax.vmap(row)(seeds, positions)
