"""The engine's programs: what the devices do for all slots, compiled once; and what they keep between them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from v4_jax.cache.cache import Cache
from v4_jax.cache.entries import PAGE
from v4_jax.cache.pages import entry_numbers, page_sizes, put, take
from v4_jax.infer.engine.drafters import Apply, Drafter
from v4_jax.infer.engine.guide import NO_TOKEN
from v4_jax.infer.engine.history import History
from v4_jax.infer.engine.sampling import ALL, GREEDY, MOST_ALTERNATIVES, SamplingBatch
from v4_jax.infer.engine.speculative import SamplingInputs, StepOutput, verify
from v4_jax.infer.engine.state import State
from v4_jax.infer.engine.verification_width import best_width, expected_tokens, step_widths
from v4_jax.infer.prefix_cache.pager import PageCopies, Pager
from v4_jax.kernels.compiler_options import compiler_options
from v4_jax.outputs import Kept, Output, Routing
from v4_jax.placement import Place
from v4_jax.transformer import Transformer

# In place of a prompt token to feed: the row's newest one and its drafts; the newest one alone; none.
DRAFTED, NEWEST, AT_REST = -1, -2, -3

MEASURED = 3  # steps of each width that are timed at the start, of which the shortest counts


class PrefillInputs(NamedTuple):
    """What the host says about a chunk of prompts, a row for each shard of the slots. On the host, numpy arrays.

    Attributes:
      tokens: [P, C + 1] int32 the chunk's tokens, and one more that is known but not read yet.
      counts: [P] int32 how many of them are to be read.
      slots: [P] int32 which slots they are read into; the number of slots for none.
      begin: [P] int32 tokens that the slots hold before.
      sealed: [P] int32 tokens, from a prompt's first on, whose entries are there already.
      scored: [] bool: whether anyone asks how probable the prompts' tokens are.
    """

    tokens: Array
    counts: Array
    slots: Array
    begin: Array
    sealed: Array
    scored: Array


class PromptScores(NamedTuple):
    """How probable the tokens of a chunk of prompts are, each given those before it. Zeros if nobody asks.

    Attributes:
      logprobs: [P, C] float32 log-probabilities of the tokens after those of the chunk.
      alternatives: ids and log-probabilities [P, C, K] of the most probable tokens in their places.
    """

    logprobs: Array
    alternatives: tuple[Array, Array]


class PrefillOutput(NamedTuple):
    """What a chunk of prompts yields.

    Attributes:
      copies: what a prefix cache may keep of it; None without one.
      lengths: [P] int32 of the rows: something to wait for.
      routing: decisions for its tokens, where they are kept.
      scores: of its tokens.
    """

    copies: PageCopies | None
    lengths: Array
    routing: Routing | None
    scores: PromptScores


class StepInputs(NamedTuple):
    """What the host says about a step. On the host, numpy arrays.

    Attributes:
      tokens: [B] int32: a prompt token; -1 for the row's newest one and its drafts; -2 for the newest one alone; -3 to
        leave the row alone.
      unless: [B] int32: the row is left alone if its newest token is this one.
      forced: [B] int32: the token to generate; -1 if it is to be sampled.
      wants_alternatives: [] bool: whether anyone asks for the most probable tokens.
    """

    tokens: Array
    unless: Array
    forced: Array
    wants_alternatives: Array


class Programs:
    """The programs of one engine.

    Args:
      model: what it runs.
      cache: the shapes of its cache, which is paged.
      drafter: what guesses tokens.
      chunk: prompt tokens that it reads at once.
      pager: what copies pages to and from a prefix cache; None without one.
      place: where it runs.
      verify_all: whether every step verifies all drafts, whatever they are worth.
      kept: decisions that are returned for each token that is read.

    Attributes:
      count: programs compiled so far.
      widths: tokens of a row that steps may feed; see `verification_width`.
      all_allowed: [B, ceil(V / 32)] uint32 masks that allow every token.
      prefill: as `_prefill`, jitted, and likewise `step` and `copy`; after `compile`.
    """

    prefill: Callable[..., tuple[State, PrefillOutput]]
    step: Callable[..., tuple[State, Array, StepOutput]]
    copy: Callable[..., State]

    def __init__(
        self,
        model: Transformer,
        cache: Cache,
        *,
        drafter: Drafter,
        chunk: int,
        pager: Pager | None,
        place: Place,
        verify_all: bool = False,
        kept: Kept = "none",
    ) -> None:
        self._kept = kept
        self._model, self._cache = model, cache
        self._drafter, self._chunk, self._pager, self._place = drafter, chunk, pager, place
        self._slots = cache.lengths.shape[0]
        self.count = 0
        self.widths = step_widths(drafter.depth, self._slots, drafter.confident and not verify_all)
        self.all_allowed = np.full((self._slots, -(-model.config.vocab_size // 32)), ALL)

    def compile(self, params: Any) -> None:
        """Compiles the programs for such parameters."""
        place, slots, readers = self._place, self._slots, self._place.row_shards

        def integers(*shape: int) -> Any:  # shapes, where the programs' inputs are arrays
            return place.shape(shape, jnp.int32)

        confidence = place.shape((slots, self._drafter.depth), jnp.float32) if self._drafter.confident else None
        state = State(self._cache, place.shapes(self._empty_history), confidence)  # type: ignore[arg-type]
        places = None if place.mesh is None else jax.tree.map(lambda x: x.sharding, state)
        whole = place.replicated
        options = compiler_options("decoding", place.platform)
        of_prefill = compiler_options("prefill", place.platform)
        # They run what is compiled here. Called as compiled objects, they would refuse 4-bit weights that several
        # processes share: jax 0.10 misreads those arrays' layout.
        step = jax.jit(
            self._step, donate_argnums=(1, 2), out_shardings=(places, whole, whole), compiler_options=options
        )
        prefill = jax.jit(self._prefill, donate_argnums=1, out_shardings=(places, whole), compiler_options=of_prefill)
        copy = jax.jit(self._copy, donate_argnums=0, out_shardings=places)
        self.step, self.prefill, self.copy = step, prefill, copy

        next_tokens = integers(slots, 1 + self._drafter.depth)
        row = integers(slots)
        flag: Any = place.shape((), bool)
        inputs = StepInputs(row, row, row, flag)
        sampling = place.shapes(lambda: SamplingBatch.of([GREEDY] * slots))
        allowed = place.shapes(lambda: self.all_allowed)
        seconds = place.shape((len(self.widths),), jnp.float32)
        step.lower(params, state, next_tokens, inputs, sampling, allowed, seconds).compile()
        self.count += 1
        tokens, reader = integers(readers, self._chunk + 1), integers(readers)
        chunk = PrefillInputs(tokens, reader, reader, reader, reader, flag)
        prefill.lower(params, state, chunk).compile()
        self.count += 1
        if slots > 1:
            number = integers()
            copy.lower(state, number, number, number, number).compile()
            self.count += 1
        if self._pager is not None:
            self.count += self._pager.compile(state, places)

    def begin(self, cache: Cache) -> tuple[State, Array]:
        """What the slots hold before any request: with an empty cache, and each row's newest token and its drafts."""
        next_tokens = np.zeros((self._slots, 1 + self._drafter.depth), np.int32)
        confidence = np.zeros((self._slots, self._drafter.depth), np.float32) if self._drafter.confident else None
        history, confidence = self._place.put((self._empty_history(), confidence))
        return State(cache, history, confidence), self._place.put(next_tokens)

    def _empty_history(self) -> History:
        return History.empty(self._slots, self._model.config.vocab_size)

    def _apply(self, params: Any) -> Apply:
        def apply(*arguments: Any, **options: Any) -> Any:
            return self._model.apply({"params": params}, *arguments, **options)

        return apply

    def _decisions(self, output: Output) -> Routing | None:
        """Those of a call that are kept."""
        if self._kept == "none" or output.routing is None:
            return None
        return output.routing if self._kept == "all" else output.routing.replace(entries=None)

    def _prefill(self, params: Any, state: State, inputs: PrefillInputs) -> tuple[State, PrefillOutput]:
        """Reads a chunk of prompts."""
        apply, drafter, tokens = self._apply(params), self._drafter, inputs.tokens[:, :-1]
        rows = state.cache.take_rows(inputs.slots).replace(lengths=inputs.begin)
        rows = drafter.at(rows, inputs.begin)
        sealed: dict[str, Array] = {}
        if self._pager is not None:
            rows, sealed = self._pager.widened(rows), {"sealed": inputs.sealed}
        with jax.named_scope("engine.prefill"):
            options = {"logits": "none", "return_routing": self._kept != "none", **sealed, **drafter.trunk_options}
            output = apply(tokens, lengths=inputs.counts, cache=rows, **options)
        assert output.cache is not None
        with jax.named_scope("engine.draft"):
            rows = drafter.prefill(apply, output, inputs.tokens, inputs.counts, output.cache)
        copies = None
        if self._pager is not None:
            with jax.named_scope("engine.save_pages"):
                rows, copies = self._pager.copy_chunk(rows, inputs.begin)
        with jax.named_scope("engine.score"):
            scores = self._scores(apply, output.streams, inputs)
        with jax.named_scope("engine.history"):
            history = state.history.read(inputs.slots, tokens, inputs.counts, inputs.begin)
        state = state._replace(cache=state.cache.put_rows(inputs.slots, rows), history=history)
        return state, PrefillOutput(copies, rows.lengths, self._decisions(output), scores)

    def _scores(self, apply: Apply, streams: Array, inputs: PrefillInputs) -> PromptScores:
        """How probable the tokens after those of a chunk are, from its streams, if anyone asks."""
        most = min(MOST_ALTERNATIVES, self._model.config.vocab_size)

        def scored() -> PromptScores:
            logprobs = apply(streams, inputs.tokens[:, 1:], method="log_probabilities")
            ids, best = apply(streams, most, method="top_scores")
            return self._place.keep(PromptScores(logprobs, (ids, best[..., :most])))

        shapes = jax.eval_shape(scored)
        return jax.lax.cond(inputs.scored, scored, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

    def _step(
        self,
        params: Any,
        state: State,
        next_tokens: Array,
        inputs: StepInputs,
        sampling: SamplingBatch,
        allowed: Array,
        seconds: Array,
    ) -> tuple[State, Array, StepOutput]:
        """A token further, or several, for rows that are not left alone.

        Args:
          params: the model's.
          state: what the slots hold.
          next_tokens: [B, 1 + depth] int32 each row's newest token and its drafts.
          inputs: what the host says.
          sampling: how each row is sampled.
          allowed: [B, ceil(V / 32)] uint32 masks of tokens that rows may get; see `sampling.sample`.
          seconds: [widths] float32 what a step of each of `widths` takes.

        Returns:
          The state, each row's next tokens, and what was sampled.
        """
        apply, drafter = self._apply(params), self._drafter
        prompt, newest = inputs.tokens >= 0, next_tokens[:, 0]
        going = prompt | ((inputs.tokens != AT_REST) & (newest != inputs.unless))
        tokens = next_tokens.at[:, 0].set(jnp.where(prompt, inputs.tokens, newest))
        offered = jnp.where(inputs.tokens == DRAFTED, drafter.depth, 0)
        before = self._place.keep(state.cache.lengths)
        with jax.named_scope("engine.history"):
            history = state.history.prompt(inputs.tokens, prompt)
        how = SamplingInputs(sampling, allowed, inputs.forced, inputs.wants_alternatives)

        def advance(width: int) -> Callable[..., tuple[Output, StepOutput, History]]:
            """A step that feeds `width` tokens of each row at most."""

            def run(cache: Cache, history: History) -> tuple[Output, StepOutput, History]:
                fed = jnp.minimum(offered, width - 1)
                with jax.named_scope("engine.trunk"):
                    lengths = jnp.where(going, 1 + fed, 0)
                    options = {"logits": "all", "return_routing": self._kept != "none", **drafter.trunk_options}
                    output = apply(tokens[:, :width], lengths=lengths, cache=cache, **options)
                with jax.named_scope("engine.verify"):
                    logits = self._place.keep(output.logits)
                    step, history = verify(logits, tokens[:, :width], going, fed, how, before, history)
                widen = functools.partial(_widened, width=1 + drafter.depth)
                streams, taps = jax.tree.map(widen, (output.streams, output.taps))
                wide = step._replace(ids=widen(step.ids), logprobs=widen(step.logprobs))
                wide = wide._replace(alternatives=jax.tree.map(widen, step.alternatives))
                wide = wide._replace(routing=self._decisions(output))
                output = output.replace(logits=None, streams=streams, taps=taps, routing=None, statistics=None)
                return output, wide, history

            return run

        if len(self.widths) == 1:
            output, step, history = advance(self.widths[0])(state.cache, history)
        else:
            assert state.confidence is not None
            everyone = self._place.keep((state.confidence, going, offered))
            chosen = best_width(expected_tokens(*everyone, self.widths), seconds, everyone[1])
            shapes = jax.eval_shape(advance(self.widths[0]), state.cache, history)
            output, step, _ = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            carry = output.replace(cache=state.cache), step, history
            for number, width in enumerate(self.widths):

                def run(carry: Any, width: int = width) -> Any:
                    return advance(width)(carry[0].cache, carry[2])

                carry = _once(chosen == number, run, carry)
            output, step, history = carry
        assert output.cache is not None
        cache = output.cache.rolled_back(lengths=before + step.counts)
        last = jnp.take_along_axis(step.ids, jnp.maximum(step.counts - 1, 0)[:, None], axis=1)
        with jax.named_scope("engine.draft"):
            drafts, cache = drafter.draft(apply, output, step, sampling, cache, self._place)
        following = jnp.concatenate([last, drafts.ids], axis=1)
        confidence = state.confidence
        if confidence is not None:
            assert drafts.confidence is not None
            confidence = jnp.where(going[:, None], drafts.confidence, confidence)
        return State(cache, history, confidence), jnp.where(going[:, None], following, next_tokens), step

    def measure(self, params: Any, state: State, next_tokens: Array, allowed: Array) -> tuple[State, Array, Array]:
        """What a step of each width takes, with all rows taking part; there must be several widths.

        Args:
          params: the model's.
          state: of slots that nobody uses; their rows are of no use to anybody afterwards either.
          next_tokens: [B, 1 + depth] int32.
          allowed: masks that allow every token.

        Returns:
          State and next tokens after it, and [widths] float32 seconds, the same in all processes.
        """
        place, slots = self._place, self._slots
        row = np.full(slots, NO_TOKEN, np.int32)
        host: Any = StepInputs(np.full(slots, DRAFTED, np.int32), row, row, np.bool_(False))  # type: ignore[arg-type]
        inputs, sampling = place.put((host, SamplingBatch.of([GREEDY] * slots)))
        found = np.zeros(len(self.widths), np.float32)
        for number in range(len(self.widths)):
            only = np.where(np.arange(len(self.widths)) == number, 1, 1e30).astype(np.float32)  # the others never pay
            seconds, times = place.put(only), []
            for _ in range(1 + MEASURED):
                started = time.perf_counter()
                state, next_tokens, output = self.step(params, state, next_tokens, inputs, sampling, allowed, seconds)
                jax.block_until_ready(output)
                times.append(time.perf_counter() - started)
            found[number] = min(times[1:])
        if jax.process_count() > 1:
            found = np.asarray(multihost_utils.broadcast_one_to_all(found))
        return state, next_tokens, place.put(found)

    @jax.named_scope("engine.copy")
    def _copy(self, state: State, source: Array, target: Array, first: Array, count: Array) -> State:
        """Copies slot `source` to slot `target`, and of its pages `count`, 0 or 1, from number `first` on."""
        cache = state.cache.put_rows(target[None], state.cache.take_rows(source[None]))
        units = self._place.page // PAGE  # of a page on this mesh
        index = entry_numbers(first * units, units, page_sizes(cache), count * units)
        of_source = {role: numbers[None] for role, numbers in index.items()}
        pages = take(cache, "entries", source[None], of_source, self._place)
        page = {role: tuple(array[:, 0] for array in arrays) for role, arrays in pages.items()}
        cache = put(cache, "entries", target, index, page, self._place)
        return state._replace(cache=cache, history=state.history.copy(source[None], target[None]))


def _once(condition: Array, run: Callable[[Any], Any], carry: Any) -> Any:
    """`run(carry)` if the condition holds, else the carry. As a loop of one turn or none, which updates the cache in
    place: through a conditional, the TPU compiler would copy it."""

    def turn(state: tuple[Array, Any]) -> tuple[Array, Any]:
        return jnp.zeros_like(condition), run(state[1])

    return jax.lax.while_loop(lambda state: state[0], turn, (condition, carry))[1]


def _widened(x: Array, width: int) -> Array:
    """[B, n, ...] with zeros up to [B, width, ...]."""
    return jnp.pad(x, [(0, 0), (0, width - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
