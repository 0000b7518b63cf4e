"""Hashes that a text's pages are kept under: each stands for all tokens up to its page's end, and for the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4_jax.cache.entries import PAGE


class BlockHashes:
    """The hashes of a text that grows token by token, one for each complete page.

    Args:
      root: what the text is for; see `root_hash`.
      tokens: its first tokens.

    Attributes:
      hashes: of its complete pages, 32 bytes each.
    """

    def __init__(self, root: bytes, tokens: Sequence[int] = ()) -> None:
        self._root = root
        self.hashes: list[bytes] = []
        self._unfinished: list[int] = []  # tokens of the page that is not complete yet
        for token in tokens:
            self.append(token)

    def __len__(self) -> int:
        return PAGE * len(self.hashes) + len(self._unfinished)

    def copy(self) -> BlockHashes:
        """One that goes on apart."""
        other = BlockHashes(self._root)
        other.hashes, other._unfinished = self.hashes.copy(), self._unfinished.copy()
        return other

    def append(self, token: int) -> bool:
        """Adds a token; returns whether it completes a page."""
        self._unfinished.append(token)
        if len(self._unfinished) < PAGE:
            return False
        before = self.hashes[-1] if self.hashes else self._root
        self.hashes.append(hashlib.sha256(before + np.asarray(self._unfinished, "<i4").tobytes()).digest())
        self._unfinished = []
        return True


def root_hash(settings: Iterable[Any], params: Any | None) -> bytes:
    """Hash of what pages depend on besides tokens.

    Args:
      settings: what can be written as JSON: architecture, formats.
      params: the weights, of which every element counts; None if all pages come from this process anyway.
    """
    root = hashlib.sha256(json.dumps([PAGE, *settings], sort_keys=True).encode())
    if params is not None:
        sums = jax.device_get(jax.jit(lambda params: [_sums(x) for x in jax.tree.leaves(params)])(params))
        root.update(np.asarray(sums, "<u4").tobytes())
    return root.digest()


def _sums(x: jax.Array) -> jax.Array:
    """Two sums over the bits of all elements, each weighted by its place: [2] uint32, the same on any mesh."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = (place ^ jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)) * jnp.uint32(0x9E3779B1)
        place ^= place >> 15
    weights = (place * jnp.uint32(0x85EBCA77) | 1, place * jnp.uint32(0xC2B2AE3D) | 1)
    return jnp.stack([jnp.sum(bits * weight, dtype=jnp.uint32) for weight in weights])
