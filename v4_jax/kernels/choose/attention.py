"""Attention over windows and entries, and how it ends."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from v4_jax.cache.entries import Entries
from v4_jax.cache.ring import Ring
from v4_jax.cache.rows import StoredRows
from v4_jax.kernels.attention import cpu as attention_cpu
from v4_jax.kernels.attention import gradients as attention_gradients
from v4_jax.kernels.attention import reference as attention
from v4_jax.kernels.attention import tpu as attention_tpu
from v4_jax.kernels.choose.forms import Form, pull, with_gradients, without_gradients
from v4_jax.kernels.csa import gradients as csa_gradients
from v4_jax.kernels.csa import hidden as csa_hidden
from v4_jax.kernels.csa import tpu as csa_tpu
from v4_jax.kernels.indexer.marks import Marks, numbers_of
from v4_jax.kernels.indexer_loss import picked as picked_loss
from v4_jax.kernels.indexer_loss import tpu as indexer_loss_tpu
from v4_jax.kernels.indexer_loss.tpu import Operands
from v4_jax.kernels.output import few as output_few
from v4_jax.kernels.output import gradients as output_gradients
from v4_jax.kernels.output import tpu as output_tpu
from v4_jax.kernels.picked_rows import as_words
from v4_jax.kernels.rotary import tpu as rotary_tpu
from v4_jax.kernels.window import tpu as window_tpu
from v4_jax.layer_stack import Cut, uncut
from v4_jax.layers.partials import Packed, Partial, packed, shape_of
from v4_jax.layers.rotary import Turn
from v4_jax.layers.stages import keep
from v4_jax.layers.visible import Visible
from v4_jax.layout import Layout
from v4_jax.number_formats import Weight
from v4_jax.sharding.platform import by_platform, interpreting


def products(queries: Array, keys: Array) -> Array:
    """See `attention.reference.products`."""
    if not attention_cpu.helps(queries, keys):
        return attention.products(queries, keys)
    return with_gradients(attention.products, cpu=attention_cpu.products_gradients)(queries, keys)


def weighted(shares: Array, keys: Array) -> Array:
    """See `attention.reference.weighted`."""
    if not attention_cpu.helps(shares, keys):
        return attention.weighted(shares, keys)
    return with_gradients(attention.weighted, cpu=attention_cpu.weighted_gradients)(shares, keys)


def window_attention(
    plain: Form,
    queries: Array,
    keys: Array | None,
    oldest: Array | None,
    entries: Entries | None,
    visible: Visible | None,
    together: bool = False,
    picked: Array | Marks | None = None,
    cached: bool = False,
) -> Partial | Packed:
    """See `attention.tpu.window_attention` for all arguments but the first and the last.

    Args:
      plain: the same, in whose place the kernel runs in programs for TPUs. It has gradients where keys and entries live
        in no cache, and those that are asked for beyond are the plain form's.
      queries: [B, Q, H, C].
      keys: of the window.
      oldest: where each query's window may begin.
      entries: the entries.
      visible: which of them the queries see.
      together: whether to return one `Packed` softmax.
      picked: [B, Q, K] int32 those of the entries that are attended, -1 for none, or marks of them, where
        `attends_in_training`. None: all that are visible.
      cached: whether the window's keys live in a cache.
    """
    if picked is not None or (attends_in_training(queries, keys, entries) and not together and not cached):
        operands = (queries, keys, oldest, entries, visible, picked)
        return by_platform(*operands, default=_rounded(plain), tpu=_attend_in_training)
    if not attention_tpu.supports(queries):
        return _handed_on(plain, together)(queries, keys, oldest, entries, visible)
    kernel = functools.partial(attention_tpu.window_attention, together=together, interpret=interpreting())
    return without_gradients(_handed_on(plain, together), tpu=kernel)(queries, keys, oldest, entries, visible)


def attends_in_training(queries: Any, keys: Any, entries: Entries | None) -> bool:
    """Whether `window_attention` has kernels for the gradients, too, in programs for TPUs, of arrays or shapes."""
    if entries is None:
        return attention_gradients.supports(queries, keys, None)
    return not entries.cached and attention_gradients.supports(queries, keys, _held(entries))


def trained_by_kernels(queries: Any, keys: Any, entries: Entries | None, picks: bool) -> bool:
    """Whether all that a layer attends in training has kernels for the gradients in programs for TPUs: window and
    entries at once, or each for itself where queries pick entries.
    """
    if attends_in_training(queries, keys, entries):
        return True
    apart = picks and entries is not None and _picks_in_training(queries, entries)
    return apart and attends_in_training(queries, keys, None)


def _picks_in_training(queries: Any, entries: Entries) -> bool:
    return not entries.cached and csa_gradients.supports(queries)


def _attend_in_training(
    queries: Array,
    keys: Array | None,
    oldest: Array | None,
    entries: Entries | None,
    visible: Visible | None,
    picked: Array | Marks | None,
) -> Partial:
    """The kernel, whose gradients are a kernel's."""
    interpret, dtype = interpreting(), None if entries is None else entries.dtype

    def run(queries: Array, keys: Array | None, held: Array | None, *numbers: Any) -> Partial:
        oldest, visible, hidden = numbers
        entries = None if held is None else Entries.uncached(held.astype(dtype))
        operands = (queries, keys, oldest, entries, visible, hidden)
        found = attention_tpu.window_attention(*operands, rounded=True, interpret=interpret)
        assert isinstance(found, Partial)
        return found

    def forward(*operands: Any) -> tuple[Partial, Any]:
        found = run(*operands)
        return found, (operands, found.maximum)

    def backward(residuals: Any, gradient: Partial) -> Any:
        (queries, keys, held, oldest, visible, hidden), maximum = residuals
        of_sums = gradient.total, gradient.weighted
        found = attention_gradients.gradients(
            queries, keys, oldest, held, visible, maximum, *of_sums, hidden, interpret=interpret
        )
        return *found, None, None, None

    call = jax.custom_vjp(run)
    call.defvjp(forward, backward)
    held = None if entries is None else _held(entries)
    hidden = None if picked is None or held is None else csa_hidden.hide(picked, held.shape[1], interpret=interpret)
    return call(queries, keys, held, oldest, visible, hidden)


def indexer_loss(plain: Form, operands: Operands, visible: Visible, picked: Array | Marks | None) -> Array:
    """How far the indexer's scores are from the attention that entries get, [B, Q] float32.

    Args:
      plain: the same of all other arguments, in whose place kernels run in programs for TPUs, both ways, where the
        entries live in no cache.
      operands: what is compared, entries and index keys as `Entries`. Attention's have no gradients.
      visible: which entries the queries see.
      picked: [B, Q, K] int32 those that are compared, -1 for none, or marks of them; None: all that are visible.
    """
    if operands.entries.cached or operands.index_keys.cached:
        return plain(operands, visible, picked)
    if indexer_loss_tpu.supports(_as_arrays(operands)):
        return by_platform(operands, visible, picked, default=plain, tpu=_loss_of_all)
    if picked is not None and picked_loss.supports(operands):
        return by_platform(operands, visible, numbers_of(picked), default=plain, tpu=_loss_of_picked)
    return plain(operands, visible, picked)


def _loss_of_all(operands: Operands, visible: Visible, picked: Array | Marks | None) -> Array:
    """The kernels for entries that VMEM has room for, of which all others but those picked are hidden."""
    interpret, operands = interpreting(), _as_arrays(operands)
    hidden = None if picked is None else csa_hidden.hide(picked, operands.entries.shape[1], interpret=interpret)

    def loss(trained: tuple[Array, ...], *rest: Any) -> tuple[Array, Any]:
        fixed, *seen = rest
        found, numbers = indexer_loss_tpu.loss(Operands(*fixed, *trained), *seen, interpret=interpret)
        return found, (trained, rest, keep(numbers, "picked"))

    def gradients(residuals: Any, gradient: Array) -> Any:
        trained, (fixed, *seen), numbers = residuals
        compared = Operands(*fixed, *trained)
        return indexer_loss_tpu.gradients(compared, *seen, numbers, gradient, interpret=interpret), None, None, None

    call = jax.custom_vjp(lambda *given: loss(*given)[0])
    call.defvjp(loss, gradients)
    return call(operands[3:], jax.lax.stop_gradient(operands[:3]), visible, hidden)


def _loss_of_picked(operands: Operands, _: Visible, picked: Array) -> Array:
    """The kernels that fetch what is compared."""
    interpret, operands = interpreting(), _as_arrays(operands)

    def loss(trained: tuple[Array, ...], fixed: tuple[Array, ...], picked: Array) -> tuple[Array, Any]:
        found, slopes = picked_loss.loss(Operands(*fixed, *trained), picked, interpret=interpret)
        return found, (trained, picked, keep(slopes, "picked"))

    def gradients(residuals: Any, gradient: Array) -> Any:
        trained, picked, slopes = residuals
        return picked_loss.gradients(*trained, picked, slopes * gradient[..., None], interpret=interpret), None, None

    call = jax.custom_vjp(lambda *given: loss(*given)[0])
    call.defvjp(loss, gradients)
    return call(operands[3:], jax.lax.stop_gradient(operands[:3]), picked)


def _as_arrays(operands: Operands) -> Operands:
    return operands._replace(entries=_held(operands.entries), index_keys=_held(operands.index_keys))


def _held(entries: Entries) -> Array:
    """[B, E, C] float32 of entries that live in no cache."""
    return entries.rows.arrays[0][0]


def window_step(
    plain: Form, queries: Array, keys: Array, ring: Ring, layout: Layout, past: int
) -> tuple[Partial | Packed, StoredRows]:
    """See `layers.window_attention.attend_ring` for all arguments but the first. It has no gradients.

    Args:
      plain: the same, in whose place the kernel runs in programs for TPUs.
      queries: [B, Q, H, C].
      keys: [B, Q, C].
      ring: earlier keys.
      layout: of the chunk.
      past: tokens before its own that a query sees.
    """
    if not window_tpu.supports(queries, ring):
        partial, rows = plain(queries, keys, ring, layout, past)
        return partial, rows

    def default(queries: Array, keys: Array, ring: Ring, layout: Layout) -> tuple[Packed, StoredRows]:
        partial, rows = plain(queries, keys, ring, layout, past)
        return Packed(packed(partial)[None]), rows

    kernel = functools.partial(window_tpu.step, past=past, interpret=interpreting())
    return by_platform(queries, keys, ring, layout, default=default, tpu=kernel)


def attend_picked(
    plain: Form, queries: Array, entries: Entries, local: Array, filled: Array | None = None, together: bool = False
) -> Partial | Packed:
    """Attention of each query over its own entries.

    Args:
      plain: has the results of `csa.tpu.attend_picked`, which takes its place in programs for TPUs, and has gradients
        there where entries live in no cache; those that are asked for beyond are the plain form's.
      queries: [B, Q, H, C].
      entries: the entries.
      local: [B, Q, K] int32 local numbers of those to attend, -1 for none.
      filled: [B, Q] int32 how many are not -1, where those come first; None: -1 may be anywhere.
      together: whether to return one `Packed` softmax.
    """
    operands = queries, entries, local, filled
    if _picks_in_training(queries, entries) and not together:
        return by_platform(*operands, default=_rounded(plain), tpu=_pick_in_training)
    copying = _handed_on(plain, together)
    if not csa_tpu.supports(queries, entries):
        return copying(*operands)
    kernel = functools.partial(csa_tpu.attend_picked, together=together, interpret=interpreting())
    return without_gradients(copying, tpu=kernel)(*operands)


def _pick_in_training(queries: Array, entries: Entries, local: Array, filled: Array | None) -> Partial:
    """The kernel, whose gradients are a kernel's."""
    interpret, held, dtype = interpreting(), _held(entries), entries.dtype

    def attend(queries: Array, held: Array, local: Array, filled: Array | None) -> tuple[Partial, Any]:
        words = as_words(held, interpret=interpret)
        rows = StoredRows((words[None],), kind="words", channels=held.shape[2])
        entries = Entries(rows, 0, dtype)
        found = csa_tpu.attend_picked(queries, entries, local, filled, rounded=True, interpret=interpret)
        assert isinstance(found, Partial)
        return found, (queries, words, local, found.maximum)

    def gradients(residuals: Any, gradient: Partial) -> Any:
        queries, words, local, maximum = residuals
        found = csa_gradients.gradients(queries, words, local, maximum, gradient, interpret=interpret)
        return *found, None, None

    call = jax.custom_vjp(lambda *given: attend(*given)[0])
    call.defvjp(attend, gradients)
    return call(queries, held, local, filled)


def attention_output(plain: Form, partials: Sequence[Any], sink: Array, turn: Turn, dtype: Any) -> Array:
    """See `layers.window_attention.attention_output` for all arguments but the first.

    Args:
      plain: the same, in whose place kernels run in programs for TPUs, and give the gradients of partials that are not
        packed.
      partials: of disjoint sets of keys.
      sink: logits of the sink.
      turn: of the queries' positions, to which no gradient flows, nor to the partials' maxima.
      dtype: of the result.
    """
    if not rotary_tpu.supports(shape_of(partials[0]), jnp.dtype(dtype), turn):
        return plain(partials, uncut(sink), turn, dtype)
    kernel = functools.partial(output_tpu.attention_output, dtype=dtype, interpret=interpreting())
    if isinstance(sink, Cut) or not all(isinstance(some, Partial) for some in partials):
        return without_gradients(functools.partial(plain, dtype=dtype), tpu=kernel)(list(partials), sink, turn)

    def default(partials: Sequence[Partial], sink: Array, turn: Turn) -> Array:
        still = [some._replace(maximum=jax.lax.stop_gradient(some.maximum)) for some in partials]
        return plain(still, sink, jax.lax.stop_gradient(turn), dtype)

    def gradients(operands: Any, gradient: Array) -> Any:
        partials, sink, turn = operands
        found = output_gradients.gradients(partials, sink, turn, gradient, interpret=interpreting())
        return *found, jax.tree.map(jnp.zeros_like, turn)

    call = functools.partial(by_platform, default=default, tpu=kernel)
    return with_gradients(call, default=pull(default), tpu=gradients)(list(partials), sink, turn)


def attention_end(
    plain: Form,
    partials: Sequence[Partial | Packed],
    sink: Array,
    turn: Turn,
    weights: Sequence[Weight],
    *,
    groups: int,
    dtype: Any,
) -> Array:
    """See `layers.window_attention.attention_end` for all arguments but the first.

    Args:
      plain: the same of the arrays, in whose place the kernel runs in programs for TPUs where rows are few, but where
        gradients are asked for.
      partials: of disjoint sets of keys.
      sink: logits of the sink.
      turn: of the queries' positions.
      weights: of both products.
      groups: matrices in the first of them.
      dtype: of the result.
    """
    operands = (list(partials), sink, turn, list(weights))
    if not output_few.supports(partials, turn, weights, groups, dtype):
        return plain(*operands)
    kernel = functools.partial(output_few.attention_end, groups=groups, dtype=dtype, interpret=interpreting())
    return without_gradients(plain, tpu=kernel)(*operands)


def _handed_on(plain: Form, together: bool) -> Form:
    """The form, whose partial softmax is `packed`, or its parts one by one."""

    def call(*operands: Any) -> Any:
        partial = Partial(*plain(*operands))
        return Packed(packed(partial)[None]) if together else partial

    return call


def _rounded(plain: Form) -> Form:
    """The form, whose sums are rounded to the dtype of the queries, its first operand."""

    def call(queries: Array, *operands: Any) -> Partial:
        partial = Partial(*plain(queries, *operands))
        return partial._replace(weighted=partial.weighted.astype(queries.dtype))

    return call
