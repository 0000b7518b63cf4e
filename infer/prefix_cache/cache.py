"""The prefix cache: prompts that begin as an earlier text did are read from where they differ on.

Technical report, on-disk storage of the key/value cache. Texts are kept in pages of 128 tokens (`cache.pages`), each
under the hash of all tokens up to its end, and so are the tails that a row needs to go on from there. Pages are small
and always kept. Tails are large, and how many are kept is a choice: every page's ("full"), one in so many tokens, or
none. From the last page whose tail is there, a row goes on at once. Where tails are missing, pages alone help as well:
reading as many tokens again as the windows of all layers span refills the windows, while entries and index keys come
from the pages. The shorter of the two ways is taken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4_jax.cache.entries import PAGE
from v4_jax.infer.prefix_cache.store import Directory, Item, PageStore

Windows = Literal["full", "none"] | int


@dataclasses.dataclass(frozen=True)
class Keeping:
    """What is kept, and where.

    Attributes:
      memory: bytes of the host's memory.
      windows: which tails: "full" all, "none", or one in so many tokens, a multiple of 128.
      directory: where to keep pages and tails across restarts, besides; it may be shared.
      disk: bytes of the directory.

    Raises:
      ValueError: sizes out of range.
    """

    memory: int
    windows: Windows = "full"
    directory: Path | None = None
    disk: int = 64 << 30

    def __post_init__(self) -> None:
        for name in ("memory", "disk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 bytes or more")
        if isinstance(self.windows, int) and (self.windows < 1 or self.windows % PAGE):
            raise ValueError(f"windows is {self.windows}, expected 'full', 'none', or tokens, a multiple of {PAGE}")

    @property
    def every(self) -> int:
        """Tokens from one tail that is kept to the next; 0 if none is."""
        return {"full": PAGE, "none": 0}[self.windows] if isinstance(self.windows, str) else self.windows


class Plan(NamedTuple):
    """How a row gets its beginning.

    Attributes:
      pages: pages to put back, the first ones of the text.
      begin: tokens that need not be read.
      tail: name of the tail there; None if the windows are to be refilled.
    """

    pages: int
    begin: int
    tail: str | None


class Trail:
    """The hashes of a text that grows token by token.

    Args:
      root: what the text is for: the model and its precision.

    Attributes:
      keys: of its complete pages.
    """

    def __init__(self, root: bytes, tokens: Sequence[int] = ()) -> None:
        self._root = root
        self.keys: list[bytes] = []
        self._open: list[int] = []
        for token in tokens:
            self.push(token)

    def __len__(self) -> int:
        return PAGE * len(self.keys) + len(self._open)

    def copy(self) -> Trail:
        """One that goes on apart."""
        other = Trail(self._root)
        other.keys, other._open = self.keys.copy(), self._open.copy()
        return other

    def push(self, token: int) -> bool:
        """Adds a token; returns whether it completes a page."""
        self._open.append(token)
        if len(self._open) < PAGE:
            return False
        before = self.keys[-1] if self.keys else self._root
        self.keys.append(hashlib.sha256(before + np.asarray(self._open, "<i4").tobytes()).digest())
        self._open = []
        return True


class PrefixCache:
    """Finds and keeps pages for one engine.

    Args:
      keeping: what is kept, and where.
      root: hash of what pages depend on besides tokens.
      refill: tokens after whose reading all windows are right, whatever they held before.

    Raises:
      OSError: the directory cannot be made or read.
    """

    def __init__(self, keeping: Keeping, root: bytes, refill: int) -> None:
        self._every, self._root, self._refill = keeping.every, root, refill
        directory = None if keeping.directory is None else Directory(keeping.directory, keeping.disk)
        self._store = PageStore(keeping.memory, directory)

    @property
    def nbytes(self) -> int:
        """Memory in use."""
        return self._store.nbytes

    def trail(self, tokens: Sequence[int]) -> Trail:
        """The hashes of a text."""
        return Trail(self._root, tokens)

    def plan(self, keys: Sequence[bytes]) -> Plan:
        """The way that leaves least to read, to begin a text with these pages."""
        pages = next((i for i, key in enumerate(keys) if _page(key) not in self._store), len(keys))
        refilled = max(0, pages * PAGE - self._refill)
        for i in range(pages, max(0, refilled // PAGE - 1), -1):
            if _tail(keys[i - 1]) in self._store:
                return Plan(i, i * PAGE, _tail(keys[i - 1]))
        return Plan(pages if refilled else 0, refilled, None)

    def page(self, key: bytes) -> Item | None:
        """A page's arrays; None if it is lost."""
        return self._store.get(_page(key))

    def tail(self, plan: Plan) -> Item | None:
        """The arrays of a plan's tail; None if it is lost."""
        return None if plan.tail is None else self._store.get(plan.tail)

    def used(self, keys: Sequence[bytes]) -> None:
        """Says that a text began with these pages: what only longer texts need is forgotten before."""
        self._store.use(_page(key) for key in reversed(keys))

    def wants_page(self, key: bytes) -> bool:
        """Whether a page is to be kept, and is not yet."""
        return _page(key) not in self._store

    def wants_tail(self, key: bytes, end: int) -> bool:
        """Whether the tail of a page that ends before token `end` is to be kept, and is not yet."""
        return bool(self._every) and end % self._every == 0 and _tail(key) not in self._store

    def put_page(self, key: bytes, item: Item) -> None:
        """Keeps a page."""
        self._store.put(_page(key), item)

    def put_tail(self, key: bytes, item: Item) -> None:
        """Keeps a page's tail."""
        self._store.put(_tail(key), item)

    def close(self) -> None:
        """Waits until all is written that is to outlast the process."""
        self._store.close()


def root_of(parts: Iterable[Any], params: Any | None) -> bytes:
    """Hash of what pages depend on besides tokens.

    Args:
      parts: what can be written as JSON: architecture, formats.
      params: the weights, of which every element counts; None if all pages come from this process anyway.
    """
    root = hashlib.sha256(json.dumps([PAGE, *parts], sort_keys=True).encode())
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


def _page(key: bytes) -> str:
    return key.hex() + ".page"


def _tail(key: bytes) -> str:
    return key.hex() + ".tail"
