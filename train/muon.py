"""Muon: momentum, orthogonalised matrix by matrix, each matrix by one device.

Technical report, section 2.4. Newton-Schulz iterations turn the momentum of a weight into the nearest semi-orthogonal
matrix; its update then has the same size whatever the gradient's. optax.contrib's `muon` corrects momentum and gradient
for their start by different factors and iterates on one device; here momentum is the report's, and devices
share the matrices.

On a mesh, matrices that lie whole on a device (an expert's, an output group's) are orthogonalised there. Of the others,
which are split for storage, each is brought together on one device, by one exchange, and goes back by another.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from v4_jax.kernels.choose import newton_schulz_step
from v4_jax.parameters import Parameter, is_parameter
from v4_jax.sharding.axes import Rules, ShardingError, resolve
from v4_jax.sharding.collectives import all_gather, index, size
from v4_jax.sharding.split import Split

# Eight steps that bring the singular values near one, and two that settle them there (section 2.4).
COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2

RMS = 0.18  # root mean square of an update's elements, as AdamW's tend to be

_BATCH_BYTES = 2**28  # of float32 matrices that are orthogonalised at once
_ENOUGH = 8  # matrices for each device that shares the work, of which one more or less is no great waste


def muon(
    declared: Any,
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    momentum_dtype: Any = jnp.float32,
    weight_decay: float = 0.1,
    rms: float = RMS,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    rules: Rules | str | None = None,
) -> optax.GradientTransformation:
    """The report's Muon, for the "muon" parameters of a model alone.

    Args:
      declared: the declarations of what is trained.
      learning_rate: constant, or by step.
      momentum: decay of the momentum M <- momentum * M + G; what is orthogonalised is momentum * M + G.
      momentum_dtype: in which M is kept between steps; what is orthogonalised is float32 in any case.
      weight_decay: decoupled, times the learning rate.
      rms: root mean square of an update's elements before the learning rate.
      dtype: of the matrix products; bfloat16 suffices.
      mesh: devices that the parameters lie on.
      rules: which mesh axes split which logical axes.
    """
    return optax.chain(
        optax.trace(decay=np.float32(momentum), nesterov=True, accumulator_dtype=momentum_dtype),
        orthogonalise(declared, rms=rms, dtype=dtype, mesh=mesh, rules=rules),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def groups(declared: Any) -> Any:
    """Who updates each parameter."""
    return jax.tree.map(lambda p: p.group, declared, is_leaf=is_parameter)


def newton_schulz(x: Array, dtype: Any = jnp.float32) -> Array:
    """The semi-orthogonal matrices nearest to `x` [..., m, n], in its dtype; a matrix of zeros stays so.

    Args:
      x: matrices.
      dtype: of the matrix products.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = x.astype(jnp.float32)
    y = jnp.swapaxes(y, -1, -2) if tall else y
    # By the largest element first: the squares of tiny gradients would underflow.
    tiny = jnp.finfo(jnp.float32).tiny
    y = y / jnp.maximum(jnp.max(jnp.abs(y), axis=(-1, -2), keepdims=True), tiny)
    y = y / jnp.maximum(jnp.linalg.norm(y, axis=(-1, -2), keepdims=True), tiny)

    def step(y: Array, coefficients: Array) -> tuple[Array, None]:
        return newton_schulz_step(y, coefficients), None

    # In pairs: a step cannot write over what it reads, but two may take turns with two buffers, without copies.
    y, _ = jax.lax.scan(step, y.astype(dtype), jnp.asarray(COEFFICIENTS, jnp.float32), unroll=2)
    return (jnp.swapaxes(y, -1, -2) if tall else y).astype(x.dtype)


def orthogonalise(
    declared: Any,
    *,
    rms: float = RMS,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rules: Rules | str | None = None,
) -> optax.GradientTransformation:
    """Replaces every matrix of the "muon" parameters by `rms * sqrt(max(m, n))` times the nearest semi-orthogonal one.

    Stateless. The leaves are those of a masked tree, as `optax.partition` hands it over.

    Raises:
      ShardingError: independent matrices of one weight that do not lie whole on the devices.
    """
    leaves = jax.tree.leaves(declared, is_leaf=is_parameter)
    updated = jax.tree.leaves(groups(declared))
    matrices = [leaf for leaf, group in zip(leaves, updated, strict=True) if group == "muon"]
    assignments = [Assignment.of(leaf, mesh, resolve(rules)) for leaf in matrices]

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        values, tree = jax.tree.flatten(updates)
        run = functools.partial(_orthogonalise, assignments, rms, dtype)
        if mesh is not None:
            specs = [assignment.spec for assignment in assignments]
            run = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)
        return jax.tree.unflatten(tree, run(values)), state

    return optax.GradientTransformation(optax.init_empty_state, update)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Where the matrices of one parameter are.

    Attributes:
      shape: (m, n) of a matrix, whole.
      local: (m, n) of the part that a device stores.
      spec: placement of the parameter.
      rows: mesh axes that split a matrix's rows.
      columns: mesh axes that split its columns.
      idle: mesh axes along which all devices store the same, and share the work. Not `data`, which may lead from slice
        to slice: to send the updates would take longer than to make them on each.
    """

    shape: tuple[int, int]
    local: tuple[int, int]
    spec: P
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    idle: tuple[str, ...]

    @classmethod
    def of(cls, parameter: Parameter, mesh: Mesh | AbstractMesh | None, rules: Rules) -> Assignment:
        """The assignment of a "muon" parameter.

        Raises:
          ShardingError: independent matrices that do not lie whole on the devices.
        """
        sizes = {} if mesh is None else {name: size for name, size in mesh.shape.items() if size > 1}
        split = Split(rules, tuple(sizes.items()))
        out, columns = (split.axes(name) for name in parameter.axes[-2:])
        height, width = parameter.shape[-2] // parameter.matrices, parameter.shape[-1]
        rows = out
        if parameter.matrices > 1 and out:
            if parameter.matrices % split.count(out):
                raise ShardingError(
                    f"{parameter.released} holds {parameter.matrices} independent matrices, which do not lie whole on "
                    f"{split.count(out)} devices ({' x '.join(out)}): expected a divisor of {parameter.matrices}"
                )
            rows = ()
        used = {axis for name in parameter.axes for axis in split.axes(name)}
        return cls(
            (height, width),
            (height // split.count(rows), width // split.count(columns)),
            P(*(split.axes(name) or None for name in parameter.axes)),
            rows,
            columns,
            tuple(axis for axis in sizes if axis not in used and axis != "data"),
        )

    @property
    def whole(self) -> bool:
        """Whether every matrix lies whole on one device and on no other."""
        return not (self.rows or self.columns or self.idle)

    @property
    def sharing(self) -> int:
        """Devices that share the work on the parameter's matrices; within `jax.shard_map`."""
        return size((*self.idle, *self.columns, *self.rows))


def _orthogonalise(assignments: Sequence[Assignment], rms: float, dtype: Any, values: Sequence[Array]) -> list[Array]:
    """One device's part of the work, from its shards to its shards."""
    scale = [rms * math.sqrt(max(assignment.shape)) for assignment in assignments]
    matrices = [value.reshape(-1, *assignment.local) for assignment, value in zip(assignments, values, strict=True)]
    results: dict[int, Array] = {}
    groups = defaultdict(list)
    last = None
    for i, assignment in enumerate(assignments):
        if assignment.whole:
            results[i] = _batched(matrices[i], dtype)
        elif len(matrices[i]) >= _ENOUGH * assignment.sharing:
            x = matrices[i].astype(dtype)
            if last is not None:  # one after another: each takes several times its own memory
                x, results[last] = jax.lax.optimization_barrier((x, results[last]))
            results[i], last = _split_over_devices(x, assignment, dtype), i
        else:  # a few matrices of the same shape and places share an exchange
            groups[assignment.shape, assignment.rows, assignment.columns, assignment.idle].append(i)
    for members in groups.values():
        together = jnp.concatenate([matrices[i] for i in members])
        ends = [sum(matrices[i].shape[0] for i in members[: n + 1]) for n in range(len(members) - 1)]
        done = _split_over_devices(together, assignments[members[0]], dtype)
        results |= dict(zip(members, jnp.split(done, ends), strict=True))
    return [(results[i] * scale[i]).astype(value.dtype).reshape(value.shape) for i, value in enumerate(values)]


def _split_over_devices(x: Array, assignment: Assignment, dtype: Any) -> Array:
    """Parts [N, m', n'] of matrices -> the same parts, orthogonalised; a device works on every k-th part of the N.

    Where N is not a multiple of the devices, some work on zeros.
    """
    count = x.shape[0]
    x = jnp.pad(x.astype(dtype), [(0, -count % assignment.sharing), (0, 0), (0, 0)])
    if assignment.idle:
        share = x.shape[0] // size(assignment.idle)
        x = jax.lax.dynamic_slice_in_dim(x, index(assignment.idle) * share, share)
    for axes, dimension in ((assignment.columns, 2), (assignment.rows, 1)):
        x = jax.lax.all_to_all(x, axes, 0, dimension, tiled=True) if axes else x
    x = _batched(x, dtype)
    for axes, dimension in ((assignment.rows, 1), (assignment.columns, 2)):
        x = jax.lax.all_to_all(x, axes, dimension, 0, tiled=True) if axes else x
    x = all_gather(x, assignment.idle, 0)
    return x[:count].astype(jnp.float32)


def _batched(x: Array, dtype: Any) -> Array:
    """`newton_schulz` of [N, m, n], a few at a time."""
    count, *shape = x.shape
    batches = -(-count // max(1, _BATCH_BYTES // (4 * math.prod(shape))))
    if batches == 1:
        return newton_schulz(x, dtype)
    size = -(-count // batches)
    x = jnp.pad(x, [(0, batches * size - count), (0, 0), (0, 0)])
    done = jax.lax.map(functools.partial(newton_schulz, dtype=dtype), x.reshape(batches, size, *shape))
    return done.reshape(-1, *shape)[:count]
