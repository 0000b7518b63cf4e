"""Scoring: log-probabilities of given texts, JSON lines in and out.

Each batch row works through texts of its own, a chunk at a time with a cache, and takes the next waiting text at the
chunk after one ends: short and long texts mix without anyone waiting for the longest. Logits exist for one chunk.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from v4_jax.cache.cache import Cache, CacheDtype
from v4_jax.config import Config
from v4_jax.files import complete
from v4_jax.infer.checks import check_ids, check_precision
from v4_jax.infer.chunks import Progress, chunk_size
from v4_jax.infer.prompts import plain_ids
from v4_jax.layers.head import log_probability
from v4_jax.placement import Place
from v4_jax.policy import Policy
from v4_jax.tokenizer import Tokenizer
from v4_jax.transformer import Transformer

LEGAL_LINE = 'expected an object with either "text" (a string) or "tokens" (a list of token ids)'


class ScoreError(ValueError):
    """An input line that cannot be scored; the sentence says which and why."""


class TextToScore(NamedTuple):
    """One text to score.

    Attributes:
      line: where it stands in the input, from 1.
      tokens: its token ids.
      id: the line's own "id", handed back with the result; None without one.
    """

    line: int
    tokens: list[int]
    id: Any = None


class RowChunk(NamedTuple):
    """What a batch row reads in one chunk.

    Attributes:
      text: the text's index.
      begin: its first token that is read.
      size: how many are, from there on.
    """

    text: int
    begin: int
    size: int


class Score(NamedTuple):
    """A scored text.

    Attributes:
      text: what was scored.
      logprobs: [n - 1] float32 log-probability of each token but the first, given all before it.
    """

    text: TextToScore
    logprobs: np.ndarray

    @property
    def error(self) -> str | None:
        """What is wrong with it; None if nothing is."""
        if np.isfinite(self.logprobs).all():
            return None
        return (
            f"line {self.text.line} has log-probabilities that are not finite numbers: the weights are damaged, or the "
            "precision does not fit them"
        )

    def as_json(self) -> dict[str, Any]:
        """The output line. The first token's log-probability is null: nothing comes before it."""
        values = self.logprobs.tolist()
        result: dict[str, Any] = {} if self.text.id is None else {"id": self.text.id}
        if self.error:
            return result | {"tokens": self.text.tokens, "error": self.error}
        return result | {
            "tokens": self.text.tokens,
            "logprobs": [None, *values],
            "total": math.fsum(values),
            "count": len(values),
        }


def read_texts(
    lines: Iterable[str], config: Config, tokenizer: Callable[[], Tokenizer], *, bos: bool = True
) -> list[TextToScore]:
    """Reads and checks a whole input, so that a bad line shows before hours of work, not after.

    Args:
      lines: JSON lines; empty ones are skipped.
      config: the architecture, for its vocabulary and its longest context.
      tokenizer: called once if a line has "text".
      bos: put the begin-of-sentence token in front of texts that do not begin with it, which also makes their first
        token one that is scored. "tokens" are taken as they are.

    Raises:
      ScoreError: a line that cannot be scored.
    """
    texts = []
    loaded: Tokenizer | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            if not isinstance(content, dict) or ("text" in content) == ("tokens" in content):
                raise ValueError(LEGAL_LINE)
            if "text" in content:
                if not isinstance(content["text"], str):
                    raise ValueError(LEGAL_LINE)
                loaded = loaded or tokenizer()
                tokens = plain_ids(loaded, content["text"]) if bos else loaded.encode(content["text"])
            else:
                tokens = content["tokens"]
                if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
                    raise ValueError(LEGAL_LINE)
            check_ids(tokens, config)
            if len(tokens) > config.max_position_embeddings:
                raise ValueError(f"{len(tokens)} tokens exceed the model's {config.max_position_embeddings} positions")
        except json.JSONDecodeError as error:
            raise ScoreError(f"line {number} is not JSON ({error.msg} at column {error.colno}): {LEGAL_LINE}") from None
        except (ValueError, RecursionError) as error:
            raise ScoreError(f"line {number} cannot be scored: {error}") from None
        texts.append(TextToScore(number, tokens, content.get("id")))
    if not texts:
        raise ScoreError(f"there are no lines to score: {LEGAL_LINE}")
    return texts


class Scorer:
    """Scores texts with one model; one program, compiled once.

    Args:
      config: the architecture.
      longest: tokens of the longest text.
      policy: precision, a `Policy` or its name.
      cache_dtype: number format of the cache; see `v4_jax.init_cache`.
      batch: texts at once.
      chunk: tokens of each that are read at once; logits take batch * chunk * vocabulary * 4 bytes. On a mesh that
        splits the sequence it is rounded up to what splits evenly.
      place: the mesh that the parameters lie on, with its rules.

    Raises:
      ShardingError: the batch does not split evenly over the mesh.
      ValueError: sizes out of range, an unknown policy, or a cache format that the policy or the model does not allow.
    """

    def __init__(
        self,
        config: Config,
        *,
        longest: int,
        policy: str | Policy = "bfloat16",
        cache_dtype: CacheDtype = "bfloat16",
        batch: int = 4,
        chunk: int = 256,
        place: Place = Place(),  # noqa: B008 (frozen)
    ) -> None:
        for name, value in (("longest", longest), ("batch", batch), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        check_precision(config, policy, cache_dtype)
        place.check(batch)
        self._place = place
        self._model = Transformer(config, policy=policy, mesh=place.mesh, rules=place.rules)
        self._batch, self._chunk = batch, place.chunk(chunk_size(longest, chunk))
        # Compiled, because a donated cache must not hold one buffer twice, as one made eagerly may.
        self._new_cache = jax.jit(lambda: place.cache(config, batch, longest, cache_dtype))
        self._cache = place.cache_shapes(config, batch, longest, cache_dtype)
        self._program: Any = None

    def compile(self, params: Any) -> None:
        """Compiles the program, unless that was done before; `score` would do so by itself."""
        if self._program is None:
            block = self._place.shape((self._batch, self._chunk), jnp.int32)
            counts, fresh = (self._place.shape((self._batch,), dtype) for dtype in (jnp.int32, bool))
            program = jax.jit(self._step, donate_argnums=1)
            program.lower(params, self._cache, block, block, counts, fresh).compile()
            self._program = program  # which now runs what was compiled

    def _step(
        self, params: Any, cache: Cache, tokens: Array, targets: Array, counts: Array, fresh: Array
    ) -> tuple[Cache, Array]:
        """Log-probabilities [B, C] of `targets`, each after the token [B, C] at its place; donates the cache.

        `fresh` rows begin a text: at length 0 nothing of what a cache row holds is visible.
        """
        cache = cache.replace(lengths=jnp.where(fresh, 0, cache.lengths))
        output: Any = self._model.apply({"params": params}, tokens, lengths=counts, cache=cache)
        with jax.named_scope("score.log_probability"):
            return output.cache, self._place.keep(log_probability(output.logits, targets))

    def score(self, params: Any, texts: Sequence[TextToScore], progress: Progress | None = None) -> Iterator[Score]:
        """Yields the texts' scores in their order, each as soon as it and all before it are done.

        Args:
          params: the model's parameters.
          texts: none longer than `longest`.
          progress: called with (tokens read, tokens in all) after each chunk.
        """
        self.compile(params)
        logprobs = [np.zeros(len(text.tokens) - 1, np.float32) for text in texts]
        missing = [len(values) for values in logprobs]
        total, done, following = sum(missing), 0, 0
        cache = self._new_cache()
        in_flight: tuple[list[RowChunk | None], Array] | None = None
        # One more turn than there are chunks: each turn reads the results of the chunk before while its own runs.
        for chunks in itertools.chain(schedule(missing.copy(), self._batch, self._chunk), [None]):
            started = None
            if chunks is not None:
                cache, scored = self._program(params, cache, *self._inputs(texts, chunks))
                started = chunks, scored
            if in_flight is not None:
                read, results = in_flight
                for chunk, values in zip(read, np.asarray(results), strict=True):
                    if chunk is not None:
                        logprobs[chunk.text][chunk.begin : chunk.begin + chunk.size] = values[: chunk.size]
                        missing[chunk.text] -= chunk.size
                        done += chunk.size
                if progress is not None:
                    progress(done, total)
            in_flight = started
            while following < len(texts) and not missing[following]:
                yield Score(texts[following], logprobs[following])
                following += 1

    def _inputs(self, texts: Sequence[TextToScore], chunks: Sequence[RowChunk | None]) -> tuple[Array, ...]:
        """The arrays that `_step` takes for one chunk of every row."""
        tokens, targets = np.zeros((2, self._batch, self._chunk), np.int32)
        counts = np.zeros(self._batch, np.int32)
        fresh = np.zeros(self._batch, bool)
        for row, chunk in enumerate(chunks):
            if chunk is None:
                continue
            text, begin, end = texts[chunk.text].tokens, chunk.begin, chunk.begin + chunk.size
            tokens[row, : chunk.size] = text[begin:end]
            targets[row, : chunk.size] = text[begin + 1 : end + 1]
            counts[row], fresh[row] = chunk.size, begin == 0
        return self._place.put((tokens, targets, counts, fresh))


def schedule(lengths: Sequence[int], batch: int, chunk: int) -> Iterator[list[RowChunk | None]]:
    """Deals texts out to batch rows: yields, chunk by chunk, what each row reads (None: nothing).

    A row reads one text to its end and then takes the next one waiting. Texts of length 0 are read by nobody.
    """
    waiting = (RowChunk(text, 0, length) for text, length in enumerate(lengths) if length)
    unread = [next(waiting, None) for _ in range(batch)]  # what is left of each row's text
    while any(unread):
        yield [rest and rest._replace(size=min(rest.size, chunk)) for rest in unread]
        for row, rest in enumerate(unread):
            if rest is None:
                continue
            left = rest.size - chunk
            unread[row] = RowChunk(rest.text, rest.begin + chunk, left) if left > 0 else next(waiting, None)


def write_lines(lines: Iterable[str], path: Path) -> None:
    """Writes a file that appears under its name only when it is complete.

    Raises:
      OSError: the directory cannot be written.
    """
    with complete(path) as working, working.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
