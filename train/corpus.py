"""An endless shuffled mixture of documents and conversations, tokenised.

A `Corpus` numbers the documents of the endless stream: document n is a function of n, the seed and the files alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from v4_jax.train.documents import MESSAGES, TOKENS, Conversation, DataError, Document, Source, read_documents
from v4_jax.train.objectives.sft import Conversations


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """A document of the stream, tokenised.

    Attributes:
      ids: [n] int32, n = 0 for an empty one.
      trained: [n] bool which of them the model is to predict; None for all, as of a text.
      ends: where each of its texts ends, in order: a conversation may be several, of which none sees another.
      where: file and place, for messages.
      bad: whether it is empty because it could not be used.
    """

    ids: np.ndarray
    trained: np.ndarray | None = None
    ends: tuple[int, ...] = ()
    where: str = ""
    bad: bool = False


class Corpus:
    """An endless stream of tokenised documents, with random access.

    Sources are mixed by document, to 1% of the smallest weight. Each is repeated for ever, in another order each time.

    Args:
      sources: the parts of the mixture.
      encode: text to token ids, called by several threads; None is enough where all sources hold token ids.
      vocab_size: legal ids are below it.
      bos_id: put before each text; None for nothing. Documents stored as token ids are used as they are.
      eos_id: put after each text, in the same way.
      seed: of the order; any integer from 0 on.
      shuffle: False takes each source's documents in the order of its files.
      on_bad: told of each document that cannot be used, which is then left out; without it that is raised.
      conversations: how those become texts.

    Raises:
      DataError: a source cannot be opened, or an argument is not legal.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Callable[[str], list[int]] | None,
        *,
        vocab_size: int,
        bos_id: int | None,
        eos_id: int | None,
        seed: int,
        shuffle: bool = True,
        on_bad: Callable[[str], None] | None = None,
        conversations: Conversations = Conversations(),  # noqa: B008 (frozen)
    ) -> None:
        if not sources:
            raise DataError("there are no sources; expected at least one")
        if seed < 0:
            raise DataError(f"seed is {seed}; expected 0 or more")
        for name, token in (("bos_id", bos_id), ("eos_id", eos_id)):
            if token is not None and not 0 <= token < vocab_size:
                raise DataError(f"{name} is {token}; legal ids are 0 to {vocab_size - 1}")
        for source in sources:
            if encode is None and source.field != TOKENS:
                raise DataError(f"{source.path!r} holds text; expected a tokenizer, or the field {TOKENS!r}")
        tokenise = functools.partial(
            _tokenise,
            encode=encode,
            vocab_size=vocab_size,
            before=[] if bos_id is None else [bos_id],
            after=[] if eos_id is None else [eos_id],
            on_bad=on_bad,
            conversations=conversations,
        )
        self.on_bad = on_bad
        #: Whether batches say which tokens are trained.
        self.marked = any(source.field == MESSAGES for source in sources)
        mixture = mix(sources, seed=seed, shuffle=shuffle, skip=on_bad is not None)
        self.identity, self.content, self.longest_pass = mixture.identity, mixture.content, mixture.longest_pass
        self.documents: grain.MapDataset[Tokens] = mixture.documents.map(tokenise)


class Mixture(NamedTuple):
    """An endless stream of documents of several sources.

    Attributes:
      documents: with random access.
      identity: what must be the same for a place in the stream to make sense; JSON.
      content: what may change under such a place, and should be said.
      longest_pass: among this many documents in a row there is each one of each source.
    """

    documents: grain.MapDataset[Document]
    identity: dict[str, Any]
    content: list[int]
    longest_pass: int


def mix(sources: Sequence[Source], *, seed: int, shuffle: bool, skip: bool) -> Mixture:
    """Mixes sources by document; see `Corpus`.

    Args:
      sources: at least one.
      seed: of the order.
      shuffle: False takes each source's documents in the order of its files.
      skip: whether a document that cannot be read comes with its problem; otherwise that is raised.

    Raises:
      DataError: a source cannot be opened.
    """
    found = [read_documents(source, skip=skip) for source in sources]
    parts = [part.dataset for part in found]
    weights = [source.weight for source in sources]
    identity = {
        "documents": [len(part) for part in parts],
        "weights": weights,
        "seed": seed,
        "shuffle": shuffle,
        "layout": [part.layout for part in found],
    }
    # The mixture's rounding is covered.
    longest_pass = max(
        2 * int(len(part) * sum(weights) / weight) + 2 for part, weight in zip(parts, weights, strict=True)
    )
    if shuffle:
        # A seed for each source, so that a file that stands in two of them is not read in step.
        seeds = np.random.SeedSequence(seed).generate_state(len(parts))
        parts = [part.shuffle(seed=int(s)) for part, s in zip(parts, seeds, strict=True)]
    numbered = [part.map(functools.partial(_of_source, number)) for number, part in enumerate(parts)]
    mixed = grain.MapDataset.mix([part.repeat() for part in numbered], weights)
    return Mixture(mixed, identity, [part.content for part in found], longest_pass)


def _of_source(number: int, document: Document) -> Document:
    return document._replace(source=number)


def same_corpus(state: dict[str, Any], identity: dict[str, Any], *, known_by: str) -> None:
    """Checks that a place in the data was saved with the data there is.

    Args:
      state: the place.
      identity: of the data.
      known_by: a key that a place in rows, or prompts, of this kind has, and no other.

    Raises:
      DataError: it was not.
    """
    if known_by not in state:
        raise DataError(
            "the data state was saved with another objective, to which the data is something else; expected the "
            "objective as it was, or a new run"
        )
    found = state["corpus"]
    if different := [key for key in found if found[key] != identity.get(key)]:
        what = ", ".join(f"{key} {found[key]}, which is now {identity.get(key)}" for key in different)
        raise DataError(
            f"the data state was saved with another corpus ({what}): its place in the data would mean other texts; "
            "expected the data as it was, or a new run"
        )


_NOTHING = np.zeros(0, np.int32)


def _tokenise(
    document: Document,
    *,
    encode: Callable[[str], list[int]] | None,
    vocab_size: int,
    before: list[int],
    after: list[int],
    on_bad: Callable[[str], None] | None,
    conversations: Conversations,
) -> Tokens:
    content, where, problem = document.content, document.where, document.problem
    try:
        if problem is not None:
            raise DataError(problem)
        if isinstance(content, Conversation):
            return _of_conversation(content, where, encode, vocab_size, conversations)
        ids = token_ids(content, where, encode, vocab_size, before, after)
        return Tokens(ids, None, (len(ids),), where)
    except DataError as error:
        if on_bad is None:
            raise
        on_bad(str(error))
        return Tokens(_NOTHING, where=where, bad=True)


def _of_conversation(
    conversation: Conversation,
    where: str,
    encode: Callable[[str], list[int]] | None,
    vocab_size: int,
    conversations: Conversations,
) -> Tokens:
    try:
        texts = conversations.texts(conversation.fields)
    except ValueError as error:
        raise DataError(f"{where} cannot be learnt: {error}") from None
    ids, trained, ends = [_NOTHING], [np.zeros(0, bool)], list[int]()
    for spans in texts:
        # Each span by itself: where the model begins to write, what it reads ends with a token, at inference too.
        ids += [token_ids(span.text, where, encode, vocab_size, [], []) for span in spans]
        trained += [np.full(len(part), span.trained) for part, span in zip(ids[-len(spans) :], spans, strict=True)]
        ends.append(sum(map(len, ids)))
    return Tokens(np.concatenate(ids), np.concatenate(trained), tuple(ends), where)


def token_ids(
    content: str | np.ndarray,
    where: str,
    encode: Callable[[str], list[int]] | None,
    vocab_size: int,
    before: list[int],
    after: list[int],
) -> np.ndarray:
    """A text, or token ids, as token ids [n] int32; texts are put between others, unless they are empty.

    Raises:
      DataError: it cannot be tokenised, or an id is not legal.
    """
    if not len(content):
        return _NOTHING
    if isinstance(content, str):
        assert encode is not None  # checked when the corpus was opened
        try:
            ids = encode(content)
        except ValueError as error:
            raise DataError(f"{where} cannot be tokenised: {error}") from None
        content = np.asarray([*before, *ids, *after] if ids else [], np.int64)
    illegal = content[(content < 0) | (content >= vocab_size)]
    if len(illegal):
        raise DataError(f"{where} has token id {illegal[0]}; legal ids are 0 to {vocab_size - 1}")
    return content.astype(np.int32)
