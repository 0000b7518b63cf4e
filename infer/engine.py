"""Continuous batching: many requests over one model, in a fixed number of slots.

Each slot is a row of one cache. A round reads one chunk of a waiting prompt and then takes one token of every row that
is generating, so that long prompts delay the others by a chunk at a time. All of a prompt but its last token is read in
chunks; the last one goes through the same program as generated tokens do, which is the only one that samples. Samples
that share a prompt (`Request.n`) therefore share its reading: the row is copied and each copy goes on with a seed of
its own.

With the model's multi-token-prediction block (`draft`) a step takes the newest token of a row and some guesses of what
follows, and yields as many tokens as were right, and one more; see `infer.speculative`.

What a request gets does not depend on its neighbours: its chunks are cut by its own prompt alone, a token's program is
always the same, and random numbers come from its seed and position. Three programs serve all requests, compiled once.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from infer import speculative
from infer.generate import CPU_STEP, Finish, check_ids, check_precision
from infer.sampling import GREEDY, Sampling, SamplingRows
from infer.speculative import Acceptance, Taken
from sharding.axes import resolve
from v4_jax.cache import Cache, CacheDtype
from v4_jax.config import Config
from v4_jax.placement import Place, bytes_per_device
from v4_jax.policy import Policy
from v4_jax.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
      prompt: token ids, at least one.
      max_tokens: most tokens to generate, per sample.
      sampling: how to sample; sample number i uses the seed plus i.
      stop_ids: tokens that end a sample; the model's end-of-sentence token when None.
      n: samples, which share the reading of the prompt.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)
    stop_ids: Sequence[int] | None = None
    n: int = 1


class Event(NamedTuple):
    """One generated token.

    Attributes:
      request: the number that `Engine.submit` returned.
      sample: which of the request's samples it continues.
      id: the token.
      logprob: its log-probability under the model, before temperature and filters.
      finish: "stop" or "length" with the sample's last token, else None.
    """

    request: int
    sample: int
    id: int
    logprob: float
    finish: Finish | None


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A sample in its slot.

    Attributes:
      request: its request's number.
      sample: which sample it is.
      slot: its row of the cache.
      sampling: with its own seed.
      stops: tokens that end it.
      left: tokens that it may still yield; 0 once it has ended.
      fed: prompt token to feed next; None once it feeds what it generated.
    """

    request: int
    sample: int
    slot: int
    sampling: Sampling
    stops: frozenset[int]
    left: int
    fed: int | None


@dataclasses.dataclass(eq=False)
class _Reading:
    """A prompt that is being read: into the first sample's slot, up to its last token.

    Attributes:
      prompt: its tokens.
      samples: the sequences that go on from it.
      done: tokens read.
    """

    prompt: Sequence[int]
    samples: list[_Sequence]
    done: int = 0


class _Flight(NamedTuple):
    """A step that was started, and whose tokens were not read yet.

    Attributes:
      sequences: who takes part.
      drafted: those of them that were fed drafts.
      taken: what they get.
    """

    sequences: list[_Sequence]
    drafted: list[_Sequence]
    taken: Taken


class Engine:
    """Serves requests with one model, in a cache of fixed size.

    Args:
      config: the architecture.
      params: its parameters, as `v4_jax.load` or `v4_jax.init` return them.
      slots: samples that are generated at the same time; on a mesh with a data axis, a multiple of it.
      max_length: tokens (prompt and continuation) that a sample may reach.
      policy: precision, a `Policy` or its name.
      cache_dtype: number format of the cache; see `v4_jax.init_cache`.
      prefill_chunk: prompt tokens that are read between two steps of generation; on a mesh that splits the sequence it
        is rounded up to what splits evenly.
      draft: tokens that the multi-token-prediction block guesses ahead in every step, up to 4; 0 is plain decoding.
        Requests get the same tokens, but for what rounding does: a step of several tokens adds in another order.
      place: the mesh that `params` lie on, with its rules.

    Attributes:
      slots: as given.
      max_length: as given.
      draft: as given.
      programs: programs compiled so far; constant after `compile`.

    Raises:
      ShardingError: the slots do not split evenly over the mesh.
      ValueError: sizes out of range, an unknown policy, or a cache format that the policy or the model does not allow.
    """

    def __init__(
        self,
        config: Config,
        params: Any,
        *,
        slots: int,
        max_length: int,
        policy: str | Policy = "bfloat16",
        cache_dtype: CacheDtype = "bfloat16",
        prefill_chunk: int = 512,
        draft: int = 0,
        place: Place = Place(),  # noqa: B008 (frozen)
    ) -> None:
        for name, value in (("slots", slots), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        check_precision(config, policy, cache_dtype)
        speculative.check_depth(draft, config)
        place.check(slots)
        self.config, self.slots, self.max_length, self.draft = config, slots, max_length, draft
        self.programs = 0
        self._params, self._place, self._cache_dtype = params, place, cache_dtype
        self._model = Transformer(config, policy=policy, mesh=place.mesh, rules=place.rules)
        self._chunk = place.chunk(prefill_chunk)
        self._readers = _rows_together(place)  # prompts that one call reads
        self._shapes = place.cache_shapes(config, slots, max_length, cache_dtype)
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._reading: list[_Reading] = []
        self._occupied: list[_Sequence | None] = [None] * slots  # by slot: who generates or waits for its prompt
        self._generating: list[_Sequence] = []
        self._flight: _Flight | None = None
        self._events: collections.deque[Event] = collections.deque()  # of a round, not yet yielded by `run`
        self._offered, self._accepted = 0, np.zeros(draft, int)
        self._submitted = 0
        self._inputs: tuple[Any, Any] = (None, None)  # the last step's host inputs, and the same on the devices
        self._cache: Any = None
        self._ahead: Any = None  # [B, 1 + draft] each row's newest token, and guesses of those that follow it

    def slot_bytes(self) -> dict[str, int]:
        """Bytes of cache that one slot takes, all devices together, by role; windows and open blocks do not grow."""
        return {role: size // self.slots for role, size in self._shapes.nbytes().items()}

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self._waiting or self._reading or self._generating or self._flight or self._events)

    @property
    def acceptance(self) -> list[Acceptance]:
        """How many of the drafts so far were right, by depth: the first guess of each step, the second, and so on.

        A step yields 1 token, and 1 more for each that was accepted.
        """
        return [Acceptance(self._offered, accepted) for accepted in self._accepted.tolist()]

    def compile(self) -> None:
        """Compiles the programs and makes the cache, unless that was done before."""
        if self._cache is not None:
            return
        place, slots, readers = self._place, self.slots, self._readers

        def integers(*shape: int) -> jax.ShapeDtypeStruct:
            return place.shape(shape, jnp.int32)

        ahead = integers(slots, 1 + self.draft)
        rows = place.shapes(lambda: SamplingRows.of([GREEDY] * slots))
        options = CPU_STEP if jax.default_backend() == "cpu" else None
        places = None if place.mesh is None else jax.tree.map(lambda x: x.sharding, self._shapes)
        whole = place.replicated
        step = jax.jit(
            self._step, donate_argnums=(1, 2), out_shardings=(places, whole, whole), compiler_options=options
        )
        read = jax.jit(self._read, donate_argnums=1, out_shardings=places)
        copy = jax.jit(self._copy, donate_argnums=0, out_shardings=places)
        empty = jax.jit(lambda: place.cache(self.config, slots, self.max_length, self._cache_dtype))
        self._run_step = step.lower(self._params, self._shapes, ahead, integers(slots), rows).compile()
        arguments = [integers(readers, self._chunk + 1), *[integers(readers)] * 3]
        self._run_read = read.lower(self._params, self._shapes, *arguments).compile()
        self._run_copy = copy.lower(self._shapes, integers(), integers(slots)).compile()
        self.programs += 3
        self._cache, self._ahead = empty(), place.put(np.zeros(ahead.shape, np.int32))

    def submit(self, request: Request) -> int:
        """Puts a request in line. Returns its number.

        Raises:
          ValueError: it can never be served: an empty prompt, an id outside of the vocabulary, too long, or more
            samples than slots.
        """
        check_ids(request.prompt, self.config)
        for name, value in (("max_tokens", request.max_tokens), ("n", request.n)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if request.n > self.slots:
            raise ValueError(f"n is {request.n}, but there are {self.slots} slots; expected at most so many samples")
        if len(request.prompt) + request.max_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and a continuation of {request.max_tokens} exceed the "
                f"{self.max_length} tokens that a slot has room for"
            )
        self._waiting.append((self._submitted, request))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, request: int, sample: int | None = None) -> None:
        """Ends a request, or one of its samples: no further events come of it, and its slots become free.

        One that has ended or was never submitted is left alone.
        """
        if sample is None:
            self._waiting = collections.deque(entry for entry in self._waiting if entry[0] != request)
        self._events = collections.deque(
            event for event in self._events if event.request != request or sample not in (None, event.sample)
        )
        for sequence in [one for one in self._occupied if one is not None and one.request == request]:
            if sample is None or sequence.sample == sample:
                self._end(sequence)

    def run(self) -> Iterator[Event]:
        """Works until nothing is left; requests may be submitted and cancelled between events."""
        while not self.idle:
            self._events.extend(self.round())
            while self._events:
                yield self._events.popleft()

    def round(self) -> list[Event]:
        """Reads one chunk, takes one step, and returns the tokens of the step before: the host reads those meanwhile.

        Tokens of sequences that were cancelled in between are dropped.
        """
        self.compile()
        self._admit()
        self._read_chunk()
        ahead = self._take_step()
        events = [*self._events, *(self._collect() if self._flight else [])]
        self._events.clear()
        self._flight = ahead
        return events

    # ---- programs ----------------------------------------------------------------------------------------------------

    def _step(
        self, params: Any, cache: Cache, ahead: Array, given: Array, rows: SamplingRows
    ) -> tuple[Cache, Array, Taken]:
        """A token further, or several: feeds each row what `ahead` [B, 1 + draft] has for it.

        Or, where `given` [B] is not -1, a prompt's last token alone; -2 leaves a row alone.
        """
        going, drafted = given != _AT_REST, given == _NEWEST
        fed = ahead.at[:, 0].set(jnp.where(given >= 0, given, ahead[:, 0]))
        offered = jnp.where(drafted, self.draft, 0)
        lengths = jnp.where(going, 1 + offered, 0)
        output: Any = self._model.apply({"params": params}, fed, lengths=lengths, cache=cache, logits="all")
        taken = speculative.verify(*self._place.keep((output.logits, fed, offered, rows, cache.lengths)))
        taken = self._place.keep(taken)
        counts = jnp.where(going, taken.counts, 0)
        cache = output.cache.rolled_back(lengths=cache.lengths + counts)
        newest = jnp.take_along_axis(taken.ids, taken.counts[:, None] - 1, axis=1)
        if not self.draft:
            return cache, newest, taken

        def block(*arguments: Any, **options: Any) -> Any:
            return self._model.apply({"params": params}, *arguments, logits="last", method="mtp", **options)

        drafts, cache = speculative.draft(block, output.streams, taken.ids, counts, rows, cache, self._place.keep)
        return cache, jnp.concatenate([newest, drafts], axis=1), taken

    def _read(self, params: Any, cache: Cache, tokens: Array, counts: Array, slots: Array, begin: Array) -> Cache:
        """Reads `counts` [P] of `tokens` [P, C + 1] into `slots` [P], which hold `begin` [P] tokens; slot B is nowhere.

        One more token is known than is read: the multi-token-prediction block reads it with the one before.
        """
        part = jax.tree.map(lambda x: jnp.take(x, slots, axis=_row_axis(x), mode="clip"), cache)
        part = part.replace(lengths=begin, mtp_lengths=begin)
        output: Any = self._model.apply({"params": params}, tokens[:, :-1], lengths=counts, cache=part, logits="none")
        if self.draft:
            arguments = dict(lengths=counts, cache=output.cache, logits="none")
            output = self._model.apply({"params": params}, output.streams, tokens[:, 1:], method="mtp", **arguments)
        return jax.tree.map(lambda x, new: _set_rows(x, slots, new), cache, output.cache)

    def _copy(self, cache: Cache, source: Array, targets: Array) -> Cache:
        """Copies row `source` to rows `targets` [B]; row B is nowhere."""

        def copy(x: Array) -> Array:
            row = jnp.take(x, source[None], axis=_row_axis(x))
            shape = list(row.shape)
            shape[_row_axis(x)] = targets.shape[0]
            return _set_rows(x, targets, jnp.broadcast_to(row, shape))

        return jax.tree.map(copy, cache)

    # ---- a round's parts ---------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives free slots to those in line, in order: nobody is overtaken, so that nobody waits forever."""
        free = [slot for slot, sequence in enumerate(self._occupied) if sequence is None]
        while self._waiting and self._waiting[0][1].n <= len(free):
            number, request = self._waiting.popleft()
            stops = frozenset([self.config.eos_token_id] if request.stop_ids is None else request.stop_ids)
            samples = []
            for index in range(request.n):
                seed = (request.sampling.seed + index) % 2**32
                sampling = dataclasses.replace(request.sampling, seed=seed)
                slot, last = free.pop(0), request.prompt[-1]
                sequence = _Sequence(number, index, slot, sampling, stops, request.max_tokens, last)
                self._occupied[slot] = sequence
                samples.append(sequence)
            self._reading.append(_Reading(request.prompt, samples))

    def _read_chunk(self) -> None:
        """Reads a chunk of the prompts that came first."""
        for one in [one for one in self._reading if not any(sequence.left for sequence in one.samples)]:
            self._reading.remove(one)
            self._occupied[one.samples[0].slot] = None
        batch = self._reading[: self._readers]
        if not batch:
            return
        tokens = np.zeros((self._readers, self._chunk + 1), np.int32)
        counts, begin = np.zeros((2, self._readers), np.int32)
        slots = np.full(self._readers, self.slots, np.int32)
        for row, one in enumerate(batch):
            part = one.prompt[one.done : one.done + self._chunk + 1]
            tokens[row, : len(part)] = part
            counts[row], slots[row], begin[row] = len(part) - 1, one.samples[0].slot, one.done
            one.done += len(part) - 1
        arguments = self._place.put((tokens, counts, slots, begin))
        self._cache = self._run_read(self._params, self._cache, *arguments)
        for one in batch:
            if one.done == len(one.prompt) - 1:
                self._reading.remove(one)
                self._fork(one)

    def _fork(self, one: _Reading) -> None:
        """Lets all samples of a prompt that was read go on, from copies of its row."""
        first, *others = one.samples
        others = [sequence for sequence in others if sequence.left]
        if others:
            targets = np.full(self.slots, self.slots, np.int32)
            targets[: len(others)] = [sequence.slot for sequence in others]
            self._cache = self._run_copy(self._cache, *self._place.put((np.int32(first.slot), targets)))
        self._generating += [sequence for sequence in one.samples if sequence.left]
        if not first.left:  # cancelled while the others still needed what was read into its slot
            self._occupied[first.slot] = None

    def _take_step(self) -> _Flight | None:
        """Starts a step of all that generate; those at their limit are known to end before it."""
        coming = set() if self._flight is None else set(map(id, self._flight.sequences))
        going = [one for one in self._generating if one.left > (id(one) in coming)]
        if not going:
            return None
        drafted = [one for one in going if one.fed is None] if self.draft else []
        given = np.full(self.slots, _AT_REST, np.int32)
        samplings = [GREEDY] * self.slots
        for one in going:
            given[one.slot], samplings[one.slot] = _NEWEST if one.fed is None else one.fed, one.sampling
            one.fed = None
        inputs = given.tobytes(), samplings
        if inputs != self._inputs[0]:
            self._inputs = inputs, self._place.put((given, SamplingRows.of(samplings)))
        self._cache, self._ahead, taken = self._run_step(self._params, self._cache, self._ahead, *self._inputs[1])
        return _Flight(going, drafted, taken)

    def _collect(self) -> list[Event]:
        """The tokens of the step that was started a round ago."""
        assert self._flight is not None
        ids, logprobs, counts = jax.device_get(self._flight.taken)
        for one in self._flight.drafted:
            if one.left:
                self._offered += 1
                self._accepted[: counts[one.slot] - 1] += 1
        events = []
        for one in self._flight.sequences:
            for place in range(counts[one.slot]):
                if not one.left:  # cancelled, or ended by one of these tokens
                    break
                token = int(ids[one.slot, place])
                one.left -= 1
                finish: Finish | None = "stop" if token in one.stops else None if one.left else "length"
                if finish:
                    self._end(one)
                events.append(Event(one.request, one.sample, token, float(logprobs[one.slot, place]), finish))
        return events

    def _end(self, sequence: _Sequence) -> None:
        """Ends a sequence and frees its slot, unless a prompt is being read into it, which others may need."""
        sequence.left = 0
        if sequence in self._generating:
            self._generating.remove(sequence)
        if not any(one.samples[0] is sequence for one in self._reading):
            self._occupied[sequence.slot] = None


_NEWEST, _AT_REST = -1, -2  # in place of a token to feed: the row's newest one; none


def slots_within(config: Config, max_length: int, dtype: CacheDtype, budget: int, place: Place = Place()) -> int:  # noqa: B008
    """How many slots of `max_length` tokens a cache of at most `budget` bytes per device has, a legal number.

    Args:
      config: the architecture.
      max_length: tokens of a slot.
      dtype: number format of the cache.
      budget: bytes of each device.
      place: the mesh.

    Raises:
      ValueError: not even the smallest cache fits; the message has the numbers.
    """
    unit = _rows_together(place)
    shapes = place.cache_shapes(config, unit, max_length, dtype)
    least = bytes_per_device(shapes)
    if least > budget:
        raise ValueError(
            f"a cache of {budget:,} bytes per device has no room for {max_length:,} tokens: "
            f"{unit} slot{'s' if unit > 1 else ''} of that length take{'' if unit > 1 else 's'} {least:,} bytes"
        )
    return budget // least * unit


def _rows_together(place: Place) -> int:
    """The fewest rows that split evenly over a mesh."""
    if place.mesh is None:
        return 1
    return math.prod(place.mesh.shape.get(axis, 1) for axis in resolve(place.rules)["batch"])


def _row_axis(x: Array) -> int:
    """The batch axis of an array of the cache: [B] lengths, [L, B, ...] stacked rows."""
    return min(1, x.ndim - 1)


def _set_rows(x: Array, rows: Array, values: Array) -> Array:
    """`x` with other rows of its batch axis; a row out of range is dropped."""
    index = (slice(None),) * _row_axis(x) + (rows,)
    return x.at[index].set(values, mode="drop")
