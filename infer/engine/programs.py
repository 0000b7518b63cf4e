"""The engine's programs: what the devices do for all slots, compiled once; and what they keep between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from v4_jax.cache.cache import Cache
from v4_jax.cache.entries import PAGE
from v4_jax.cache.pages import entries_of, page_sizes, put, take
from v4_jax.infer.engine import speculative
from v4_jax.infer.engine.history import History
from v4_jax.infer.engine.sampling import ALL, GREEDY, SamplingRows
from v4_jax.infer.engine.speculative import Taken
from v4_jax.infer.prefix_cache.pager import Kept, Pager
from v4_jax.kernels.compiler_options import compiler_options
from v4_jax.placement import Place
from v4_jax.transformer import Transformer

# In place of a prompt token to feed: the row's newest one and its drafts; the newest one alone; none.
DRAFTED, NEWEST, AT_REST = -1, -2, -3


class State(NamedTuple):
    """What the slots hold: the cache, and the tokens that penalties look at."""

    cache: Cache
    history: History


class Given(NamedTuple):
    """What the host says about a step.

    Attributes:
      feed: [B] int32: a prompt token; -1 for the row's newest one and its drafts; -2 for the newest one alone; -3 to
        leave the row alone.
      unless: [B] int32: the row is left alone if its newest token is this one.
      forced: [B] int32: the token to generate; -1 if it is to be sampled.
      best: [] bool: whether anyone asks for the most probable tokens.
    """

    feed: Any
    unless: Any
    forced: Any
    best: Any


class Programs:
    """The programs of one engine.

    Args:
      model: what it runs.
      cache: the shapes of its cache, which is paged.
      draft: tokens that it drafts.
      chunk: prompt tokens that it reads at once.
      pager: what copies pages to and from a prefix cache; None without one.
      place: where it runs.

    Attributes:
      count: programs compiled so far.
      everything: [B, ceil(V / 32)] uint32 masks that allow every token.
      step: as `_step`, jitted, and likewise `read` and `copy`; after `compile`.
    """

    def __init__(
        self,
        model: Transformer,
        cache: Cache,
        *,
        draft: int,
        chunk: int,
        pager: Pager | None,
        place: Place,
    ) -> None:
        self._model, self._cache = model, cache
        self._draft, self._chunk, self._pager, self._place = draft, chunk, pager, place
        self._slots = cache.lengths.shape[0]
        self.count = 0
        self.everything = np.full((self._slots, -(-model.config.vocab_size // 32)), ALL)

    def compile(self, params: Any) -> None:
        """Compiles the programs for such parameters."""
        place, slots, readers = self._place, self._slots, self._place.row_shards

        def integers(*shape: int) -> jax.ShapeDtypeStruct:
            return place.shape(shape, jnp.int32)

        state = State(self._cache, place.shapes(self._nothing_seen))
        places = None if place.mesh is None else jax.tree.map(lambda x: x.sharding, state)
        ahead, whole = integers(slots, 1 + self._draft), place.replicated
        given = Given(integers(slots), integers(slots), integers(slots), place.shape((), bool))
        rows = place.shapes(lambda: SamplingRows.of([GREEDY] * slots))
        options = compiler_options("engine", place.platform)
        # They run what is compiled here. Called as compiled objects, they would refuse 4-bit weights that several
        # processes share: jax 0.10 misreads those arrays' layout.
        self.step = jax.jit(
            self._step, donate_argnums=(1, 2), out_shardings=(places, whole, whole), compiler_options=options
        )
        self.read = jax.jit(self._read, donate_argnums=1, out_shardings=(places, whole, whole))
        self.copy = jax.jit(self._copy, donate_argnums=0, out_shardings=places)
        chunks = [integers(readers, self._chunk + 1), *[integers(readers)] * 4]
        needed: list[tuple[Any, tuple[Any, ...]]] = [
            (self.step, (params, state, ahead, given, rows, place.shapes(lambda: self.everything))),
            (self.read, (params, state, *chunks)),
        ]
        if slots > 1:
            needed.append((self.copy, (state, *[integers()] * 4)))
        for program, arguments in needed:
            program.lower(*arguments).compile()
            self.count += 1
        if self._pager is not None:
            self.count += self._pager.compile(state, places)

    def begin(self, cache: Cache) -> tuple[State, Array]:
        """What the slots hold before any request: with an empty cache, and each row's newest token and its drafts."""
        ahead = np.zeros((self._slots, 1 + self._draft), np.int32)
        return State(cache, self._place.put(self._nothing_seen())), self._place.put(ahead)

    def _nothing_seen(self) -> History:
        return History.empty(self._slots, self._model.config.vocab_size)

    def _step(
        self, params: Any, state: State, ahead: Array, given: Given, rows: SamplingRows, allowed: Array
    ) -> tuple[State, Array, Taken]:
        """A token further, or several, for rows that are not left alone.

        Returns the state, each row's newest token and its drafts [B, 1 + draft], and what was sampled.
        """
        prompt, newest = given.feed >= 0, ahead[:, 0]
        going = prompt | ((given.feed != AT_REST) & (newest != given.unless))
        fed = ahead.at[:, 0].set(jnp.where(prompt, given.feed, newest))
        offered = jnp.where(given.feed == DRAFTED, self._draft, 0)
        before = state.cache.lengths
        output: Any = self._model.apply(
            {"params": params},
            fed,
            lengths=jnp.where(going, 1 + offered, 0),
            cache=state.cache,
            logits="all",
        )
        choose = speculative.Choice(rows, allowed, given.forced, given.best)
        history = state.history.prompt(given.feed, prompt)
        logits, before = self._place.keep((output.logits, before))
        taken, history = speculative.verify(logits, fed, going, offered, choose, before, history)
        cache = output.cache.rolled_back(lengths=before + taken.counts)
        last = jnp.take_along_axis(taken.ids, jnp.maximum(taken.counts - 1, 0)[:, None], axis=1)
        if self._draft:

            def block(*arguments: Any, **options: Any) -> Any:
                return self._model.apply({"params": params}, *arguments, logits="last", method="mtp", **options)

            arguments = output.streams, taken.ids, taken.counts, rows, cache, self._place.keep
            drafts, cache = speculative.draft(block, *arguments)
            last = jnp.concatenate([last, drafts], axis=1)
        return State(cache, history), jnp.where(going[:, None], last, ahead), taken

    def _read(
        self, params: Any, state: State, tokens: Array, counts: Array, slots: Array, begin: Array, sealed: Array
    ) -> tuple[State, Kept | None, Array]:
        """Reads `counts` [P] of `tokens` [P, C + 1] into `slots` [P], which hold `begin` [P] tokens; slot B is nowhere.

        One more token is known than is read: the multi-token-prediction block reads it with the one before. Of `sealed`
        [P] tokens the entries are there already. Returns also what a prefix cache may keep, and something to wait for.
        """
        part = state.cache.take_rows(slots).replace(lengths=begin, draft_lengths=begin)
        arguments: dict[str, Any] = dict(lengths=counts, logits="none")
        found: dict[str, Any] = {}
        if self._pager is not None:
            part, found = self._pager.widened(part), {"sealed": sealed}
        output: Any = self._model.apply({"params": params}, tokens[:, :-1], cache=part, **arguments, **found)
        if self._draft:
            arguments |= dict(cache=output.cache, method="mtp")
            output = self._model.apply({"params": params}, output.streams, tokens[:, 1:], **arguments)
        part, kept = output.cache, None
        if self._pager is not None:
            part, kept = self._pager.read(part, begin)
        history = state.history.read(slots, tokens[:, :-1], counts, begin)
        return State(state.cache.put_rows(slots, part), history), kept, part.lengths

    def _copy(self, state: State, source: Array, target: Array, first: Array, count: Array) -> State:
        """Copies row `source` to row `target`, and of its pages `count`, 0 or 1, from number `first` on."""
        cache = state.cache.put_rows(target[None], state.cache.take_rows(source[None]))
        each = self._place.page // PAGE
        index = entries_of(first * each, each, page_sizes(cache), count * each)
        page = take(
            cache, "entries", source[None], {role: numbers[None] for role, numbers in index.items()}, self._place
        )
        one = {role: tuple(array[:, 0] for array in arrays) for role, arrays in page.items()}
        return State(
            put(cache, "entries", target, index, one, self._place), state.history.copy(source[None], target[None])
        )
