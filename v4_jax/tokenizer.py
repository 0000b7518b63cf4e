"""Text to token ids and back, for released checkpoints and for tiny ones.

A released directory has a `tokenizer.json`, read with the `tokenizers` library. A tiny checkpoint has none: its ids
stand for bytes, so that any text can be put through any model. Either way special tokens are recognised in the text
(the chat encoding writes them, BOS included) and nothing is added to it.
"""

import itertools
import operator
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from v4_jax.chat import protocol
from v4_jax.json_files import read_file

_REPLACEMENT = "\ufffd"  # stands for bytes that are not UTF-8, and for ids that no token has

# UTF-8 never uses the other 13 byte values, so these are enough for every text.
_UTF8_BYTES = tuple(byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5)

# Beyond this many ids a vocabulary was trained for, and bytes would only look like a working tokenizer.
_LARGEST_BYTE_VOCAB = 4096


# Byte-level vocabularies spell each byte as a letter: itself where it is a visible character of Latin-1, else one of
# those from U+0100 on, in order.
_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_INVISIBLE = tuple(byte for byte in range(256) if byte not in _VISIBLE)
_BYTE_OF_LETTER = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + n): byte for n, byte in enumerate(_INVISIBLE)}


class Tokenizer(Protocol):
    """What generation and scoring need to know of a tokenizer.

    Attributes:
        vocab_size: The model's vocabulary; ids are in [0, vocab_size).
        bos_id: Id of the token that begins a text.
        eos_id: Id of the token that ends a turn.
    """

    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`. Special tokens in it are recognised, none is added.

        Raises:
            ValueError: The text has no UTF-8 form (it holds a lone surrogate).
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, special tokens included; U+FFFD for what is not UTF-8 and for unused ids.

        Raises:
            ValueError: An id is outside of [0, vocab_size).
        """

    def token_bytes(self, token_id: int) -> bytes | None:
        """Returns the bytes that an id stands for, perhaps a part of a character; None for an unused id.

        Raises:
            ValueError: The id is outside of [0, vocab_size).
        """

    def stream(self) -> "TokenStream":
        """Returns a decoder that takes one id at a time."""


def load_tokenizer(directory: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of a checkpoint directory.

    Args:
        directory: A released or converted checkpoint. With a `tokenizer.json`, that is used; without, `ByteTokenizer`.
        vocab_size: The model's vocabulary size, from its config.

    Raises:
        ValueError: The directory does not exist, its tokenizer cannot be read or does not fit the vocabulary, or it
            has none and the vocabulary is too small or too large for bytes.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"no directory {str(directory)!r}; expected a checkpoint directory")
    path = directory / "tokenizer.json"
    if path.exists():
        return VocabularyTokenizer(path, vocab_size)
    if vocab_size > _LARGEST_BYTE_VOCAB:
        raise ValueError(
            f"{str(directory)!r} has no tokenizer.json, which a vocabulary of {vocab_size} ids needs; copy it from the "
            f"released checkpoint (only tiny models, up to {_LARGEST_BYTE_VOCAB} ids, take bytes as tokens)"
        )
    return ByteTokenizer(vocab_size)


class TokenStream:
    """Decodes a growing sequence; the pieces joined are what `decode` returns for all ids at once.

    A piece never ends inside a UTF-8 character: its first bytes wait for the rest. The cost of a token does not
    depend on how many came before it.
    """

    # UTF-8 is self-synchronising: a character has up to 4 bytes and a token at least one, so 8 ids back nothing can
    # change how the next id is read. Both texts below start at the same id, and their difference is what is new.
    _WINDOW = 8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def push(self, token_id: int) -> str:
        """Returns the text that `token_id` completes, often "".

        Raises:
            ValueError: The id is outside of [0, vocab_size).
        """
        ids = [*self._ids, token_id]
        before, after = self._certain(self._ids), self._certain(ids)
        self._ids = ids[-self._WINDOW :]
        return after[len(before) :]

    def flush(self) -> str:
        """Returns what still waits, which is U+FFFD for half a character, and starts anew."""
        ids, self._ids = self._ids, []
        return self._tokenizer.decode(ids)[len(self._certain(ids)) :]

    def _certain(self, ids: list[int]) -> str:
        # Half a character at the end is decoded as exactly one U+FFFD.
        return self._tokenizer.decode(ids).removesuffix(_REPLACEMENT)


class ByteTokenizer:
    """Bytes as tokens, for tiny models without a `tokenizer.json`.

    Ids 0, 1, 2 are BOS, EOS and padding, as in the release. Ids 3 to 245 are the 243 byte values that occur in UTF-8,
    in order, so that every text fits a vocabulary as small as 246 and comes back unchanged. From 246 on, while the
    vocabulary lasts, come the protocol's other special tokens, in the order of `protocol.SPECIAL_TOKENS`; those that
    do not fit are spelled in bytes. All of them fit from 258 ids on; the ids after them are unused.

    Args:
        vocab_size: The model's vocabulary size, at least 246.

    Attributes:
        tokens: The bytes that the ids stand for, without those of unused ids.
        special_ids: The ids of special tokens.

    Raises:
        ValueError: The vocabulary is smaller.
    """

    def __init__(self, vocab_size: int) -> None:
        first, later = protocol.SPECIAL_TOKENS[:3], protocol.SPECIAL_TOKENS[3:]
        tokens = [token.encode() for token in first] + [bytes([byte]) for byte in _UTF8_BYTES]
        if vocab_size < len(tokens):
            raise ValueError(
                f"a vocabulary of {vocab_size} ids is too small for bytes as tokens; expected {len(tokens)} or more"
            )
        specials = (*first, *later[: vocab_size - len(tokens)])
        tokens += [token.encode() for token in specials[len(first) :]]
        self.vocab_size = vocab_size
        self.bos_id, self.eos_id = 0, 1
        self.tokens = tuple(tokens)
        self.special_ids = (*range(len(first)), *range(len(first) + len(_UTF8_BYTES), len(tokens)))
        self._ids = {token: i for i, token in enumerate(tokens)}
        self._split = re.compile("(" + "|".join(map(re.escape, specials)) + ")")

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        ids = []
        for i, piece in enumerate(self._split.split(text)):
            data = _utf8(piece)
            ids += [self._ids[data]] if i % 2 else [self._ids[bytes([byte])] for byte in data]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        unused = _REPLACEMENT.encode()
        checked = _check_ids(ids, self.vocab_size)
        data = b"".join(self.tokens[i] if i < len(self.tokens) else unused for i in checked)
        return data.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes | None:
        """See `Tokenizer.token_bytes`."""
        [checked] = _check_ids([token_id], self.vocab_size)
        return self.tokens[checked] if checked < len(self.tokens) else None

    def stream(self) -> TokenStream:
        """See `Tokenizer.stream`."""
        return TokenStream(self)


class VocabularyTokenizer:
    """The tokenizer of a `tokenizer.json`.

    Args:
        path: The file.
        vocab_size: The model's vocabulary size. It may be larger than the tokenizer's (padding), not smaller.

    Raises:
        ValueError: The file cannot be read, has no BOS or EOS token, or has an id outside of the vocabulary.
    """

    def __init__(self, path: str | os.PathLike[str], vocab_size: int) -> None:
        import tokenizers  # here, because tiny models do without

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(read_file(Path(path), ValueError))
        except Exception as error:
            raise ValueError(f"{os.fspath(path)!r} is not a tokenizer that can be read: {error}") from None
        # Files keep how their texts were cut or filled up last, which would silently change a prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        for token in (protocol.BOS, protocol.EOS):
            if token not in vocabulary:
                raise ValueError(f"{os.fspath(path)!r} has no token {token!r}; expected the release's tokenizer")
        largest = max(vocabulary.values())
        if largest >= vocab_size:
            raise ValueError(
                f"{os.fspath(path)!r} has token id {largest}, but the model's vocabulary has {vocab_size} ids; "
                "expected the tokenizer of this model"
            )
        self.vocab_size = vocab_size
        self.bos_id: int = vocabulary[protocol.BOS]
        self.eos_id: int = vocabulary[protocol.EOS]
        self._used = frozenset(vocabulary.values())

    def definition(self) -> str:
        """Returns what its `tokenizer.json` says."""
        return self._tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        _utf8(text)  # the library's own complaint would be a TypeError that does not say what is wrong
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        pieces = []
        # The library leaves out ids it does not know; a reader should see that something was there.
        for used, run in itertools.groupby(_check_ids(ids, self.vocab_size), self._used.__contains__):
            ids = list(run)
            pieces.append(self._tokenizer.decode(ids, skip_special_tokens=False) if used else _REPLACEMENT * len(ids))
        return "".join(pieces)

    def token_bytes(self, token_id: int) -> bytes | None:
        """See `Tokenizer.token_bytes`."""
        text = self.decode([token_id])
        if token_id not in self._used or _REPLACEMENT not in text:
            return text.encode() if token_id in self._used else None
        spelled = self._tokenizer.id_to_token(token_id)  # a part of a character: a letter for each byte
        if all(letter in _BYTE_OF_LETTER for letter in spelled):
            return bytes(_BYTE_OF_LETTER[letter] for letter in spelled)
        return text.encode()

    def stream(self) -> TokenStream:
        """See `Tokenizer.stream`."""
        return TokenStream(self)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate {text[error.start]!r} at character {error.start}; expected valid Unicode"
        ) from None


def _check_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    checked = [operator.index(i) for i in ids]  # numpy and jax integers become Python's
    for i in checked:
        if not 0 <= i < vocab_size:
            raise ValueError(f"token id {i} is outside of the vocabulary; legal ids are 0 to {vocab_size - 1}")
    return checked
