"""Training batches: the documents of a corpus, packed into rows.

Document n of a corpus is always the same, so the state of `PackedRows` is a few numbers: which document comes next, and
which ones stand in rows that are not full yet. Every process of a pod reads the same stream and keeps the rows it
needs.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import grain
import numpy as np

from v4_jax.train.batch import Batch
from v4_jax.train.corpus import Corpus, Tokens, same_corpus
from v4_jax.train.documents import DataError


class _Piece(NamedTuple):
    """Tokens [n] of a document of the stream, from the position `begin` of it on, in one of its texts."""

    document: int
    begin: int
    tokens: np.ndarray
    trained: np.ndarray | None
    where: str

    @classmethod
    def of(cls, document: int, tokens: Tokens, begin: int) -> _Piece:
        """The rest of the text that a place belongs to; of no tokens beyond the document's end."""
        end = next((end for end in tokens.ends if end > begin), begin)
        trained = None if tokens.trained is None else tokens.trained[begin:end]
        return cls(document, begin, tokens.ids[begin:end], trained, tokens.where)

    def cut(self, length: int) -> tuple[_Piece, _Piece]:
        """The piece's first tokens and the others; of a text that is trained as a whole."""
        return self._replace(tokens=self.tokens[:length]), self._replace(
            begin=self.begin + length, tokens=self.tokens[length:]
        )

    @property
    def digest(self) -> int:
        """Of the tokens, and of which ones are trained."""
        digest = zlib.crc32(self.tokens.tobytes())
        return digest if self.trained is None else zlib.crc32(self.trained.tobytes(), digest)


@dataclasses.dataclass(frozen=True)
class _Position:
    """Between two batches: everything drawn from the stream that was not handed out yet.

    Only the last piece of a text is shorter than a row, and full rows are handed out. So what is held of a text is
    always its end, and two numbers name it: the document, and where the piece begins.

    Attributes:
      following: the document to draw next.
      length: of the open rows.
      rows: the open rows' pieces.
      waiting: pieces of any size that go before the next document.
      skipped: documents so far that could not be used.
    """

    following: int = 0
    length: int = 0
    rows: tuple[tuple[_Piece, ...], ...] = ()
    waiting: tuple[_Piece, ...] = ()
    skipped: int = 0


class PackedRows:
    """Packs a corpus into rows, from its first document on.

    A document goes whole into the first open row with room for it. If there is none, the oldest open row is done and
    a new one begins. What is longer than a row is cut into pieces, each a segment of its own; but a conversation, which
    would be learnt without its beginning, cannot be used. The next batch is made in the background, on the guess that
    it has the shape of the last one.

    Args:
      corpus: the documents.
      open_rows: rows that wait for documents that fit. More of them take less padding, and more memory and time
        until the first batch.
      threads: that read and tokenise.

    Raises:
      DataError: `open_rows` or `threads` is not positive.
    """

    def __init__(self, corpus: Corpus, *, open_rows: int = 16, threads: int = 8) -> None:
        for name, value in (("open_rows", open_rows), ("threads", threads)):
            if value < 1:
                raise DataError(f"{name} is {value}; expected at least 1")
        self._corpus, self._open_rows = corpus, open_rows
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8 * threads)
        self._documents = iter(corpus.documents.to_iter_dataset(options))
        self._background = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._position = _Position()
        self._ahead: tuple[tuple[int, int], Future[tuple[Batch, _Position]]] | None = None

    def next_batch(self, rows: int, length: int) -> Batch:
        """Returns the next rows. Both numbers may change from call to call.

        With another length, what stood in open rows is packed anew: no document is lost and none comes twice.

        Args:
          rows: how many rows.
          length: tokens of each.

        Raises:
          DataError: a number is not positive, a document cannot be used, or all documents are empty. The state stays
            as it was.
        """
        for name, value in (("rows", rows), ("length", length)):
            if value < 1:
                raise DataError(f"{name} is {value}; expected at least 1")
        shape = rows, length
        if self._ahead is None or self._ahead[0] != shape:
            self._guess(shape)
        assert self._ahead is not None
        future, self._ahead = self._ahead[1], None
        batch, self._position = future.result()
        self._guess(shape)
        return batch

    def state(self) -> dict[str, Any]:
        """Returns what `restore` needs to hand out exactly the following batches; JSON, without any tokens."""

        def names(pieces: Sequence[_Piece]) -> list[list[int]]:
            return [[piece.document, piece.begin, piece.digest] for piece in pieces]

        return {
            "corpus": self._corpus.identity,
            "texts": self._corpus.content,
            "skipped": self._position.skipped,
            "following": self._position.following,
            "length": self._position.length,
            "rows": [names(row) for row in self._position.rows],
            "waiting": names(self._position.waiting),
        }

    def edited(self, state: dict[str, Any]) -> bool:
        """Whether files of the corpus have other names, sizes or texts than when `state` was taken, as far as samples
        say.
        """
        return state.get("texts", self._corpus.content) != self._corpus.content

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
          DataError: it was taken with another corpus, or with other texts in the documents that it is amid.
        """
        same_corpus(state, self._corpus.identity, known_by="rows")

        def pieces(names: list[list[int]]) -> tuple[_Piece, ...]:
            return tuple(piece(*name) for name in names)

        def piece(document: int, begin: int, digest: int | None = None) -> _Piece:
            found = _Piece.of(document, self._corpus.documents[document], begin)
            if not len(found.tokens) or digest not in (None, found.digest):
                raise DataError(
                    f"the data state was saved amid document {document}, which has other text or another tokenizer "
                    "now; expected the data as it was, or a new run"
                )
            return found

        self._settle()
        length = state["length"]
        rows, waiting = tuple(map(pieces, state["rows"])), pieces(state["waiting"])
        if any(_used(row) >= length for row in rows):
            raise DataError("the data state was saved with other documents or another tokenizer than this corpus has")
        self._position = _Position(state["following"], length, rows, waiting, state.get("skipped", 0))

    def _settle(self) -> None:
        """Ends background work, whose result is dropped."""
        if self._ahead is not None:
            wait([self._ahead[1]])
            self._ahead = None

    def _guess(self, shape: tuple[int, int]) -> None:
        self._settle()
        self._ahead = shape, self._background.submit(self._pack, self._position, *shape)

    def _pack(self, position: _Position, count: int, length: int) -> tuple[Batch, _Position]:
        """Returns a batch of [count, length] and the position after it."""
        rows, waiting, following = list(map(list, position.rows)), deque(position.waiting), position.following
        if length != position.length:
            held = [piece for row in (*rows, waiting) for piece in row]
            rows, waiting = [], deque(sorted(held, key=lambda piece: piece[:2]))
        room = [length - _used(row) for row in rows]
        done: list[list[_Piece]] = []
        empty, skipped = 0, position.skipped
        while len(done) < count:
            if not waiting:
                if empty > self._corpus.longest_pass:
                    raise DataError("all documents of the corpus are empty or left out; expected one with text")
                document = self._draw(following)
                waiting.extend(_Piece.of(following, document, begin) for begin in (0, *document.ends[:-1]))
                following, skipped, empty = following + 1, skipped + document.bad, empty + 1
            piece = waiting.popleft()
            if len(piece.tokens) > length and piece.trained is not None:
                self._leave_out(piece, length)
                skipped += 1
                continue
            if len(piece.tokens) > length:
                piece, rest = piece.cut(length)
                waiting.appendleft(rest)
            size = len(piece.tokens)
            if not size:
                continue
            empty = 0
            row = next((i for i, free in enumerate(room) if free >= size), None)
            if size == length:
                done.append([piece])
            elif row is None:
                if len(rows) >= self._open_rows:
                    done.append(rows.pop(0))
                    room.pop(0)
                rows.append([piece])
                room.append(length - size)
            else:
                rows[row].append(piece)
                room[row] -= size
                if not room[row]:
                    done.append(rows.pop(row))
                    room.pop(row)
        after = _Position(following, length, tuple(map(tuple, rows)), tuple(waiting), skipped)
        return _batch(done, length, marked=self._corpus.marked), after

    def _leave_out(self, piece: _Piece, length: int) -> None:
        """A conversation that no row has room for."""
        problem = f"{piece.where} has {len(piece.tokens):,} tokens; expected at most a row's {length:,}"
        if self._corpus.on_bad is None:
            raise DataError(problem)
        self._corpus.on_bad(problem)

    def _draw(self, document: int) -> Tokens:
        """A document; those after it are read ahead."""
        if grain.experimental.get_next_index(self._documents) != document:
            grain.experimental.set_next_index(self._documents, document)
        try:
            return next(self._documents)
        except Exception as error:
            # The reader has dropped the document without counting it; nothing else would bring it back.
            grain.experimental.set_next_index(self._documents, document)
            if isinstance(error, DataError):
                raise DataError(str(error)) from None  # the sentence, without grain's notes on its own internals
            raise


def _used(row: Sequence[_Piece]) -> int:
    return sum(len(piece.tokens) for piece in row)


def _batch(rows: Sequence[Sequence[_Piece]], length: int, *, marked: bool) -> Batch:
    tokens, segment_ids = np.zeros((2, len(rows), length), np.int32)
    trained = np.zeros((len(rows), length), bool)
    for row, pieces in enumerate(rows):
        end = 0
        for segment, piece in enumerate(pieces, 1):
            begin, end = end, end + len(piece.tokens)
            tokens[row, begin:end] = piece.tokens
            segment_ids[row, begin:end] = segment
            trained[row, begin:end] = True if piece.trained is None else piece.trained
    return Batch(tokens, segment_ids, trained if marked else None)
