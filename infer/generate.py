"""Generation: prompts in, tokens out, one program per shape.

A prompt is read in chunks of one static size, the last one padded, so that a million tokens and five take the same
program. After that a single-token step runs with the cache donated to it and the sampling inside it: what travels per
step is one token id and one log-probability per row. The next step is dispatched before the last one's tokens are read,
which keeps the device busy while the host looks at them. A step that turns out to follow the end of a text is dropped.

Programs are compiled ahead of time, by shape: a call that would need another one is an explicit compilation, never a
silent one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from infer.sampling import GREEDY, Sampling, SamplingRows, sample
from v4_jax.cache import Cache, CacheDtype
from v4_jax.config import Config
from v4_jax.number_formats import INDEX_BLOCK, KV_BLOCK
from v4_jax.placement import Place
from v4_jax.policy import Policy
from v4_jax.transformer import Transformer

# XLA:CPU's usual scheduler cuts a layer's weights out of their stack long before it needs them, and a single token
# waits for them. Measured at 4,096 tokens of context: 1.1 to 1.2 times the tokens per second.
CPU_STEP = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

SMALLEST_CHUNK = 16  # shorter prompts are padded to this: fewer programs for no measurable time

Finish = Literal["stop", "length"]
Progress = Callable[[int, int], None]


class Token(NamedTuple):
    """One generated token.

    Attributes:
      row: which prompt it continues.
      id: the token.
      logprob: its log-probability under the model, before temperature and filters.
      finish: why the row ends with this token: "stop" if it is a stop id, "length" if it is the last one allowed, None
        if the row goes on.
    """

    row: int
    id: int
    logprob: float
    finish: Finish | None


class Newest(NamedTuple):
    """The last token sampled in each row: ids [B, 1] int32 and logprobs [B, 1] float32."""

    ids: Array
    logprobs: Array


def nothing_sampled(batch: int) -> Newest:
    """Zeros, before the first token."""
    return Newest(jnp.zeros((batch, 1), jnp.int32), jnp.zeros((batch, 1), jnp.float32))


class Generator:
    """Generates from one model with one cache size.

    Args:
      config: the architecture.
      params: its parameters, as `v4_jax.load` or `v4_jax.init` return them.
      max_length: tokens (prompt and continuation) that a row may reach.
      policy: precision, a `Policy` or its name.
      cache_dtype: number format of the cache; see `v4_jax.init_cache`.
      prefill_chunk: most prompt tokens of a row that are read at once; on a mesh that splits the sequence it is rounded
        up to what splits evenly.
      place: the mesh that `params` lie on, with its rules.

    Attributes:
      max_length: as given.
      compile_seconds: time spent compiling so far.

    Raises:
      ValueError: sizes out of range, an unknown policy, or a cache format that the policy or the model does not allow.
    """

    def __init__(
        self,
        config: Config,
        params: Any,
        *,
        max_length: int,
        policy: str | Policy = "bfloat16",
        cache_dtype: CacheDtype = "bfloat16",
        prefill_chunk: int = 512,
        place: Place = Place(),  # noqa: B008 (frozen)
    ) -> None:
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk is {prefill_chunk}, expected at least 1 token")
        check_precision(config, policy, cache_dtype)
        self.config = config
        self.max_length = max_length
        self.compile_seconds = 0.0
        self._params = params
        self._place = place
        self._model = Transformer(config, policy=policy, mesh=place.mesh, rules=place.rules)
        self._cache_dtype = cache_dtype
        self._chunk = prefill_chunk
        self._programs: dict[tuple[int, int], Any] = {}
        # Refuses illegal sizes and formats here rather than at first use.
        jax.eval_shape(lambda: Place().cache(config, 1, max_length, cache_dtype))

    @property
    def programs(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
        stop_ids: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Generation:
        """Starts to continue a batch of prompts. Nothing runs until the result is iterated over.

        Args:
          prompts: token ids of each row, of any lengths.
          max_tokens: most tokens to generate per row.
          sampling: how to sample, for all rows or for each. Rows with equal prompts and seeds get equal texts.
          stop_ids: tokens that end a row; the model's end-of-sentence token when None.
          progress: called with (prompt tokens read, prompt tokens in all) while the prompts are read.

        Raises:
          ShardingError: the rows do not split evenly over the mesh.
          ValueError: a prompt that is empty, too long for `max_length` together with `max_tokens`, or holds an id
            outside of the vocabulary; a bias of such an id; penalties.
        """
        rows = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if not prompts:
            raise ValueError("there are no prompts; expected at least one")
        if len(rows) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts but {len(rows)} samplings; expected one for each")
        for row in rows:
            if row.penalizes:
                raise ValueError("penalties need counts of the tokens before, which only `infer.engine.Engine` keeps")
            check_vocabulary(row.logit_bias, self.config)
        self._place.check(len(prompts))
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}, expected at least 1")
        for prompt in prompts:
            check_ids(prompt, self.config)
            if len(prompt) + max_tokens > self.max_length:
                raise ValueError(
                    f"a prompt of {len(prompt)} tokens and a continuation of {max_tokens} exceed the context of "
                    f"{self.max_length} tokens"
                )
        stops = frozenset([self.config.eos_token_id] if stop_ids is None else stop_ids)
        return Generation(self, prompts, rows, max_tokens, stops, progress)

    def compile(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compiles what these prompts need, unless that was done before; `generate` would do so by itself."""
        for chunk in (0, self._chunk_for(prompts), 1):
            self._program(len(prompts), chunk)

    def _chunk_for(self, prompts: Sequence[Sequence[int]]) -> int:
        return self._place.chunk(chunk_size(max(map(len, prompts)), self._chunk))

    def _step(
        self, params: Any, cache: Cache, newest: Newest, fed: Array, counts: Array, ends: Array, rows: SamplingRows
    ) -> tuple[Cache, Newest]:
        """Feeds each row some tokens and samples the next one of those whose known tokens end here.

        Args:
          params: the model's parameters.
          cache: what came before; donated.
          newest: the last token sampled in each row.
          fed: [B, C] int32 tokens: a chunk of the prompts, or the newest ones.
          counts: [B] int32 how many of them are real; 0 leaves a row as it is.
          ends: [B] bool rows that get a new token.
          rows: sampling parameters.
        """
        output: Any = self._model.apply({"params": params}, fed, lengths=counts, cache=cache, logits="last")
        ids, logprobs = sample(*self._place.keep((output.logits[:, 0], rows, output.cache.lengths)))
        ends = ends[:, None]
        ids, logprobs = jnp.where(ends, ids[:, None], newest.ids), jnp.where(ends, logprobs[:, None], newest.logprobs)
        return output.cache, self._place.keep(Newest(ids, logprobs))

    def _new_cache(self, batch: int) -> Cache:
        return self._place.cache(self.config, batch, self.max_length, self._cache_dtype)

    def _program(self, batch: int, chunk: int) -> Any:
        """`_step` compiled for [batch, chunk] tokens; `chunk` 0: the program that makes an empty cache."""
        key = (batch, chunk)
        if key not in self._programs:
            started = time.perf_counter()
            if chunk:
                place = self._place
                shapes = place.cache_shapes(self.config, batch, self.max_length, self._cache_dtype)
                rows, flags = (place.shape((batch,), dtype) for dtype in (jnp.int32, bool))
                newest = place.shapes(lambda: nothing_sampled(batch))
                samplings = place.shapes(lambda: SamplingRows.of([GREEDY] * batch))
                options = CPU_STEP if chunk == 1 and jax.default_backend() == "cpu" else None
                program = jax.jit(self._step, donate_argnums=1, compiler_options=options)
                tokens = place.shape((batch, chunk), jnp.int32)
                program.lower(self._params, shapes, newest, tokens, rows, flags, samplings).compile()
            else:  # compiled, because a donated cache must not hold one buffer twice, as one made eagerly may
                program = jax.jit(lambda: self._new_cache(batch))
                program.lower().compile()
            self._programs[key] = program  # which now runs what was compiled
            self.compile_seconds += time.perf_counter() - started
        return self._programs[key]


class Generation:
    """A running batch: iterate over it to get its `Token`s, those of one step after another, rows in order.

    Attributes:
      prompt_tokens: prompt tokens, all rows together.
      new_tokens: tokens yielded so far.
      prefill_seconds: time from the start of the iteration to the first token, compilation excluded.
      decode_seconds: time from the first step's tokens to the last ones yielded, without the former's own.
      first_tokens: tokens of the first step, which belong to the prefill's time.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Sampling],
        max_tokens: int,
        stops: frozenset[int],
        progress: Progress | None,
    ) -> None:
        self._generator, self._prompts, self._stops = generator, prompts, stops
        self._rows = generator._place.put(SamplingRows.of(rows))
        self._left = np.full(len(prompts), max_tokens)  # tokens each row may still yield; 0 when it has ended
        self._progress = progress
        self.prompt_tokens = sum(map(len, prompts))
        self.new_tokens = self.first_tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0

    def stop(self, row: int) -> None:
        """Ends a row after the tokens it has already yielded."""
        self._left[row] = 0

    def __iter__(self) -> Iterator[Token]:
        self._generator.compile(self._prompts)
        step = self._generator._program(len(self._prompts), 1)
        started = time.perf_counter()
        cache, newest = self._prefill()
        first: float | None = None
        due = np.ones(len(self._prompts), bool)  # rows in which `newest` is a token that was not read yet
        masked: np.ndarray | None = None
        while due.any():
            # The next step starts before this one's tokens are read: only rows at their limit are known to end here.
            going = due & (self._left > 1)
            ahead = None
            if going.any():
                if masked is None or (masked != going).any():
                    masked, masks = going, self._generator._place.put((going.astype(np.int32), going))
                cache, ahead = step(self._generator._params, cache, newest, newest.ids, *masks, self._rows)
            ids, logprobs = jax.device_get(newest)
            now = time.perf_counter()
            if first is None:
                first, self.prefill_seconds, self.first_tokens = now, now - started, int(due.sum())
            self.decode_seconds = now - first
            for row in np.flatnonzero(due & (self._left > 0)).tolist():
                if self._left[row]:  # still: the reader may have ended it meanwhile
                    yield self._token(row, int(ids[row, 0]), float(logprobs[row, 0]))
            if ahead is None:
                return
            due, newest = going & (self._left > 0), ahead

    def _token(self, row: int, token: int, logprob: float) -> Token:
        self._left[row] -= 1
        self.new_tokens += 1
        finish: Finish | None = None
        if token in self._stops:
            self._left[row], finish = 0, "stop"
        elif not self._left[row]:
            finish = "length"
        return Token(row, token, logprob, finish)

    def _prefill(self) -> tuple[Cache, Newest]:
        """Reads the prompts and samples each row's first token."""
        generator, batch = self._generator, len(self._prompts)
        size = generator._chunk_for(self._prompts)
        step = generator._program(batch, size)
        cache = generator._program(batch, 0)()
        newest = generator._place.put(nothing_sampled(batch))
        lengths = np.asarray([len(prompt) for prompt in self._prompts])
        for begin in range(0, int(lengths.max()), size):
            counts = np.clip(lengths - begin, 0, size)
            ends = (counts > 0) & (begin + counts == lengths)
            chunk = np.zeros((batch, size), np.int32)
            for row, prompt in enumerate(self._prompts):
                chunk[row, : counts[row]] = prompt[begin : begin + size]
            inputs = generator._place.put((chunk, counts.astype(np.int32), ends))
            before = newest
            cache, newest = step(generator._params, cache, newest, *inputs, self._rows)
            # One chunk runs, one is queued: never idle, and an interrupt waits for two chunks, not for all of them.
            jax.block_until_ready(before)
            if self._progress is not None:
                self._progress(int(np.minimum(lengths, begin).sum()), self.prompt_tokens)
        return cache, newest


def check_precision(config: Config, policy: str | Policy, cache_dtype: CacheDtype) -> None:
    """Checks that a policy and a cache format fit the model and each other.

    Raises:
      ValueError: they do not.
    """
    rounds = Policy.of(policy).fake_quant
    if rounds and (config.nope_head_dim % KV_BLOCK or config.index_head_dim % INDEX_BLOCK):
        raise ValueError(
            f"the policy 'released' rounds keys in blocks of {KV_BLOCK} and index keys in blocks of {INDEX_BLOCK}, but "
            f"this model's have {config.nope_head_dim} and {config.index_head_dim} channels; expected 'bfloat16' or "
            "'float32'"
        )
    if cache_dtype == "released" and not rounds:
        raise ValueError("a cache in the released formats needs the policy 'released', which rounds as they do")


def check_ids(ids: Sequence[int], config: Config) -> None:
    """Checks a prompt's token ids.

    Raises:
      ValueError: there are none, or one is outside of the vocabulary.
    """
    if not ids:
        raise ValueError("the prompt is empty; expected at least one token")
    check_vocabulary(ids, config)


def check_vocabulary(ids: Iterable[int], config: Config) -> None:
    """Checks that token ids are in the vocabulary.

    Raises:
      ValueError: one is not.
    """
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"token id {token} is outside of the vocabulary; legal ids are 0 to {config.vocab_size - 1}"
            )


def chunk_size(longest: int, largest: int) -> int:
    """The static chunk for texts of up to `longest` tokens: a power of two, or `largest` where that is smaller.

    Powers of two, so that prompts of all lengths share a handful of programs.
    """
    return min(largest, max(SMALLEST_CHUNK, 1 << (longest - 1).bit_length()))
