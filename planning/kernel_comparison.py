"""Each kernel of a job's program against its reference, on the devices, at the program's own shapes.

Kernels are found where the program chooses them (`v4_jax.sharding.platform.by_platform`): what is chosen and what it is
chosen from are traced apart, with the operands that both would have had. Those are of one call of the program, cut down
to the layers that have every role. Large ones, weights and caches, are random, but never picks, places and counts: they
must be within what they count.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v4_jax.architecture import Architecture
from v4_jax.cache.rows import StoredRows
from v4_jax.number_formats import E2M1_MAX, E4M3_MAX, E8M0, saturate
from v4_jax.planning.job import Job
from v4_jax.planning.measure import Executable, Run
from v4_jax.planning.profile import parts_of
from v4_jax.planning.random_values import uniform
from v4_jax.profiler import recorded
from v4_jax.sharding.platform import choices_watched, interpreting

CALLS = 5  # that are traced by the profiler, after one that is not
_LARGE = 1 << 22  # elements
_SCALE = 2.0**-7  # of every block of a weight


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A kernel and its reference, on the same operands.

    Attributes:
      name: the kernel's.
      shapes: of its operands, as text, but for those that are single numbers.
      seconds: of a call of the kernel, its operations together; None where it could not be run.
      reference_seconds: the same of its reference.
      difference: the largest between two results, relative to the largest of the reference's; None without numbers.
      unequal: the largest share of picks or counts that differ; None where there are none.
      error: why it could not be compared; None where it was.
    """

    name: str
    shapes: tuple[str, ...]
    seconds: float | None = None
    reference_seconds: float | None = None
    difference: float | None = None
    unequal: float | None = None
    error: str | None = None


class _Form(NamedTuple):
    """One way to compute: a closed function of some of a choice's values, and what its results are parts of."""

    function: Callable[..., Sequence[Array]]
    operands: tuple[int, ...]
    tree: Any


@dataclasses.dataclass
class _Choice:
    """A kernel and its reference.

    Attributes:
      name: the kernel's.
      shapes: of all values that either takes.
      kernel: one form.
      reference: the other.
      seen: values of the program, by number, once it has run.
    """

    name: str
    shapes: list[jax.ShapeDtypeStruct]
    kernel: _Form
    reference: _Form
    seen: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def likeness(self) -> tuple[Any, ...]:
        """What choices have in common that are compared once."""
        return (self.name, *((shape.shape, shape.dtype.name) for shape in self.shapes))


def comparisons(job: Job, mesh: Mesh) -> list[Comparison]:
    """Compares all kernels that the job's program has on its devices, one of those that are alike.

    Raises:
      TooLarge: the program, cut down, has no room on the devices.
    """
    job = dataclasses.replace(job, config=_with_every_role(job.config))
    found: dict[tuple[Any, ...], _Choice] = {}
    watcher = functools.partial(_watch, found, mesh.devices.flat[0].platform)
    with choices_watched(watcher):
        executable = Executable(job, mesh)
    if not found:
        return []
    Run(executable).step()
    jax.effects_barrier()
    run = [choice for choice in found.values() if _visible(choice) <= set(choice.seen)]
    return [_compared(choice, mesh) for choice in run]


def _with_every_role(config: Architecture) -> Any:
    """The first layers, until there is one of every kind, and two of what repeats."""
    kinds, layers = set(config.layers), config.layers
    first = next(count for count in range(1, len(layers) + 1) if set(layers[:count]) == kinds)
    period = config.period
    return config.first_layers(max(first, period.start + period.length * min(2, period.repeats)))


# ---- while the program is traced -------------------------------------------------------------------------------------


def _watch(found: dict[tuple[Any, ...], _Choice], platform: str, operands: Any, default: Any, forms: Any) -> None:
    """Notes a choice, and makes the program tell its operands as it runs."""
    kernel = forms.get("tpu" if interpreting() else platform)
    if kernel is None:
        return
    values: list[Any] = []
    form, reference = (_traced(one, operands, values) for one in (kernel, default))
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]
    choice = _Choice(_name(kernel), shapes, form, reference)
    if choice.likeness in found:
        return
    found[choice.likeness] = choice
    visible = sorted(_visible(choice))

    def tell(*told: Any) -> None:
        if not choice.seen:  # the first layer, and the first device, that comes
            choice.seen.update(zip(visible, map(np.array, told), strict=True))

    if visible:
        jax.debug.callback(tell, *(values[number] for number in visible))


def _traced(form: Callable[..., Any], operands: Any, values: list[Any]) -> _Form:
    """A form as a closed function; the values that it takes, given or closed over, are added to those known."""
    leaves, tree = jax.tree.flatten(operands)
    closed, results = jax.make_jaxpr(lambda *flat: form(*jax.tree.unflatten(tree, flat)), return_shape=True)(*leaves)
    numbers = []
    for value in (*closed.consts, *leaves):
        known = next((number for number, other in enumerate(values) if other is value), None)
        if known is None:
            known = len(values)
            values.append(value if hasattr(value, "aval") else jnp.asarray(value))
        numbers.append(known)
    consts, jaxpr = len(closed.consts), closed.jaxpr

    def function(*taken: Any) -> Sequence[Array]:
        return jax.core.eval_jaxpr(jaxpr, taken[:consts], *taken[consts:])

    return _Form(function, tuple(numbers), jax.tree.structure(results))


def _visible(choice: _Choice) -> set[int]:
    """Numbers of the values that the program tells: all but codes and scales, and what is large.

    Whole numbers are told at any size, unless they are a cache's rows [layers, B, N, ...].
    """

    def told(shape: jax.ShapeDtypeStruct) -> bool:
        if jnp.issubdtype(shape.dtype, jnp.floating) and shape.dtype not in (jnp.float32, jnp.bfloat16):
            return False
        return shape.size <= _LARGE or (jnp.issubdtype(shape.dtype, jnp.signedinteger) and len(shape.shape) < 4)

    return {number for number, shape in enumerate(choice.shapes) if told(shape)}


def _name(kernel: Any) -> str:
    """What a kernel is called: a function of its own, or within the one that chooses it."""
    while isinstance(kernel, functools.partial):
        kernel = kernel.func
    return str(kernel.__qualname__.partition(".")[0])


# ---- afterwards ------------------------------------------------------------------------------------------------------


def _compared(choice: _Choice, mesh: Mesh) -> Comparison:
    known = Comparison(choice.name, tuple(f"{s.dtype}{list(s.shape)}" for s in choice.shapes if s.shape))
    try:
        values = [_value(choice, number, mesh) for number in range(len(choice.shapes))]
        (kernel, seconds), (reference, reference_seconds) = (
            _measured(form, values, mesh) for form in (choice.kernel, choice.reference)
        )
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        return dataclasses.replace(known, error=str(error).strip().splitlines()[0][:300])
    known = dataclasses.replace(known, seconds=seconds, reference_seconds=reference_seconds)
    pairs = list(zip(_numbers(choice.kernel, kernel), _numbers(choice.reference, reference), strict=True))
    if not all(np.array_equal(np.isfinite(one), np.isfinite(other)) for one, other in pairs):
        return dataclasses.replace(known, error="its results are no numbers where the reference's are, or the reverse")
    real = [pair for pair in pairs if np.issubdtype(pair[0].dtype, np.floating)]
    counts = [pair for pair in pairs if not np.issubdtype(pair[0].dtype, np.floating)]
    return dataclasses.replace(
        known,
        difference=max((_difference(*pair) for pair in real), default=None),
        unequal=max((_unequal(*pair) for pair in counts), default=None),
    )


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest, relative to the largest of the other's numbers."""
    finite = np.isfinite(other)
    most = np.abs(other[finite]).max(initial=0.0)
    return float(np.abs(one[finite] - other[finite]).max(initial=0.0) / (most or 1.0))


def _unequal(one: np.ndarray, other: np.ndarray) -> float:
    """The share that differs, of picks in any order."""
    return float(np.mean(np.sort(np.atleast_1d(one)) != np.sort(np.atleast_1d(other))))


def _value(choice: _Choice, number: int, mesh: Mesh) -> Array:
    """What both forms are given in a place, on every device."""
    everywhere = NamedSharding(mesh, P())
    if number in choice.seen:
        return jax.device_put(choice.seen[number], everywhere)
    return jax.jit(functools.partial(_random, choice.shapes[number], number), out_shardings=everywhere)()


def _random(shape: jax.ShapeDtypeStruct, seed: int) -> Array:
    """Numbers in [-1, 1) as they are stored: plainly, as codes, as scales, or as the bits of a cache's rows."""
    values, dtype = uniform(shape.shape, seed), jnp.dtype(shape.dtype)
    if dtype == E8M0:
        return jnp.full(shape.shape, _SCALE).astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        small = {jnp.dtype(jnp.float8_e4m3fn): E4M3_MAX, jnp.dtype(jnp.float4_e2m1fn): E2M1_MAX}
        return saturate(values * small[dtype], dtype) if dtype in small else values.astype(dtype)
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    if dtype == jnp.uint16:
        return bits
    if dtype == jnp.uint32:
        return jax.lax.bitcast_convert_type(values, jnp.uint32)
    if dtype == jnp.int32:
        word = bits.astype(jnp.uint32)
        return jax.lax.bitcast_convert_type(word | (word << 16), jnp.int32)
    raise NotImplementedError(f"no random values of {dtype} are known")


def _measured(form: _Form, values: list[Array], mesh: Mesh) -> tuple[list[Array], float]:
    """What a form makes of the values, on every device alike, and how long its operations take."""
    everywhere = P()
    function = jax.shard_map(form.function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    taken = [values[number] for number in form.operands]
    jitted = jax.jit(function)
    compiled = jitted.lower(*taken).compile()
    results = jax.block_until_ready(jitted(*taken))
    with tempfile.TemporaryDirectory() as folder:
        with recorded(Path(folder)):
            times = [_timed(jitted, taken) for _ in range(CALLS)]
        return results, parts_of(Path(folder), compiled, times).busy


def _timed(function: Callable[..., Any], operands: Sequence[Array]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*operands))
    return time.perf_counter() - start


def _numbers(form: _Form, results: list[Array]) -> list[np.ndarray]:
    """Results as float32 or whole numbers; a cache's rows as the numbers that they stand for."""

    def plain(x: Any) -> list[Any]:
        held = [x.decode(x.arrays, jnp.float32)] if isinstance(x, StoredRows) else [x]
        return [y.astype(jnp.float32) if jnp.issubdtype(y.dtype, jnp.floating) else y for y in held]

    tree = jax.tree.unflatten(form.tree, results)
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, StoredRows))
    return [np.asarray(value) for leaf in leaves for value in plain(leaf)]
