"""Continuous batching: many requests over one model, in a fixed number of slots.

Each slot is a row of one cache, which is paged: a request is admitted when there are slots and pages for all that it
may come to, so that those in company never wait for each other. A round reads one chunk of a waiting prompt and then
takes one token of every row that is generating, so that long prompts delay the others by a chunk at a time. All of a
prompt but its last token is read in chunks; the last one goes through the same program as generated tokens do, which is
the only one that samples. Samples that share a prompt (`Request.n`) therefore share its reading and the pages that it
fills: the rest of the row is copied, and each copy goes on with a seed of its own.

With the model's multi-token-prediction block (`draft`) a step takes the newest token of a row and some guesses of what
follows, and yields as many tokens as were right, and one more; see `speculative`. Rows go one token at a time while a
guide leads them.

What a request gets does not depend on its neighbours: its chunks are cut by its own prompt alone, a token's program is
always the same, and random numbers come from its seed and position. Three programs serve all requests, compiled once.

With a prefix cache (`prefixes`) what earlier texts began with is not read again; see `prefix_cache`. Chunks
are then cut from where a text differs, so that another rounding may depend on what was served before.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from v4_jax.cache.cache import CacheDtype
from v4_jax.cache.entries import PAGE
from v4_jax.config import Config
from v4_jax.infer.checks import check_precision
from v4_jax.infer.engine import speculative
from v4_jax.infer.engine.guide import NO_TOKEN, Guide, Move
from v4_jax.infer.engine.page_table import PageTable
from v4_jax.infer.engine.programs import AT_REST, DRAFTED, NEWEST, Given, Programs
from v4_jax.infer.engine.requests import Event, Finish, Request
from v4_jax.infer.engine.sampling import GREEDY, Sampling, SamplingRows
from v4_jax.infer.engine.speculative import Acceptance, Taken
from v4_jax.infer.prefix_cache.cache import Keeping, Trail
from v4_jax.infer.prefix_cache.pager import Pager
from v4_jax.placement import Place
from v4_jax.policy import Policy
from v4_jax.transformer import Transformer


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A sample in its slot.

    Attributes:
      request: its request's number.
      sample: which sample it is.
      slot: its row of the cache.
      sampling: with its own seed.
      stops: tokens that end it.
      top_logprobs: most probable tokens to report.
      guide: what else decides about its tokens; None once nothing does.
      left: tokens that it may still yield; 0 once it has ended.
      fed: prompt token to feed next; None once it feeds what it generated.
      newest: token to feed next, as far as the host knows.
      trail: the hashes of the tokens before it; None without a prefix cache.
      cached: tokens of its prompt that were in the prefix cache.
    """

    request: int
    sample: int
    slot: int
    sampling: Sampling
    stops: frozenset[int]
    top_logprobs: int
    guide: Guide | None
    left: int
    fed: int | None
    newest: int
    trail: Trail | None = None
    cached: int = 0


@dataclasses.dataclass(eq=False)
class _Reading:
    """A prompt that is being read: into the first sample's slot, up to its last token.

    Attributes:
      prompt: its tokens.
      samples: the sequences that go on from it.
      done: tokens read; None before it begins.
      sealed: tokens whose entries were found.
      trail: the hashes of what there is to read; None without a prefix cache.
    """

    prompt: Sequence[int]
    samples: list[_Sequence]
    done: int | None = None
    sealed: int = 0
    trail: Trail | None = None

    @property
    def slot(self) -> int:
        """Where it is read into."""
        return self.samples[0].slot

    @property
    def complete(self) -> bool:
        """Whether nothing is left to read."""
        return self.done == len(self.prompt) - 1


class _Flight(NamedTuple):
    """A step that was started, and whose tokens were not read yet.

    Attributes:
      moves: who takes part.
      drafted: those of them that were fed drafts.
      taken: what they get.
    """

    moves: _Moves
    drafted: list[_Sequence]
    taken: Taken


class Engine:
    """Serves requests with one model, in a cache of fixed size.

    Args:
      config: the architecture.
      params: its parameters, as `v4_jax.load` or `v4_jax.init` return them.
      slots: samples that are generated at the same time; on a mesh with a data axis, a multiple of it.
      max_length: tokens (prompt and continuation) that a sample may reach.
      pages: pages of the cache, of `Place.page` tokens each, which the samples share; on a mesh with a data axis a
        multiple of it. None: as many as the slots can fill. See `pages_within`.
      policy: precision, a `Policy` or its name.
      cache_dtype: number format of the cache; see `v4_jax.init_cache`.
      prefill_chunk: prompt tokens that are read between two steps of generation; on a mesh that splits the sequence it
        is rounded up to what splits evenly, with a prefix cache to a multiple of 128.
      draft: tokens that the multi-token-prediction block guesses ahead in every step, up to 4; 0 is plain decoding.
        Requests get the same tokens, but for what rounding does: a step of several tokens adds in another order.
      prefixes: what to keep of texts for those that begin alike; None keeps nothing.
      place: the mesh that `params` lie on, with its rules.

    Attributes:
      slots: as given.
      max_length: as given.
      pages: pages of the cache.
      draft: as given.
      tokens_read: prompt tokens so far, of all requests, that were read or found in the prefix cache.

    Raises:
      OSError: the prefix cache's directory cannot be used.
      ShardingError: the slots or pages do not split evenly over the mesh.
      ValueError: sizes out of range, an unknown policy, or a cache format that the policy or the model does not allow.
    """

    def __init__(
        self,
        config: Config,
        params: Any,
        *,
        slots: int,
        max_length: int,
        pages: int | None = None,
        policy: str | Policy = "bfloat16",
        cache_dtype: CacheDtype = "bfloat16",
        prefill_chunk: int = 512,
        draft: int = 0,
        prefixes: Keeping | None = None,
        place: Place = Place(),  # noqa: B008 (frozen)
    ) -> None:
        longest = place.pages(max_length)
        pages = slots * longest if pages is None else pages
        sizes = {"slots": slots, "max_length": max_length, "pages": pages, "prefill_chunk": prefill_chunk}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        check_precision(config, policy, cache_dtype)
        speculative.check_depth(draft, config)
        place.check(slots)
        self.config, self.slots, self.max_length, self.pages, self.draft = config, slots, max_length, pages, draft
        self._params, self._place, self._cache_dtype = params, place, cache_dtype
        self._chunk = place.chunk(prefill_chunk if prefixes is None else -(-prefill_chunk // PAGE) * PAGE)
        self._readers = place.row_shards  # prompts that one call reads, one of each shard of rows
        shapes = place.cache_shapes(config, slots, max_length, cache_dtype, pages=pages)
        self._table = PageTable(slots, pages, longest, place.row_shards)
        self._pager: Pager | None = None
        if prefixes is not None:
            arguments: dict[str, Any] = dict(chunk=self._chunk, draft=draft, policy=policy, cache_dtype=cache_dtype)
            self._pager = Pager(prefixes, config, params, shapes, **arguments, place=place)
        model = Transformer(config, policy=policy, mesh=place.mesh, rules=place.rules)
        self._programs = Programs(model, shapes, draft=draft, chunk=self._chunk, pager=self._pager, place=place)
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._reading: list[_Reading] = []
        self._occupied: list[_Sequence | None] = [None] * slots  # by slot: who generates or waits for its prompt
        self._generating: list[_Sequence] = []
        self._flight: _Flight | None = None
        self._events: collections.deque[Event] = collections.deque()  # of a round, not yet yielded by `run`
        self.tokens_read = 0
        self._offered, self._accepted = 0, np.zeros(draft, int)
        self._submitted = 0
        self._last_read: Any = ()  # something that the last chunk's program returned
        self._inputs: dict[str, tuple[Any, Any]] = {}  # the last step's host inputs, and the same on the devices
        self._state: Any = None
        self._unrestricted: Any = None  # masks of rows without constraints
        self._ahead: Any = None  # [B, 1 + draft] each row's newest token, and guesses of those that follow it

    @property
    def programs(self) -> int:
        """Programs compiled so far; constant after `compile`."""
        return self._programs.count

    @property
    def pages_used(self) -> int:
        """Pages that were given to requests, whether they have filled them yet or not."""
        return self._table.used

    @property
    def waiting(self) -> int:
        """Requests in line that have no slots yet."""
        return len(self._waiting)

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
        if self._state is None:
            self._programs.compile(self._params)
            arguments = (self.config, self.slots, self.max_length, self._cache_dtype)
            cache = jax.jit(lambda: self._place.cache(*arguments, pages=self.pages))()
            self._state, self._ahead = self._programs.begin(cache)
            self._unrestricted = self._place.put(self._programs.everything)

    def submit(self, request: Request) -> int:
        """Puts a request in line. Returns its number.

        Raises:
          ValueError: it can never be served: an empty prompt, an id outside of the vocabulary, too long, more samples
            than slots, more than all pages hold, or what `Request` does not allow.
        """
        request.check(self.config, self.slots, self.max_length)
        each, shared = self._pages_of(request)
        if not self._table.choose(range(self.slots), request.n, each, shared, empty=True):
            raise ValueError(
                f"{request.n} sample{'s' if request.n > 1 else ''} of up to {len(request.prompt) + request.max_tokens} "
                f"tokens need{'' if request.n > 1 else 's'} {shared + request.n * (each - shared)} pages of "
                f"{self._place.page} tokens, more than there are: the cache has {self.pages} for all requests"
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

    def run(self, each_round: Callable[[], None] | None = None) -> Iterator[Event]:
        """Works until nothing is left; requests may be submitted and cancelled between events.

        Args:
          each_round: called before each round.
        """
        while not self.idle:
            if each_round is not None:
                each_round()
            self._events.extend(self.round())
            while self._events:
                yield self._events.popleft()

    def round(self) -> list[Event]:
        """Reads one chunk, takes one step, and returns the tokens of the step before: the host reads those meanwhile.

        Tokens of sequences that were cancelled in between are dropped.
        """
        self.compile()
        self._admit()
        self._send_table()
        self._read_chunk()
        ahead = self._take_step()
        if self._pager is not None:
            self._pager.settle(leaving=1)  # what this round's chunk completed
        events = [*self._events, *(self._collect({} if ahead is None else ahead.moves) if self._flight else [])]
        self._events.clear()
        self._flight = ahead
        return events

    def close(self) -> None:
        """Waits until what a prefix cache keeps is written; the engine is of no use after that."""
        if self._pager is not None:
            self._pager.close()

    # ---- a round's parts ---------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives free slots and pages to those in line, in order: nobody is overtaken, so that nobody waits forever."""
        while self._waiting:
            number, request = self._waiting[0]
            each, shared = self._pages_of(request)
            free = [slot for slot, sequence in enumerate(self._occupied) if sequence is None]
            slots = self._table.choose(free, request.n, each, shared)
            if not slots:
                return
            self._waiting.popleft()
            self._table.hand_out(slots, each, shared)
            samples = []
            for index, slot in enumerate(slots):
                seed = (request.sampling.seed + index) % 2**32
                sampling = dataclasses.replace(request.sampling, seed=seed)
                sequence = _Sequence(
                    request=number,
                    sample=index,
                    slot=slot,
                    sampling=sampling,
                    stops=request.stops(self.config),
                    top_logprobs=request.top_logprobs,
                    guide=request.guide(self.config),
                    left=request.max_tokens,
                    fed=request.prompt[-1],
                    newest=request.prompt[-1],
                )
                self._occupied[sequence.slot] = sequence
                samples.append(sequence)
            self._reading.append(_Reading(request.prompt, samples))

    def _pages_of(self, request: Request) -> tuple[int, int]:
        """Pages of each sample, and how many of them the samples share: those that the prompt fills."""
        place, prompt = self._place, len(request.prompt)
        return place.pages(prompt + request.max_tokens), (prompt - 1) // place.page

    def _send_table(self) -> None:
        """Lets the devices know whose the pages are now; what was started before goes by what was so then."""
        if self._table.changed:
            self._table.changed = False
            table = self._place.put_rows(self._table.array)
            self._state = self._state._replace(cache=self._state.cache.replace(table=table))

    def _read_chunk(self) -> None:
        """Reads a chunk of the prompt that came first in each shard of the rows."""
        for one in [one for one in self._reading if not any(sequence.left for sequence in one.samples)]:
            self._reading.remove(one)
            self._vacate(one.slot)
        batch: dict[int, _Reading] = {}
        for one in self._reading:
            batch.setdefault(self._table.shard(one.slot), one)
        tokens = np.zeros((self._readers, self._chunk + 1), np.int32)
        counts, begin, sealed = np.zeros((3, self._readers), np.int32)
        slots = np.full(self._readers, self.slots, np.int32)
        kept = []
        for row, one in batch.items():
            found = one.done is None and self._begin(one)
            assert one.done is not None
            if one.complete and found:
                continue  # all of it
            part = one.prompt[one.done : one.done + self._chunk + 1]
            tokens[row, : len(part)] = part
            counts[row], slots[row], begin[row], sealed[row] = len(part) - 1, one.slot, one.done, one.sealed
            self.tokens_read += len(part) - 1
            one.done += len(part) - 1
            if one.trail is not None:
                kept.append((row, one.trail, int(begin[row]), one.done))
        if (slots < self.slots).any():
            arguments = self._place.put((tokens, counts, slots, begin, sealed))
            before = self._last_read
            self._state, copies, self._last_read = self._programs.read(self._params, self._state, *arguments)
            # One chunk runs, one is queued: never idle, and whoever comes next waits for two chunks, not for a prompt.
            jax.block_until_ready(before)
            if self._pager is not None:
                self._pager.chunk_read(copies, kept)
        for one in batch.values():
            if one.complete:
                self.tokens_read += 1  # the last one, which the next step takes
                self._reading.remove(one)
                self._fork(one)

    def _begin(self, one: _Reading) -> int:
        """Fetches what the prefix cache has of a prompt; returns how many tokens need not be read."""
        one.done = 0
        if self._pager is not None:
            self._state, (one.done, one.sealed, one.trail) = self._pager.begin(self._state, one.slot, one.prompt)
            for sequence in one.samples:
                sequence.cached = one.done
            self.tokens_read += one.done
        return one.done

    def _fork(self, one: _Reading) -> None:
        """Lets all samples of a prompt that was read go on, from copies of its row."""
        first, *others = one.samples
        read = len(one.prompt) - 1
        filled, begun = read // self._place.page, self._place.pages(read)
        complete = {self._table.shard(first.slot)}  # shards whose pages hold the prompt
        for sequence in [sequence for sequence in others if sequence.left]:
            shard = self._table.shard(sequence.slot)
            pages = range(filled if shard in complete else 0, begun)
            for number, count in [(number, 1) for number in pages] or [(0, 0)]:
                numbers = (first.slot, sequence.slot, number, count)
                self._state = self._programs.copy(self._state, *self._place.put([np.int32(x) for x in numbers]))
            complete.add(shard)
        for sequence in one.samples:
            sequence.trail = None if one.trail is None else one.trail.copy()
        self._generating += [sequence for sequence in one.samples if sequence.left]
        if not first.left:  # cancelled while the others still needed what was read into its slot
            self._vacate(first.slot)

    def _take_step(self) -> _Flight | None:
        """Starts a step of all that can go on; those at their limit are known to end before it."""
        going = self._moves()
        if not going:
            return None
        drafted = [one for one in going if self.draft and one.fed is None and one.guide is None]
        unless, forced = np.full((2, self.slots), NO_TOKEN, np.int32)
        reporting = any(one.top_logprobs for one in going)
        given = Given(np.full(self.slots, AT_REST, np.int32), unless, forced, np.bool_(reporting))
        allowed: np.ndarray | None = None
        for one, move in going.items():
            newest = DRAFTED if one.guide is None else NEWEST
            given.feed[one.slot], one.fed = newest if one.fed is None else one.fed, None
            unless[one.slot], forced[one.slot] = move.unless, move.forced
            if move.mask is not None:
                allowed = self._programs.everything.copy() if allowed is None else allowed
                allowed[one.slot] = move.mask
        samplings = [GREEDY] * self.slots
        for one in self._generating:  # those at rest too: others that come and go then change nothing
            samplings[one.slot] = one.sampling
        inputs = self._placed("given", [x.tobytes() for x in given], lambda: given)
        rows = self._placed("rows", samplings, lambda: SamplingRows.of(samplings))
        masks = self._unrestricted if allowed is None else self._place.put(allowed)
        self._state, self._ahead, taken = self._programs.step(
            self._params, self._state, self._ahead, inputs, rows, masks
        )
        return _Flight(going, drafted, taken if reporting else taken._replace(alternatives=None))

    def _moves(self) -> _Moves:
        """Who takes the next step, and what holds for it.

        Constrained samples, which sit out every other step, all sit out the same one: without others, it is not taken.
        """
        coming = {} if self._flight is None else self._flight.moves
        others_turn = any(one.guide is not None and one.guide.constrained for one in coming)
        moves = {}
        for one in self._generating:
            unread = one in coming
            if one.left <= unread:
                continue
            move: Move | None = Move()
            if one.guide is not None:
                move = None if one.guide.constrained and others_turn else one.guide.next(unread)
            if move is not None:
                moves[one] = move
        return moves

    def _placed(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, on the devices: made and sent only if `key` is another one than at the last call."""
        if name not in self._inputs or self._inputs[name][0] != key:
            self._inputs[name] = key, self._place.put(make())
        return self._inputs[name][1]

    def _collect(self, ahead: _Moves) -> list[Event]:
        """The tokens of the step that was started a round ago; what was not to follow them is taken out of `ahead`."""
        assert self._flight is not None
        taken: Taken = jax.device_get(self._flight.taken)
        for one in self._flight.drafted:
            if one.left:
                self._offered += 1
                self._accepted[: taken.counts[one.slot] - 1] += 1
        events, paged = [], []  # those that completed a page
        for one in self._flight.moves:
            for place in range(taken.counts[one.slot]):
                if not one.left:  # cancelled, or ended by one of these tokens
                    break
                at, token = (one.slot, place), int(taken.ids[one.slot, place])
                one.left -= 1
                if one.trail is not None and one.trail.push(one.newest):
                    paged.append(one)
                one.newest = token
                if one in ahead and ahead[one].unless == token:
                    del ahead[one]
                complete = token in one.stops or (one.guide is not None and one.guide.read(token))
                if one.guide is not None and one.guide.spent:
                    one.guide = None
                finish: Finish | None = "stop" if complete else None if one.left else "length"
                if finish:
                    self._end(one)
                event = Event(one.request, one.sample, token, float(taken.logprobs[at]), finish, cached=one.cached)
                if one.top_logprobs:
                    best_ids, logprobs = (x[at][: one.top_logprobs].tolist() for x in taken.alternatives)
                    event = event._replace(alternatives=tuple(zip(best_ids, logprobs, strict=True)))
                events.append(event)
        for one in paged:
            if self._pager is not None and one.trail is not None:
                self._pager.generated(self._state, one.slot, one.trail)
        return events

    def _end(self, sequence: _Sequence) -> None:
        """Ends a sequence and frees its slot, unless a prompt is being read into it, which others may need."""
        sequence.left = 0
        if sequence in self._generating:
            self._generating.remove(sequence)
        if not any(one.samples[0] is sequence for one in self._reading):
            self._vacate(sequence.slot)

    def _vacate(self, slot: int) -> None:
        """Frees a slot and its pages."""
        self._occupied[slot] = None
        self._table.take_back(slot)


_Moves = dict[_Sequence, Move]
