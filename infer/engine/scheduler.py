"""Continuous batching: many requests over one model, in a fixed number of slots.

Each slot is a row of one cache, which is paged: a request is admitted when there are slots and pages for all that it
may come to, so that those in company never wait for each other. A round prefills one chunk of a waiting prompt and
then takes a decoding step of every row that is generating, so that long prompts delay the others by a chunk at a time.
All of a prompt but its last token is read in chunks; the last one goes through the same program as generated tokens do,
which is the only one that samples. Samples that share a prompt (`Request.n`) therefore share its prefill and the pages
that it fills: the rest of the row is copied, and each copy goes on with a seed of its own.

With drafts (`draft`) a step takes the newest token of a row and some guesses of what follows, and yields as many tokens
as were right, and one more; see `drafters` and `speculative`. Rows go one token at a time while a guide leads them.

What a request gets does not depend on its neighbours: its chunks are cut by its own prompt alone, a token's program is
always the same, and random numbers come from its seed and position. Three programs serve all requests, compiled once.

With a prefix cache (`prefix_cache`) what earlier texts began with is not read again; see `v4_jax.infer.prefix_cache`.
Chunks are then cut from where a text differs, so that another rounding may depend on what was served before.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

from v4_jax.cache.cache import CacheDtype
from v4_jax.cache.entries import PAGE
from v4_jax.config import Config
from v4_jax.infer.checks import check_precision
from v4_jax.infer.engine.decisions import joined, piece
from v4_jax.infer.engine.drafters import choose_drafter
from v4_jax.infer.engine.page_table import PageTable
from v4_jax.infer.engine.programs import PrefillInputs, Programs, PromptScores, StepInputs
from v4_jax.infer.engine.requests import Event, Request
from v4_jax.infer.engine.sampling import GREEDY, SamplingBatch
from v4_jax.infer.engine.sequences import EchoedChunk, PrefillState, SequenceState
from v4_jax.infer.engine.speculative import Acceptance, DraftCounts, StepOutput
from v4_jax.infer.engine.state import State
from v4_jax.infer.engine.steps import (
    InFlightStep,
    Instructions,
    LastSent,
    allowed_tokens,
    next_instructions,
    step_inputs,
)
from v4_jax.infer.prefix_cache.cache import PrefixCacheOptions
from v4_jax.infer.prefix_cache.pager import Pager, PrefilledChunk
from v4_jax.outputs import Kept, Routing
from v4_jax.placement import Place
from v4_jax.policy import Policy
from v4_jax.transformer import Transformer


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
      draft: what guesses tokens ahead in every step: "none", "mtp:N", "dspark" or "auto"; see `choose_drafter`.
        Requests get the same tokens, but for what rounding does: a step of several tokens adds in another order.
      verify_all: verify all drafts of every step, also where many rows run and their drafter is not confident of them
        (see `verification_width`). Answers then do not depend on their company to the last bit.
      prefix_cache: what to keep of texts for those that begin alike; None keeps nothing.
      kept: which decisions come with a sample's last token, to be replayed. With any, all drafts are verified, and
        there is no prefix cache, of whose texts nobody knows them.
      place: the mesh that `params` lie on, with its rules.

    Attributes:
      slots: as given.
      max_length: as given.
      pages: pages of the cache.
      draft_depth: tokens that are guessed in every step.
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
        draft: str = "none",
        verify_all: bool = False,
        prefix_cache: PrefixCacheOptions | None = None,
        kept: Kept = "none",
        place: Place = Place(),  # noqa: B008 (frozen)
    ) -> None:
        longest = place.pages(max_length)
        pages = slots * longest if pages is None else pages
        sizes = {"slots": slots, "max_length": max_length, "pages": pages, "prefill_chunk": prefill_chunk}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if kept != "none" and prefix_cache is not None:
            raise ValueError("decisions are kept, and a prefix cache has none of what it holds; expected one of them")
        check_precision(config, policy, cache_dtype)
        drafter = choose_drafter(config, draft)
        place.check(slots)
        self.config, self.slots, self.max_length, self.pages = config, slots, max_length, pages
        self.draft_depth = drafter.depth
        self._params, self._place, self._cache_dtype = params, place, cache_dtype
        self._chunk = place.chunk(prefill_chunk if prefix_cache is None else -(-prefill_chunk // PAGE) * PAGE)
        self._readers = place.row_shards  # prompts that one call reads, one of each shard of rows
        shapes = place.cache_shapes(config, slots, max_length, cache_dtype, pages=pages)
        self._table = PageTable(slots, pages, longest, place.row_shards)
        self._pager: Pager | None = None
        if prefix_cache is not None:
            self._pager = Pager(
                prefix_cache,
                config,
                params,
                shapes,
                chunk=self._chunk,
                drafter=drafter,
                policy=policy,
                cache_dtype=cache_dtype,
                place=place,
            )
        model = Transformer(config, policy=policy, mesh=place.mesh, rules=place.rules)
        self._programs = Programs(
            model,
            shapes,
            drafter=drafter,
            chunk=self._chunk,
            pager=self._pager,
            place=place,
            verify_all=verify_all or kept != "none",
            kept=kept,
        )
        self._unread: list[tuple[Routing, dict[int, tuple[PrefillState, int]]]] = []  # decisions of chunks
        self._scored: list[tuple[PromptScores, dict[int, EchoedChunk]]] = []  # chunks whose scores were not read yet
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._prefills: list[PrefillState] = []
        self._occupied: list[SequenceState | None] = [None] * slots  # by slot: who generates or waits for its prompt
        self._generating: list[SequenceState] = []
        self._in_flight: InFlightStep | None = None
        self._events: collections.deque[Event] = collections.deque()  # of a round, not yet yielded by `run`
        self.tokens_read = 0
        self._drafts = DraftCounts(drafter.depth)
        self._submitted = 0
        self._compiled = False
        self._last_chunk: Array | None = None  # something that the last chunk's program returned
        self._sent_inputs: LastSent[StepInputs] = LastSent(place)
        self._sent_sampling: LastSent[SamplingBatch] = LastSent(place)

    # What is on the devices, from `compile` on.
    _state: State
    _next_tokens: Array  # [B, 1 + draft_depth] each row's newest token, and guesses of those that follow it
    _unrestricted: Array  # masks of rows without constraints
    _seconds: Array  # [widths] what a step of each width takes

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
        at_work = self._waiting or self._prefills or self._generating or self._in_flight
        return not (at_work or self._scored or self._events)

    @property
    def acceptance(self) -> list[Acceptance]:
        """How many of the drafts so far were right, by depth: the first guess of each step, the second, and so on.

        A step yields 1 token, and 1 more for each that was accepted.
        """
        return list(self._drafts.by_depth)

    @property
    def draft_steps(self) -> int:
        """Steps so far of all rows that take drafts: each yields 1 token, and those that were accepted."""
        return self._drafts.steps

    def compile(self) -> None:
        """Compiles the programs and makes the cache, unless that was done before."""
        if self._compiled:
            return
        self._programs.compile(self._params)
        arguments = (self.config, self.slots, self.max_length, self._cache_dtype)
        cache = jax.jit(lambda: self._place.cache(*arguments, pages=self.pages))()
        self._state, self._next_tokens = self._programs.begin(cache)
        self._unrestricted = self._place.put(self._programs.all_allowed)
        self._seconds = self._place.put(np.ones(len(self._programs.widths), np.float32))
        if len(self._programs.widths) > 1:
            idle = self._params, self._state, self._next_tokens, self._unrestricted
            self._state, self._next_tokens, self._seconds = self._programs.measure(*idle)
        self._compiled = True

    def replace_parameters(self, params: Any) -> None:
        """Goes on with other parameters, of the same shapes, dtypes and places.

        Raises:
          ValueError: the engine is at work, or keeps prefixes that were read with the ones before.
        """
        if not self.idle:
            raise ValueError("the engine is at work; expected an idle one to give other parameters to")
        if self._pager is not None:
            raise ValueError("the engine has a prefix cache, which holds what other parameters read")
        self._params = params

    def submit(self, request: Request) -> int:
        """Puts a request in line. Returns its number.

        Raises:
          ValueError: it can never be served: an empty prompt, an id outside of the vocabulary, too long, more samples
            than slots, more than all pages hold, or what `Request` does not allow.
        """
        request.check(self.config, self.slots, self.max_length)
        each, shared = self._pages_of(request)
        if not self._table.choose(range(self.slots), request.n, each, shared, empty=True):
            length, needed = len(request.prompt) + request.max_tokens, shared + request.n * (each - shared)
            who = f"{request.n} samples" if request.n > 1 else "1 sample"
            need = "need" if request.n > 1 else "needs"
            raise ValueError(
                f"{who} of up to {length} tokens {need} {needed} pages of {self._place.page} tokens, more than there "
                f"are: the cache has {self.pages} for all requests"
            )
        self._waiting.append((self._submitted, request))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, request: int, sample: int | None = None) -> None:
        """Ends a request, or one of its samples: no further events come of it, and its slots become free.

        What has ended or was never submitted is left alone, and so is a sample of a request that is still in line.
        """

        def matches(number: int, index: int) -> bool:
            return number == request and sample in (None, index)

        if sample is None:
            self._waiting = collections.deque((number, one) for number, one in self._waiting if number != request)
        self._events = collections.deque(event for event in self._events if not matches(event.request, event.sample))
        for sequence in self._occupied.copy():
            if sequence is not None and matches(sequence.request, sequence.sample):
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
        scored, self._scored = self._scored, []
        self._prefill_chunk()
        started = self._start_step()
        if self._pager is not None:
            self._pager.drain(in_flight=1)  # what this round's chunk completed
        events = [*self._events, *self._echo(scored)]
        self._events.clear()
        if self._in_flight is not None:
            events += self._collect(self._in_flight, started.instructions if started else {})
        self._in_flight = started
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
            self._table.allocate(slots, each, shared)
            sequences = []
            for sample, slot in enumerate(slots):
                sequence = SequenceState.of(request, number, sample, slot, self.config, self.draft_depth)
                self._occupied[slot] = sequence
                sequences.append(sequence)
            self._prefills.append(PrefillState(request.prompt, sequences, salt=request.salt, echo=request.echo))

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

    def _prefill_chunk(self) -> None:
        """Reads a chunk of the prompt that came first in each shard of the rows."""
        for prefill in [prefill for prefill in self._prefills if prefill.cancelled]:
            self._prefills.remove(prefill)
            self._free(prefill.slot)
        batch: dict[int, PrefillState] = {}  # by shard
        for prefill in self._prefills:
            batch.setdefault(self._table.shard(prefill.slot), prefill)
        for prefill in batch.values():
            if prefill.tokens_read is None:
                self._load_prefix(prefill)
        # One that was loaded whole is left out. One of a single token is not: reading none of it empties the slot.
        self._run_chunk({row: one for row, one in batch.items() if not (one.complete and one.tokens_read)})
        for prefill in batch.values():
            if prefill.complete:
                self.tokens_read += 1  # the last one, which the next step takes
                self._prefills.remove(prefill)
                self._fork(prefill)

    def _load_prefix(self, prefill: PrefillState) -> None:
        """Fetches what the prefix cache has of a prompt."""
        prefill.tokens_read = 0
        if self._pager is None or prefill.echo:
            return
        self._state, prefix = self._pager.load_prefix(self._state, prefill.slot, prefill.prompt, prefill.salt)
        prefill.tokens_read, prefill.sealed, prefill.hashes = prefix
        self.tokens_read += prefix.tokens
        for sequence in prefill.sequences:
            sequence.cached_tokens = prefix.tokens

    def _run_chunk(self, batch: dict[int, PrefillState]) -> None:
        """Starts reading a chunk of each of some prompts, by the shard that their slots are in."""
        if not batch:
            return
        # Any: numpy's arrays, where the fields are the devices'.
        tokens: Any = np.zeros((self._readers, self._chunk + 1), np.int32)
        counts: Any = np.zeros(self._readers, np.int32)
        begin, sealed = counts.copy(), counts.copy()
        slots: Any = np.full(self._readers, self.slots, np.int32)  # out of range: read by nobody
        chunks, echoed = [], {}
        for row, prefill in batch.items():
            assert prefill.tokens_read is not None
            first = prefill.tokens_read
            known = prefill.prompt[first : first + self._chunk + 1]
            tokens[row, : len(known)] = known
            counts[row], slots[row], begin[row], sealed[row] = len(known) - 1, prefill.slot, first, prefill.sealed
            prefill.tokens_read += len(known) - 1
            self.tokens_read += len(known) - 1
            if prefill.hashes is not None:
                chunks.append(PrefilledChunk(row, prefill.hashes, first, prefill.tokens_read))
            if prefill.echo:
                echoed[row] = EchoedChunk(prefill, first, prefill.tokens_read)
        scored: Any = np.bool_(echoed)
        inputs = self._place.put(PrefillInputs(tokens, counts, slots, begin, sealed, scored))
        before = self._last_chunk
        self._state, output = self._programs.prefill(self._params, self._state, inputs)
        self._last_chunk, routing = output.lengths, output.routing
        if echoed:
            self._scored.append((output.scores, echoed))
        # One chunk runs, one is queued: never idle, and whoever comes next waits for two chunks, not for a prompt.
        jax.block_until_ready(before)
        if routing is not None:
            self._read_decisions()
            self._unread.append((routing, {row: (prefill, int(counts[row])) for row, prefill in batch.items()}))
        if self._pager is not None and output.copies is not None:
            self._pager.save_chunk(output.copies, chunks)

    def _read_decisions(self) -> None:
        """Takes what was decided in chunks from the devices."""
        for routing, batch in self._unread:
            for row, (prefill, count) in batch.items():
                prefill.routing.append(piece(routing, row, count))
        self._unread.clear()

    def _fork(self, prefill: PrefillState) -> None:
        """Lets all samples of a prompt that was read go on, from copies of its row."""
        self._read_decisions()
        first, *others = prefill.sequences
        read = len(prefill.prompt) - 1
        filled, begun = read // self._place.page, self._place.pages(read)
        complete = {self._table.shard(first.slot)}  # shards whose pages hold the prompt
        for sequence in others:
            if not sequence.tokens_left:  # it has ended, or only echoes
                continue
            shard = self._table.shard(sequence.slot)
            pages = range(filled if shard in complete else 0, begun)
            if not pages:
                self._copy(first.slot, sequence.slot, page=0, count=0)
            for page in pages:
                self._copy(first.slot, sequence.slot, page, count=1)
            complete.add(shard)
        for sequence in prefill.sequences:
            sequence.hashes = None if prefill.hashes is None else prefill.hashes.copy()
            sequence.routing = prefill.routing.copy()
        self._generating += [sequence for sequence in prefill.sequences if sequence.tokens_left]
        if first.ended:  # cancelled while the others still needed what was read into its slot
            self._free(first.slot)

    def _copy(self, source: int, target: int, page: int, count: int) -> None:
        """Copies a slot to another one, and of its pages `count`, 0 or 1, from number `page` on."""
        numbers = (np.int32(source), np.int32(target), np.int32(page), np.int32(count))
        self._state = self._programs.copy(self._state, *self._place.put(numbers))

    def _start_step(self) -> InFlightStep | None:
        """Starts a step of all that can go on; those at their limit are known to end before it."""
        instructions = next_instructions(self._generating, self._in_flight)
        if not instructions:
            return None
        drafted = [sequence for sequence in instructions if self.draft_depth and sequence.takes_drafts]
        host = step_inputs(instructions, self.slots)
        inputs = self._sent_inputs.put([x.tobytes() for x in host], lambda: host)
        samplings = [GREEDY] * self.slots
        for sequence in self._generating:  # those at rest too: others that come and go then change nothing
            samplings[sequence.slot] = sequence.sampling
        sampling = self._sent_sampling.put(samplings, lambda: SamplingBatch.of(samplings))
        masks = allowed_tokens(instructions, self._programs.all_allowed)
        allowed = self._unrestricted if masks is None else self._place.put(masks)
        self._state, self._next_tokens, output = self._programs.step(
            self._params, self._state, self._next_tokens, inputs, sampling, allowed, self._seconds
        )
        if not host.wants_alternatives:
            output = output._replace(alternatives=None)  # so that they are not read
        return InFlightStep(instructions, drafted, output)

    # ---- what prompts and steps yield --------------------------------------------------------------------------------

    def _echo(self, scored: list[tuple[PromptScores, dict[int, EchoedChunk]]]) -> list[Event]:
        """Reads how probable the tokens of chunks are that were started a round ago."""
        events = []
        for scores, chunks in scored:
            read = jax.device_get(scores)
            for row, chunk in chunks.items():
                for index, place in enumerate(range(chunk.begin, chunk.end)):
                    for sequence in chunk.prefill.sequences:
                        if sequence.echo_left:
                            event = sequence.echo(read, row, index, chunk.prefill.prompt[place + 1])
                            if event.finish:
                                self._end(sequence)
                            events.append(event)
        return events

    def _collect(self, step: InFlightStep, following: Instructions) -> list[Event]:
        """Reads the tokens of a step that was started a round ago.

        Args:
          step: that one.
          following: who takes part in the step after it, which runs already. Those that the devices leave alone there,
            because of a token that is read now, are taken out.
        """
        output: StepOutput = jax.device_get(step.output)
        for sequence in step.drafted:
            if sequence.tokens_left:
                offered, accepted = int(output.offered[sequence.slot]), int(output.counts[sequence.slot]) - 1
                self._drafts.add(offered, accepted)
                sequence.drafts.add(offered, accepted)
        events, paged = [], []  # those that completed a page
        for sequence in step.instructions:
            for index in range(output.counts[sequence.slot]):
                if not sequence.tokens_left:  # cancelled, or ended by one of these tokens
                    break
                token = int(output.ids[sequence.slot, index])
                sequence.tokens_left -= 1
                if sequence.hashes is not None and sequence.hashes.append(sequence.newest_token):
                    paged.append(sequence)
                sequence.newest_token = token
                if sequence in following and following[sequence].unless == token:
                    del following[sequence]
                finish = sequence.finish(token, float(output.logprobs[sequence.slot, index]))
                if finish:
                    self._end(sequence)
                event = sequence.event(output, index, finish)
                if output.routing is not None and finish:
                    last = piece(output.routing, sequence.slot, index + 1)
                    event = event._replace(routing=joined([*sequence.routing, last]))
                events.append(event)
            if output.routing is not None and sequence.tokens_left:
                count = int(output.counts[sequence.slot])
                sequence.routing.append(piece(output.routing, sequence.slot, count))
        for sequence in paged:
            if self._pager is not None and sequence.hashes is not None:
                self._pager.save_generated(self._state, sequence.slot, sequence.hashes)
        return events

    def _end(self, sequence: SequenceState) -> None:
        """Ends a sequence and frees its slot, unless a prompt is being read into it, which others may need."""
        sequence.tokens_left = sequence.echo_left = 0
        if sequence in self._generating:
            self._generating.remove(sequence)
        if not any(prefill.sequences[0] is sequence for prefill in self._prefills):
            self._free(sequence.slot)

    def _free(self, slot: int) -> None:
        """Frees a slot and its pages."""
        self._occupied[slot] = None
        self._table.free(slot)
