"""The prefix cache: prompts that begin as an earlier text did are read from where they differ on.

Technical report, on-disk storage of the key/value cache. Texts are kept in pages of 128 tokens (`cache.pages`), each
under the hash of all tokens up to its end, and so are the tails that a row needs to go on from there. Pages are small
and always kept. Tails are large, and how many are kept is a choice: every page's ("full"), one in so many tokens, or
none. From the last page whose tail is there, a row goes on at once. Where tails are missing, pages alone help as well:
reading as many tokens again as the windows of all layers span refills the windows, while entries and index keys come
from the pages. The shorter of the two ways is taken. Eviction is by least recent use (LRU).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from v4_jax.cache.entries import PAGE
from v4_jax.infer.prefix_cache.hashes import BlockHashes
from v4_jax.infer.prefix_cache.store import Directory, Item, PageStore

Windows = Literal["full", "none"] | int


@dataclasses.dataclass(frozen=True)
class PrefixCacheOptions:
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
        if self.windows == "full":
            return PAGE
        return 0 if self.windows == "none" else self.windows


class PrefixMatch(NamedTuple):
    """What of a text can be reused.

    Attributes:
      pages: pages to load, the first ones of the text.
      tokens: tokens that need not be read again.
      tail: name of the tail after these tokens; None if the windows are to be refilled.
    """

    pages: int
    tokens: int
    tail: str | None


class PrefixCache:
    """Finds and keeps pages for one engine.

    Args:
      options: what is kept, and where.
      root: hash of what pages depend on besides tokens.
      refill: tokens after whose reading all windows are right, whatever they held before.

    Raises:
      OSError: the directory cannot be made or read.
    """

    def __init__(self, options: PrefixCacheOptions, root: bytes, refill: int) -> None:
        self._every, self._root, self._refill = options.every, root, refill
        directory = None if options.directory is None else Directory(options.directory, options.disk)
        self._store = PageStore(options.memory, directory)

    @property
    def nbytes(self) -> int:
        """Memory in use."""
        return self._store.nbytes

    def hashes(self, tokens: Sequence[int], salt: bytes = b"") -> BlockHashes:
        """The hashes of a text, which no text of another salt has."""
        return BlockHashes(hashlib.sha256(self._root + salt).digest() if salt else self._root, tokens)

    def match(self, hashes: Sequence[bytes]) -> PrefixMatch:
        """What leaves least to read of a text that begins with these pages."""
        pages = 0
        while pages < len(hashes) and _page(hashes[pages]) in self._store:
            pages += 1
        refilled = max(0, pages * PAGE - self._refill)  # tokens that need not be read where windows are refilled
        for count in range(pages, max(0, refilled // PAGE - 1), -1):
            tail = _tail(hashes[count - 1])
            if tail in self._store:
                return PrefixMatch(count, count * PAGE, tail)
        return PrefixMatch(pages if refilled else 0, refilled, None)

    def page(self, key: bytes) -> Item | None:
        """A page's arrays; None if it is lost."""
        return self._store.get(_page(key))

    def tail(self, match: PrefixMatch) -> Item | None:
        """The arrays of a match's tail; None if it has none, or it is lost."""
        return None if match.tail is None else self._store.get(match.tail)

    def touch(self, hashes: Sequence[bytes], tail: str | None = None) -> None:
        """Says that a text began with these pages, and went on from this tail: what only longer texts need is evicted
        before them.
        """
        self._store.touch([*([] if tail is None else [tail]), *(_page(key) for key in reversed(hashes))])

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


def _page(key: bytes) -> str:
    return key.hex() + ".page"


def _tail(key: bytes) -> str:
    return key.hex() + ".tail"
