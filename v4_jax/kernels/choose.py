"""Which form of an inner loop runs: by the platform that the program is compiled for, not by the process's own.

Each has a `reference.py`, which defines its numbers, beside forms of the same signature for one platform: `tpu.py`, a
Pallas kernel, or `cpu.py`, written so that XLA:CPU makes quick code of it. Layers call the functions here.

    function                 reference                      cpu                                       tpu
    products, weighted       einsum                         keys' gradients as sums, of few heads     reference
    window_attention         caller's, part by part         reference                                 kernels both ways
    window_step              caller's, read in order        reference                                 one kernel
    index_scores             einsum                         head by head                              reference
    enter_site, leave_site,  formulas of the report         reference                                 one kernel
    cross_sites
    matmul                   einsum                         weights' gradients with a second axis     one row as two
    products_with,           products with `dequantise`     reference                                 kernel, of E4M3
    grouped_product
    partial_products         the same, one by one           reference                                 one kernel
    best_entries             running top-k over blocks      reference                                 kernel
    attend_picked            caller's, over a gathered copy reference                                 kernel
    compress                 caller's, all rows at once     reference                                 row by row
    norm_rotate              one after the other            reference                                 a kernel both ways
    settle                   norm_rotate one by one         reference                                 one kernel
    attention_output         caller's                       reference                                 a kernel both ways
    attention_end            the same, and products         reference                                 one kernel
    map_groups               tiles of each group in turn    reference                                 caller's kernel
    few_rows_experts,        caller's, by groups of rows    reference                                 one kernel
    expert_of_all            caller's, by products          reference                                 the same
    many_rows_experts        caller's, by `map_groups`      reference                                 kernels both ways
    best_experts             top-k, and gather              reference                                 kernel
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
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
from v4_jax.kernels.compressor import tpu as compressor_tpu
from v4_jax.kernels.compressor.tpu import CompressorWeights
from v4_jax.kernels.csa import hidden as csa_hidden
from v4_jax.kernels.csa import tpu as csa_tpu
from v4_jax.kernels.experts import tpu as experts_tpu
from v4_jax.kernels.experts import training as experts_training
from v4_jax.kernels.grouped_matmul import groups
from v4_jax.kernels.hyper_connections import reference as hyper_connections
from v4_jax.kernels.hyper_connections import tpu as hyper_connections_tpu
from v4_jax.kernels.hyper_connections.reference import Numbers, Site
from v4_jax.kernels.indexer import cpu as indexer_cpu
from v4_jax.kernels.indexer import reference as indexer
from v4_jax.kernels.indexer import selection
from v4_jax.kernels.indexer import tpu as indexer_tpu
from v4_jax.kernels.linear import cpu as linear_cpu
from v4_jax.kernels.linear import reference as linear
from v4_jax.kernels.linear import shares as linear_shares
from v4_jax.kernels.linear import tpu as linear_tpu
from v4_jax.kernels.output import few as output_few
from v4_jax.kernels.output import gradients as output_gradients
from v4_jax.kernels.output import tpu as output_tpu
from v4_jax.kernels.rotary import gradients as rotary_gradients
from v4_jax.kernels.rotary import parts as rotary_parts
from v4_jax.kernels.rotary import reference as rotary
from v4_jax.kernels.rotary import tpu as rotary_tpu
from v4_jax.kernels.rotary.reference import Projection, Settle, Steps
from v4_jax.kernels.router import reference as router
from v4_jax.kernels.router import tpu as router_tpu
from v4_jax.kernels.stored_weights import one_in_stack
from v4_jax.kernels.window import tpu as window_tpu
from v4_jax.layer_stack import Cut, uncut
from v4_jax.layers.partials import Packed, Partial, packed, shape_of
from v4_jax.layers.rotary import Turn
from v4_jax.layers.visible import Visible
from v4_jax.layout import Layout
from v4_jax.number_formats import BlockScaled, Weight, dequantise
from v4_jax.sharding.platform import by_platform, interpreting

Form = Callable[..., Any]


def products(queries: Array, keys: Array) -> Array:
    """See `attention.reference.products`."""
    if not attention_cpu.helps(queries, keys):
        return attention.products(queries, keys)
    return _with_gradients(attention.products, cpu=attention_cpu.products_gradients)(queries, keys)


def weighted(shares: Array, keys: Array) -> Array:
    """See `attention.reference.weighted`."""
    if not attention_cpu.helps(shares, keys):
        return attention.weighted(shares, keys)
    return _with_gradients(attention.weighted, cpu=attention_cpu.weighted_gradients)(shares, keys)


def window_attention(
    plain: Form,
    queries: Array,
    keys: Array | None,
    oldest: Array | None,
    entries: Entries | None,
    visible: Visible | None,
    together: bool = False,
    picked: Array | None = None,
) -> Partial | Packed:
    """See `attention.tpu.window_attention` for all arguments but the first and the last.

    Args:
      plain: the same, in whose place the kernel runs in programs for TPUs. It has gradients where entries live in no
        cache, and those that are asked for beyond are the plain form's.
      queries: [B, Q, H, C].
      keys: of the window.
      oldest: where each query's window may begin.
      entries: the entries.
      visible: which of them the queries see.
      together: whether to return one `Packed` softmax.
      picked: [B, Q, K] int32 those of the entries that are attended, -1 for none, where `attends_in_training`. None:
        all that are visible.
    """
    if picked is not None or (attends_in_training(queries, keys, entries) and not together):
        operands = (queries, keys, oldest, entries, visible, picked)
        return by_platform(*operands, default=_handed_on(plain, together), tpu=_attend_in_training)
    if not attention_tpu.supports(queries):
        return _handed_on(plain, together)(queries, keys, oldest, entries, visible)
    kernel = functools.partial(attention_tpu.window_attention, together=together, interpret=interpreting())
    return _without_gradients(_handed_on(plain, together), tpu=kernel)(queries, keys, oldest, entries, visible)


def attends_in_training(queries: Any, keys: Any, entries: Entries | None) -> bool:
    """Whether `window_attention` has kernels for the gradients, too, in programs for TPUs, of arrays or shapes."""
    held = None if entries is None else entries.rows.arrays[0][0]
    uncached = entries is None or (
        entries.table is None
        and entries.rows.kind == "plain"
        and entries.rows.dtype == jnp.float32
        and isinstance(entries.layer, int)
    )
    return uncached and attention_gradients.supports(queries, keys, held)


def _attend_in_training(
    queries: Array,
    keys: Array | None,
    oldest: Array | None,
    entries: Entries | None,
    visible: Visible | None,
    picked: Array | None,
) -> Partial:
    """The kernel, whose gradients are a kernel's."""
    interpret, dtype = interpreting(), None if entries is None else entries.dtype

    def run(queries: Array, keys: Array | None, held: Array | None, *numbers: Any) -> Partial:
        oldest, visible, hidden = numbers
        entries = None if held is None else Entries.uncached(held.astype(dtype))
        found = attention_tpu.window_attention(queries, keys, oldest, entries, visible, hidden, interpret=interpret)
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
    held = None if entries is None else entries.rows.arrays[0][0]
    hidden = None if picked is None or held is None else csa_hidden.hide(picked, held.shape[1], interpret=interpret)
    return call(queries, keys, held, oldest, visible, hidden)


def _handed_on(plain: Form, together: bool) -> Form:
    """The form, whose partial softmax is `packed`, or its parts one by one."""

    def call(*operands: Any) -> Any:
        partial = Partial(*plain(*operands))
        return Packed(packed(partial)[None]) if together else partial

    return call


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


def index_scores(queries: Array, weights: Array, keys: Array) -> Array:
    """See `indexer.reference.index_scores`."""
    by_heads = indexer_cpu.index_scores
    scores = functools.partial(by_platform, default=indexer.index_scores, cpu=by_heads)
    return _with_gradients(scores, default=_pull(indexer.index_scores), cpu=_pull(by_heads))(queries, weights, keys)


def best_entries(
    queries: Array, weights: Array, keys: Entries, visible: Visible, *, top: int, scored: bool
) -> tuple[Array | None, Array]:
    """See `indexer.selection.best_entries`. It has no gradients."""
    if keys.count <= top:
        return selection.all_entries(index_scores, queries, weights, keys, visible, scored=scored)
    plain = functools.partial(selection.best_entries, index_scores, top=top, scored=scored)
    if not indexer_tpu.supports(queries, keys, top):
        return plain(queries, weights, keys, visible)
    kernel = functools.partial(indexer_tpu.best_entries, top=top, scored=scored, interpret=interpreting())
    return by_platform(queries, weights, keys, visible, default=plain, tpu=kernel)


def attend_picked(
    plain: Form, queries: Array, entries: Entries, local: Array, together: bool = False
) -> Partial | Packed:
    """Attention of each query over its own entries.

    Args:
      plain: has the results of `csa.tpu.attend_picked`, which takes its place in programs for TPUs, but where gradients
        are asked for.
      queries: [B, Q, H, C].
      entries: the entries.
      local: [B, Q, K] int32 local numbers of those to attend, -1 for none.
      together: whether to return one `Packed` softmax.
    """
    copying = _handed_on(plain, together)
    if not csa_tpu.supports(queries, entries):
        return copying(queries, entries, local)
    kernel = functools.partial(csa_tpu.attend_picked, together=together, interpret=interpreting())
    return _without_gradients(copying, tpu=kernel)(queries, entries, local)


def compress(
    plain: Form,
    projected: Sequence[Array],
    weights: CompressorWeights,
    open_blocks: Ring,
    entries: Entries,
    layout: Layout,
    steps: Steps,
) -> tuple[StoredRows, StoredRows]:
    """See `compressor.tpu.step` for all arguments but the first. It has no gradients.

    Args:
      plain: maps values, gates, open blocks and entries to the same results.
      projected: values and gates.
      weights: what turns them into entries.
      open_blocks: projections of earlier tokens.
      entries: earlier entries.
      layout: of the chunk.
      steps: what becomes of a pooled entry.
    """

    def kernel(values: Array, gates: Array, open_blocks: Ring, entries: Entries) -> tuple[StoredRows, StoredRows]:
        return compressor_tpu.step(
            (values, gates), weights, open_blocks, entries, layout, steps=steps, interpret=interpreting()
        )

    if not compressor_tpu.supports(open_blocks, entries, weights.norm.shape[0]):
        return plain(*projected, open_blocks, entries)
    return by_platform(*projected, open_blocks, entries, default=plain, tpu=kernel)


def norm_rotate(x: Array, weight: Array | None, turn: Turn | None, steps: Steps) -> Array:
    """See `rotary.reference.norm_rotate`. Where nothing is rounded a kernel gives the gradients, too; none flows to the
    turn.
    """

    def plain(x: Array, weight: Array | None, turn: Turn | None) -> Array:
        return rotary.norm_rotate(x, weight, jax.lax.stop_gradient(turn), steps)

    if not rotary_tpu.supports(x.shape, x.dtype, turn):
        return plain(x, uncut(weight), turn)
    kernel = functools.partial(rotary_tpu.norm_rotate, steps=steps, interpret=interpreting())
    if isinstance(weight, Cut) or not rotary_gradients.supports(x.shape, x.dtype, turn, steps):
        return _without_gradients(plain, tpu=kernel)(x, weight, turn)

    def gradients(operands: Any, gradient: Array) -> Any:
        x, weight, turn = operands
        found = rotary_gradients.gradients(x, weight, turn, gradient, steps, interpret=interpreting())
        return *found, jax.tree.map(jnp.zeros_like, turn)

    call = functools.partial(by_platform, default=plain, tpu=kernel)
    return _with_gradients(call, default=_pull(plain), tpu=gradients)(x, weight, turn)


def settle(sums: Array, projections: Sequence[Projection]) -> list[Array]:
    """See `rotary.reference.settle`."""

    def plain(sums: Array, thens: Sequence[Settle | None]) -> list[Array]:
        return rotary.settle(sums, projections, uncut(thens))

    def kernel(sums: Array, thens: Sequence[Settle | None]) -> list[Array]:
        return rotary_parts.settle(sums, projections, thens, interpret=interpreting())

    thens = [projection.then for projection in projections]
    if not rotary_parts.supports(projections):
        return plain(sums, thens)
    return by_platform(sums, thens, default=plain, tpu=kernel)


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
        return _without_gradients(functools.partial(plain, dtype=dtype), tpu=kernel)(list(partials), sink, turn)

    def default(partials: Sequence[Partial], sink: Array, turn: Turn) -> Array:
        still = [some._replace(maximum=jax.lax.stop_gradient(some.maximum)) for some in partials]
        return plain(still, sink, jax.lax.stop_gradient(turn), dtype)

    def gradients(operands: Any, gradient: Array) -> Any:
        partials, sink, turn = operands
        found = output_gradients.gradients(partials, sink, turn, gradient, interpret=interpreting())
        return *found, jax.tree.map(jnp.zeros_like, turn)

    call = functools.partial(by_platform, default=default, tpu=kernel)
    return _with_gradients(call, default=_pull(default), tpu=gradients)(list(partials), sink, turn)


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
    return _without_gradients(plain, tpu=kernel)(*operands)


def matmul(x: Array, weight: Array, dtype: Any) -> Array:
    """See `linear.reference.matmul`."""
    plain = functools.partial(linear.matmul, dtype=dtype)
    if x.size == x.shape[-1]:
        return _without_gradients(plain, tpu=functools.partial(linear_tpu.one_row, dtype=dtype))(x, weight)
    if x.ndim != 2:
        return plain(x, weight)
    return _with_gradients(plain, cpu=functools.partial(linear_cpu.matmul_gradients, dtype=dtype))(x, weight)


def enter_site(streams: Array, site: Site, numbers: Numbers) -> tuple[Array, Array]:
    """See `hyper_connections.reference.enter`."""
    return _boundary("enter", streams, numbers)(streams, site)


def leave_site(streams: Array, output: Array, mix: Array, numbers: Numbers) -> Array:
    """See `hyper_connections.reference.leave`."""
    return _boundary("leave", streams, numbers)(streams, output, mix)


def cross_sites(streams: Array, output: Array, mix: Array, site: Site, numbers: Numbers) -> tuple[Array, Array, Array]:
    """See `hyper_connections.reference.cross`."""
    return _boundary("cross", streams, numbers)(streams, output, mix, site)


def _boundary(name: str, streams: Array, numbers: Numbers) -> Form:
    default = functools.partial(getattr(hyper_connections, name), numbers=numbers)
    if not hyper_connections_tpu.supports(streams, numbers):
        return lambda *operands: default(*uncut(operands))
    kernel = functools.partial(getattr(hyper_connections_tpu, name), numbers=numbers, interpret=interpreting())
    return _without_gradients(default, tpu=kernel)


def products_with(x: Array, weights: Sequence[Weight], dtype: Any) -> list[Array]:
    """[..., in] times each of several [out, in] weights that may be block-scaled: [..., out] of `dtype` each.

    In programs for TPUs all block-scaled ones go in one call of the kernel.
    """

    def plain(x: Array, weights: Sequence[Weight]) -> list[Array]:
        return [matmul(x, _expanded(weight, dtype), dtype) for weight in weights]

    def kernel(x: Array, weights: Sequence[Any]) -> list[Array]:
        out = linear_tpu.matmul(x.astype(dtype).reshape(-1, x.shape[-1]), weights, interpret=interpreting())
        ends = itertools.accumulate(weight.shape[0] for weight in weights)
        parts = jnp.split(out, list(ends)[:-1], axis=1)
        return [part.reshape(*x.shape[:-1], -1) for part in parts]

    if not all(linear_tpu.supports(weight, dtype) for weight in weights):
        return plain(x, weights)
    return _without_gradients(plain, tpu=kernel)(x, list(weights))


def partial_products(x: Array, weights: Sequence[Any], dtypes: Sequence[Any], share: Any, devices: int) -> Array:
    """See `linear.reference.partial_products`."""
    plain = functools.partial(linear.partial_products, devices=devices, dtypes=dtypes)
    if not linear_shares.supports(x, weights, dtypes, devices):
        return plain(x, list(weights), share)
    kernel = functools.partial(linear_shares.partial_products, devices=devices, interpret=interpreting())
    return _without_gradients(plain, tpu=kernel)(x, list(weights), share)


def grouped_product(x: Array, weight: Weight, dtype: Any) -> Array:
    """See `linear.reference.grouped`; the weight may be block-scaled."""

    def plain(x: Array, weight: Weight) -> Array:
        return linear.grouped(x, _expanded(weight, dtype), dtype)

    def kernel(x: Array, weight: Any) -> Array:
        *leading, groups, size = x.shape
        out = linear_tpu.matmul(
            x.astype(dtype).reshape(-1, groups * size), [weight], groups=groups, interpret=interpreting()
        )
        return out.reshape(*leading, groups, -1)

    if not linear_tpu.supports(weight, dtype, x.shape[-2]):
        return plain(x, weight)
    return _without_gradients(plain, tpu=kernel)(x, weight)


def map_groups(
    function: Callable[[Any, Any], Array],
    rows: Any,
    weights: Any,
    sizes: Array,
    *,
    layer: Any = None,
    width: int,
    kernel: Callable[[Any, Any, Array, Any], Array] | None,
) -> Array:
    """See `grouped_matmul.groups.map_groups` for all arguments but the kernel.

    Args:
      kernel: maps (rows, weights, sizes, layer) to the same result, by `grouped_matmul.tpu`; takes the place of the
        loop over groups in programs for TPUs, except where gradients are asked for. None where there is none.
    """

    def plain(rows: Any, weights: Any, sizes: Array, layer: Any) -> Array:
        return groups.map_groups(function, rows, weights, sizes, layer=layer, width=width)

    if kernel is None:
        return plain(rows, weights, sizes, layer)
    if layer is not None:
        return by_platform(rows, weights, sizes, layer, default=plain, tpu=kernel)
    return _without_gradients(plain, tpu=kernel)(rows, weights, sizes, None)


def few_rows_experts(
    plain: Form, x: Array, assigned: Array, scale: Array, weights: Sequence[Weight], layer: Any, *, limit: float
) -> Array:
    """See `experts.tpu.experts` for all arguments but the first.

    Args:
      plain: the same of the arrays and the layer, in whose place the kernel runs in programs for TPUs where rows are
        few, but where gradients are asked for.
      x: [T, D].
      assigned: [T, K] experts of each row.
      scale: [T, K] their weights.
      weights: w1, w3 and w2 of all experts.
      layer: layer number in stacked weights, or None.
      limit: bound of the activations.
    """

    def kernel(x: Array, assigned: Array, scale: Array, weights: Sequence[Weight], layer: Any) -> Array:
        return experts_tpu.experts(x, assigned, scale, weights, layer=layer, limit=limit, interpret=interpreting())

    operands = (x, assigned, scale, list(weights), layer)
    if not experts_tpu.supports(x, weights):
        return plain(*operands)
    if layer is not None:
        return by_platform(*operands, default=plain, tpu=kernel)
    return _without_gradients(plain, tpu=kernel)(*operands)


def many_rows_experts(
    plain: Form, rows: Array, scale: Array, weights: Sequence[Weight], sizes: Array, layer: Any, *, limit: float
) -> Array:
    """See `experts.training.forward` for all arguments but the first and the layer.

    Args:
      plain: the same of the arrays and the layer, in whose place kernels run in programs for TPUs, and give the
        gradients, where weights are such as training has.
      rows: [M, D], sorted by expert.
      scale: [M].
      weights: w1, w3 and w2 of all experts.
      sizes: rows of each.
      layer: layer number in stacked weights, or None.
      limit: bound of the activations.
    """
    if layer is not None or not experts_training.supports(rows, weights):
        return plain(rows, scale, weights, sizes, layer)

    def in_groups(rows: Array, scale: Array, weights: Sequence[Array], sizes: Array) -> Array:
        return plain(rows, scale, weights, sizes, None)

    def call(*operands: Any) -> Array:
        kernel = functools.partial(experts_training.forward, limit=limit, interpret=interpreting())
        return by_platform(*operands, default=in_groups, tpu=kernel)

    def gradients(operands: Any, gradient: Array) -> Any:
        rows, scale, weights, sizes = operands
        return *experts_training.gradients(
            rows, scale, weights, sizes, gradient, limit=limit, interpret=interpreting()
        ), None

    whole = _with_gradients(call, default=_pull(in_groups), tpu=gradients)
    return whole(rows, scale, list(weights), sizes)


def expert_of_all(plain: Form, x: Array, weights: Sequence[Weight], *, limit: float) -> Array:
    """One expert that all rows visit: [T, D] float32.

    Args:
      plain: the same of rows and weights; see `few_rows_experts`.
      x: [T, D].
      weights: w1 and w3 [H, D], and w2 [D, H]; the kernel takes block-scaled ones, which it reads in their stack.
      limit: bound of the activations.
    """

    def kernel(x: Array, weights: Sequence[Any]) -> Array:
        one = (x.shape[0], 1)
        stacks, layers = zip(*map(one_in_stack, weights), strict=True)
        return experts_tpu.experts(
            x,
            jnp.zeros(one, jnp.int32),
            jnp.ones(one, jnp.float32),
            stacks,
            layer=layers[0],
            limit=limit,
            interpret=interpreting(),
        )

    if not (all(isinstance(weight, BlockScaled) for weight in weights) and experts_tpu.supports(x, weights)):
        return plain(x, uncut(list(weights)))
    return _without_gradients(plain, tpu=kernel)(x, list(weights))


def best_experts(affinities: Array, scores: Array, top: int, factor: float) -> tuple[Array, Array]:
    """See `router.reference.best_experts`."""
    plain = functools.partial(router.best_experts, top=top, factor=factor)
    if not router_tpu.supports(scores):
        return plain(affinities, scores)
    kernel = functools.partial(router_tpu.best_experts, top=top, factor=factor, interpret=interpreting())
    return _without_gradients(plain, tpu=kernel)(affinities, scores)


def _expanded(weight: Weight, dtype: Any) -> Array:
    """A plain weight as it is: the product casts it, or need not."""
    return dequantise(weight, dtype) if isinstance(weight, BlockScaled) else uncut(weight)


def _with_gradients(function: Form, *, default: Form | None = None, **forms: Form) -> Form:
    """The function, whose gradients the platform's form takes, from operands and gradient; nothing else is kept.

    Args:
      function: maps arrays to an array.
      default: maps (operands, gradient) to the operands' gradients, None for integers; by default that of the function.
      **forms: the same for one platform.
    """

    @jax.custom_vjp
    def call(*operands: Any) -> Any:
        return function(*operands)

    def forward(*operands: Any) -> tuple[Any, Any]:
        return function(*operands), operands

    def backward(operands: Any, gradient: Any) -> Any:
        return by_platform(operands, gradient, default=default or _pull(function), **forms)

    call.defvjp(forward, backward)
    return call


def _without_gradients(default: Form, **forms: Form) -> Form:
    """A function that runs the platform's form, which has no gradients: where they are asked for, the default runs.

    The default gets arrays as they are; the form reads those that were cut out of a stack there.
    """

    def plain(*operands: Any) -> Any:
        return default(*uncut(operands))

    @jax.custom_vjp
    def call(*operands: Any) -> Any:
        return by_platform(*operands, default=plain, **forms)

    def forward(*operands: Any) -> tuple[Any, Any]:
        return jax.vjp(plain, *operands)

    def backward(pull: Any, gradient: Any) -> Any:
        return pull(gradient)

    call.defvjp(forward, backward)
    return call


def _pull(form: Form) -> Form:
    def pull(operands: Any, gradient: Any) -> Any:
        found = jax.vjp(form, *operands)[1](gradient)
        return jax.tree.map(lambda x: None if x.dtype == jax.dtypes.float0 else x, found)

    return pull
