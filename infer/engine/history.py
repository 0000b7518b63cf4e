"""What each slot has read and written, as counts over the vocabulary on the devices: what penalties look at."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array


class History(struct.PyTreeNode):
    """The tokens of every slot.

    Attributes:
      prompted: [B, V] bool, whether a token is in the prompt.
      generated: [B, V] int32, how often it was generated.
    """

    prompted: Array
    generated: Array

    @classmethod
    def empty(cls, slots: int, vocabulary: int) -> History:
        """Of slots that have seen nothing."""
        return cls(jnp.zeros((slots, vocabulary), bool), jnp.zeros((slots, vocabulary), jnp.int32))

    def read(self, slots: Array, tokens: Array, counts: Array, begin: Array) -> History:
        """After `slots` [P] read `counts` [P] of the prompt tokens [P, C]; where `begin` [P] is 0, they start anew."""
        fresh = jnp.where(begin == 0, slots, self._nowhere)
        real = jnp.arange(tokens.shape[1]) < counts[:, None]
        prompted = self.prompted.at[fresh].set(False, mode="drop")
        prompted = prompted.at[slots[:, None], jnp.where(real, tokens, self._unused)].set(True, mode="drop")
        return History(prompted, self.generated.at[fresh].set(0, mode="drop"))

    def prompt(self, tokens: Array, real: Array) -> History:
        """After each slot for which `real` [B] holds read one prompt token of `tokens` [B]."""
        return self.replace(prompted=self.prompted.at[self._one_each(tokens, real)].set(True, mode="drop"))

    def generate(self, tokens: Array, real: Array) -> History:
        """After each slot for which `real` [B] holds generated one of `tokens` [B]."""
        return self.replace(generated=self.generated.at[self._one_each(tokens, real)].add(1, mode="drop"))

    def copy(self, source: Array, targets: Array) -> History:
        """With slot `source` copied to `targets`; one out of range is dropped."""
        return History(*(x.at[targets].set(x[source], mode="drop") for x in (self.prompted, self.generated)))

    @property
    def _nowhere(self) -> int:
        return self.prompted.shape[0]

    @property
    def _unused(self) -> int:
        return self.prompted.shape[1]

    def _one_each(self, tokens: Array, real: Array) -> tuple[Array, Array]:
        return jnp.arange(self._nowhere), jnp.where(real, tokens, self._unused)
