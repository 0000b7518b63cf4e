"""Prompts: an endless shuffled mixture of questions, read up to where the model is to answer.

Of a conversation that is all before the assistant's last turn, which is kept as a reference where there is one; a text,
or a list of token ids, is a prompt as it stands.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from v4_jax.chat import MODES, Mode, encode
from v4_jax.train.batch import Batch
from v4_jax.train.corpus import mix, same_corpus, token_ids
from v4_jax.train.documents import Conversation, DataError, Document, Source
from v4_jax.train.objectives.sft import Conversations
from v4_jax.train.on_policy.rollouts import Prompt


class Prompts:
    """A stream of prompts: prompt n is a function of n, the seed and the files alone.

    Args:
      sources: the parts of the mixture.
      teachers: of each source, whose its prompts are; "" where nobody teaches.
      encode: text to token ids.
      vocab_size: legal ids are below it.
      bos_id: put before each text; None for nothing.
      seed: of the order, and of the answers.
      shuffle: whether they come in random order.
      on_bad: told of each that cannot be used, which is then left out; without it that is raised.
      conversations: how those become texts.
      answer: tokens that a row has to have room for after a prompt.

    Raises:
      DataError: a source cannot be opened.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        teachers: Sequence[str],
        encode: Callable[[str], list[int]],
        *,
        vocab_size: int,
        bos_id: int | None,
        seed: int,
        shuffle: bool,
        on_bad: Callable[[str], None] | None,
        conversations: Conversations,
        answer: int,
    ) -> None:
        self._mixture = mix(sources, seed=seed, shuffle=shuffle, skip=on_bad is not None)
        self._teachers, self._encode, self._vocab_size = teachers, encode, vocab_size
        self._before = [] if bos_id is None else [bos_id]
        self._seed, self._on_bad, self._conversations, self._answer = seed, on_bad, conversations, answer
        self._following = self._skipped = 0

    def next(self, count: int, length: int, step: int) -> list[Prompt]:
        """The next prompts, with seeds that come from the step and the prompt's number in the stream.

        Args:
          count: how many.
          length: tokens that prompt and answer have room for.
          step: the step that they are for.

        Raises:
          DataError: one cannot be used, or none can. The state stays as it was.
        """
        found: list[Prompt] = []
        following, skipped, failures = self._following, self._skipped, 0
        while len(found) < count:
            if failures > self._mixture.longest_pass:
                raise DataError("no prompt of the data can be used; expected one that can")
            document = self._mixture.documents[following]
            try:
                prompt = self._read(document, length)
                seed = zlib.crc32(f"{self._seed} {step} {following}".encode())
                found.append(dataclasses.replace(prompt, seed=seed, teacher=self._teachers[document.source]))
            except DataError as error:
                if self._on_bad is None:
                    raise
                self._on_bad(str(error))
                skipped, failures = skipped + 1, failures + 1
            following += 1
        self._following, self._skipped = following, skipped
        return found

    def _read(self, document: Document, length: int) -> Prompt:
        content, where = document.content, document.where
        if document.problem is not None:
            raise DataError(document.problem)
        fields: dict[str, Any] = {}
        reference: str | None = None
        mode: Mode | None = None
        before = self._before
        if isinstance(content, Conversation):
            fields, before = content.fields, []
            content, reference, mode = self._question(fields, where)
        tokens = token_ids(content, where, self._encode, self._vocab_size, before, [])
        if not len(tokens):
            raise DataError(f"{where} is empty; expected a prompt")
        if len(tokens) + self._answer > length:
            raise DataError(
                f"{where} has {len(tokens):,} tokens before an answer of up to {self._answer:,}; expected at most a "
                f"row's {length:,}"
            )
        return Prompt(tuple(tokens.tolist()), 0, fields, reference, mode, where=where)

    def _question(self, fields: dict[str, Any], where: str) -> tuple[str, str | None, Mode]:
        """A conversation's text up to the assistant's last turn, what it says there, and how."""
        try:
            messages = fields["messages"]
            if not isinstance(messages, list) or not messages:
                raise ValueError(f"messages is {messages!r:.40}; expected a list of messages")
            end = len(messages)
            while end and isinstance(messages[end - 1], dict) and messages[end - 1].get("role") == "assistant":
                end -= 1
            answers = messages[end:]
            mode = self._conversations.mode_of(fields, answers)
            thinking_mode, effort = MODES[mode]
            text = encode(
                messages[:end],
                thinking_mode=thinking_mode,
                reasoning_effort=effort,
                effort_profile=self._conversations.profile,
                tools=fields.get("tools"),
                response_format=fields.get("response_format"),
            )
        except ValueError as error:
            raise DataError(f"{where} cannot be asked: {error}") from None
        return text, answers[-1].get("content") if answers else None, mode

    def next_batch(self, rows: int, length: int) -> Batch:
        """The next prompts as rows, of which nothing is trained: to be looked at."""
        tokens, segment_ids = np.zeros((2, rows, length), np.int32)
        for row, prompt in enumerate(self.next(rows, length, 0)):
            tokens[row, : len(prompt.tokens)], segment_ids[row, : len(prompt.tokens)] = prompt.tokens, 1
        return Batch(tokens, segment_ids, np.zeros(tokens.shape, bool))

    def state(self) -> dict[str, Any]:
        """What `restore` needs to hand out exactly the following prompts; JSON."""
        mixture = self._mixture
        return {
            "corpus": mixture.identity,
            "content": mixture.content,
            "following": self._following,
            "skipped": self._skipped,
        }

    def edited(self, state: dict[str, Any]) -> bool:
        """Whether files have other names or sizes than when `state` was taken."""
        return state.get("content") != self._mixture.content

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
          DataError: it was taken with other data.
        """
        same_corpus(state, self._mixture.identity, known_by="content")
        self._following, self._skipped = state["following"], state["skipped"]
