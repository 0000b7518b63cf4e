"""Constrained output: which tokens may come next so that a text stays within a JSON schema, an expression or a choice.

The library llguidance walks the grammar and the vocabulary together, token by token on the host; its masks go to the
devices, where sampling sees no other tokens. What comes out is the model's distribution over the legal tokens of each
position, not over legal texts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from v4_jax.tokenizer import ByteTokenizer, Tokenizer, VocabularyTokenizer

# Between two tokens of a JSON text: nothing, a space, or a new line with its indentation. Unlimited, as the library has
# it, a model may write blanks forever.
WHITESPACE = r" ?|\n[ \t]{0,20}"


class Source(NamedTuple):
    """What a grammar is compiled from.

    Attributes:
      kind: what it was given as, for sentences about it.
      text: in the library's language.
    """

    kind: str
    text: str


class Grammars:
    """Compiles grammars for one vocabulary. Make it once: it reads the whole vocabulary.

    Args:
      tokenizer: whose ids the model writes.

    Attributes:
      vocab_size: the tokenizer's.

    Raises:
      ValueError: llguidance is not installed, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance  # here, because only constrained output needs it
        except ImportError:
            raise ValueError("constrained output needs llguidance; install v4-jax[serve]") from None
        self._library: Any = llguidance
        self.vocab_size = tokenizer.vocab_size
        if isinstance(tokenizer, VocabularyTokenizer):
            source: Any = tokenizer.definition()
        elif isinstance(tokenizer, ByteTokenizer):
            source = _ByteVocabulary(tokenizer)
        else:
            raise ValueError(f"a {type(tokenizer).__name__} does not say which bytes its tokens stand for")
        self._end = tokenizer.eos_id
        self._tokenizer = llguidance.LLTokenizer(source, n_vocab=self.vocab_size, eos_token=self._end)

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Grammar:
        """JSON texts that a schema allows, their properties in its order.

        Raises:
          ValueError: it is no schema, allows nothing, or uses keywords that the library does not know.
        """
        if schema is False:
            raise ValueError("the JSON schema cannot be used: it is false, which allows nothing")
        # True allows everything, as {} does, which the library can put options on.
        text, options = json.dumps({} if schema is True else schema), {"whitespace_pattern": WHITESPACE}
        try:
            grammar = self._library.LLMatcher.grammar_from_json_schema(text, overrides=options)
        except ValueError as error:
            raise ValueError(f"the JSON schema cannot be used: {_reason(str(error))}") from None
        return self.compile(Source("JSON schema", grammar))

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Grammar:
        """Texts that match a regular expression from beginning to end, in the syntax of Rust's regex.

        Raises:
          ValueError: it is not one.
        """
        return self.compile(Source("regular expression", self._library.LLMatcher.grammar_from_regex(pattern)))

    def choice(self, texts: Sequence[str]) -> Grammar:
        """One of some texts.

        Raises:
          ValueError: there are none, or one is empty.
        """
        if not texts or "" in texts:
            raise ValueError(f"the choice is between {list(texts)}; expected at least one text, none of them empty")
        return self.compile(Source("choice", self._library.grammar_from("choice", json.dumps(list(texts)))))

    def compile(self, source: Source) -> Grammar:
        """Compiles a grammar.

        Raises:
          ValueError: the library cannot read it.
        """
        matcher = self._library.LLMatcher(self._tokenizer, source.text, log_level=0)
        if matcher.is_error():
            raise ValueError(f"the {source.kind} cannot be used: {_reason(matcher.get_error())}")
        return Grammar(source, matcher, self.vocab_size, self._end)


def _reason(error: str) -> str:
    """One sentence of the library's error, which may be a drawing of several lines with the reason below."""
    lines = error.splitlines() or ["no reason is given"]
    found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join([lines[0], *found[:1]])


class Grammar:
    """A compiled grammar, from which any number of samples start.

    Attributes:
      source: what it was compiled from.
      vocab_size: the vocabulary that it was compiled for.
    """

    def __init__(self, source: Source, matcher: Any, vocab_size: int, end: int) -> None:
        self.source, self.vocab_size = source, vocab_size
        self._matcher, self._end = matcher, end

    def start(self, stops: Collection[int]) -> Matcher:
        """A sample's way through the grammar, which the tokens `stops` may end."""
        masks = (token_mask(tokens, self.vocab_size) for tokens in (stops, [self._end]))
        return Matcher(self._matcher.deep_copy(), *masks)


class Matcher:
    """Where one sample is in its grammar.

    Args:
      matcher: the library's.
      stops: tokens that may end the text, as a mask.
      end: the token that stands for the end in the library's masks, as a mask.
    """

    def __init__(self, matcher: Any, stops: np.ndarray, end: np.ndarray) -> None:
        self._matcher, self._stops, self._end = matcher, stops, end

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing can be added to it."""
        return self._matcher.is_stopped()

    def mask(self) -> np.ndarray:
        """The legal tokens, [ceil(V / 32)] uint32, the lowest bit first.

        Tokens that end the text are among them where it may end, and where nothing else is left to say.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)  # one too many for a multiple of 32 tokens
        legal = words[: len(self._end)] & ~self._end
        return legal | self._stops if self._matcher.is_accepting() or not legal.any() else legal

    def accept(self, token: int) -> None:
        """Goes on by a legal token that does not end the text."""
        self._matcher.consume_token(token)


class _ByteVocabulary:
    """A `ByteTokenizer` in the form that the library reads vocabularies in."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        unused = tokenizer.vocab_size - len(tokenizer.tokens)
        self.tokens = [*tokenizer.tokens, *[b""] * unused]
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = tokenizer.special_ids

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(errors="replace"))


def token_mask(tokens: Collection[int], vocab_size: int) -> np.ndarray:
    """A mask [ceil(V / 32)] uint32 of some tokens, lowest bit first; those outside of the vocabulary are left out."""
    flags = np.zeros(-(-vocab_size // 32) * 32, bool)
    flags[[token for token in tokens if 0 <= token < vocab_size]] = True
    return np.packbits(flags, bitorder="little").view(np.uint32)
