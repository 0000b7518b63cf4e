"""From a checkpoint directory to parameters, on one device or on a mesh, reading only what this process's devices hold.

Leaves are made one shard at a time, so host memory peaks at about one shard of the largest leaf. A block-scaled shard
must end where blocks end; codes and scales are then sliced alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from v4_jax.checkpoint.block_formats import BlockFormat, check_range, check_scales, dequantise, scale_name, unpack
from v4_jax.checkpoint.in_memory import check_expert_ids
from v4_jax.checkpoint.interface import Checkpoint
from v4_jax.checkpoint.mapping import Path as LeafPath
from v4_jax.checkpoint.mapping import leaves
from v4_jax.checkpoint.opening import opened
from v4_jax.checkpoint.tensors import DTYPES, CheckpointError
from v4_jax.config import Config
from v4_jax.number_formats import BlockScaled, scale_shape
from v4_jax.parameters import Parameter
from v4_jax.sharding.axes import Rules, ShardingError, resolve, sharding

Index = tuple[slice, ...]
Fill = Callable[[Index], tuple[np.ndarray, ...]]

_FLOAT: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_THREADS = min(8, os.cpu_count() or 1)


def load(
    path: str | Path | Checkpoint,
    *,
    dtype: Literal["native", "bfloat16", "float32"] = "native",
    mesh: Mesh | None = None,
    rules: Rules | str | None = None,
    only: Callable[[str], bool] = lambda name: True,
) -> tuple[Config, Any]:
    """Loads a checkpoint.

    Args:
      path: a released directory (here, at `gs://bucket/directory` or at `hf://org/name[@revision]`), one made by
        `convert`, a training run (of which the newest complete step is read), one of its steps, or an open checkpoint.
      dtype: "native" keeps the released formats: block-scaled weights become `BlockScaled` (E4M3 or E2M1 codes with
        their scales as stored), BF16 stays BF16. Otherwise both become plain arrays of this dtype. Float32 tensors stay
        float32 and expert ids become int32 in either case. A training run holds all floats in float32: "native" rounds
        them to what `export` writes, "float32" returns them exactly.
      mesh: devices to place the parameters on; None is the default device.
      rules: which mesh axes split which logical axes: a `v4_jax.sharding.axes.Rules` or the name of a preset.
      only: which branches of the parameter tree are wanted, by their names at its top; all of them by default.

    Returns:
      The configuration of the checkpoint, and the parameter tree of `v4_jax.declarations(config)`, unboxed. The
      configuration has no MTP block where the checkpoint has none.

    Raises:
      CheckpointError: the checkpoint is missing, damaged, inconsistent, or does not fit on the mesh.
    """
    if dtype not in ("native", *_FLOAT):
        raise CheckpointError(f"dtype is {dtype!r}, expected 'native', 'bfloat16' or 'float32'")
    if rules is not None and mesh is None:
        raise CheckpointError("sharding rules were given without a mesh to apply them to")
    params: dict[str, Any] = {}
    with opened(path) as checkpoint, ThreadPoolExecutor(_THREADS) as pool:
        parameters = {key: leaf for key, leaf in leaves(checkpoint.config).items() if only(key[0])}
        loaders = [_Leaf.of(checkpoint, key, parameter, dtype, pool) for key, parameter in parameters.items()]
        try:
            places = [loader.placement(mesh, resolve(rules)) for loader in loaders]
        except ShardingError as error:
            raise CheckpointError(f"{checkpoint.label} does not fit on the mesh: {error}") from None
        for loader, place in zip(loaders, places, strict=True):
            node = params
            for key in loader.path[:-1]:
                node = node.setdefault(key, {})
            node[loader.path[-1]] = loader.load(place)
        return checkpoint.config, params


class _Leaf(NamedTuple):
    """One parameter on its way from a checkpoint into memory."""

    checkpoint: Checkpoint
    path: LeafPath
    parameter: Parameter
    form: BlockFormat | None
    target: Any  # dtype of the plain result; None to keep the blocks
    pool: ThreadPoolExecutor

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, path: LeafPath, parameter: Parameter, dtype: str, pool: ThreadPoolExecutor
    ) -> _Leaf:
        form = checkpoint.formats.block(parameter.storage)
        if parameter.storage == "f32":
            target: Any = np.float32
        elif parameter.storage == "i64":
            target = np.int32
        elif form is not None:
            target = _FLOAT.get(dtype)
        else:
            target = _FLOAT.get(dtype, ml_dtypes.bfloat16)
        return cls(checkpoint, path, parameter, form, target, pool)

    def placement(self, mesh: Mesh | None, rules: Rules) -> NamedSharding | None:
        """Where the leaf goes, codes and scales alike; None without a mesh."""
        if mesh is None:
            return None
        # Native shards end where blocks end; float ones may end anywhere.
        lead = len(self.parameter.shape) - 2
        multiples = (1,) * lead + self.form.block if self.form and self.target is None else None
        return sharding(
            mesh, self.parameter.axes, self.parameter.shape, rules, multiples=multiples, name="/".join(self.path)
        )

    def load(self, place: NamedSharding | None) -> Any:
        """The leaf as an array or `BlockScaled`."""
        shape = self.parameter.shape
        if self.form is None or self.target is not None:
            return _assemble((shape,), place, self._plain)[0]
        codes, scales = _assemble((shape, scale_shape(shape, self.form.block)), place, self._blocks)
        return BlockScaled(codes, scales, self.form.block)

    def _tensors(self, index: Index) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yields each released tensor in a range of the leaf: its place in that range, and its name."""
        ranges = [range(*part.indices(size)) for part, size in zip(index, self.parameter.shape, strict=True)]
        for place, name in self.parameter.tensors():
            if all(i in part for i, part in zip(place, ranges, strict=False)):
                yield tuple(i - part.start for i, part in zip(place, ranges, strict=False)), name

    def _plain(self, index: Index) -> tuple[np.ndarray]:
        """A range of the leaf as a plain array."""
        out = _aligned(_size(index, self.parameter.shape), self.target)
        lead = len(next(self.parameter.tensors())[0])

        def read(item: tuple[tuple[int, ...], str]) -> None:
            place, name = item
            out[place] = self._values(name, *index[lead:]).astype(self.target)

        list(self.pool.map(read, self._tensors(index)))
        return (out,)

    def _blocks(self, index: Index) -> tuple[np.ndarray, np.ndarray]:
        """A range of the leaf as codes and scales; it begins and ends where blocks do."""
        assert self.form is not None
        size = _size(index, self.parameter.shape)
        codes = _aligned(size, self.form.element)
        scales_dtype = DTYPES[self.checkpoint.formats.scales(self.parameter.storage)]
        scales = _aligned(scale_shape(size, self.form.block), scales_dtype)

        def read(item: tuple[tuple[int, ...], str]) -> None:
            place, name = item
            stored, scales[place] = self._stored(name, *index[-2:])
            codes[place] = unpack(stored) if self.form is not None and self.form.packing == 2 else stored

        list(self.pool.map(read, self._tensors(index)))
        return codes, scales

    def _values(self, name: str, *parts: slice) -> np.ndarray:
        """Values of a rectangle of one released tensor, as exactly as the checkpoint has them."""
        values = self.checkpoint.unrounded(name, *parts)
        if values is not None:
            return values
        if self.form is not None:
            return self._decoded(name, *parts)
        values = self.checkpoint.read(name, *parts)
        if self.parameter.storage == "i64":
            check_expert_ids(name, values, self.checkpoint.config)
        return values

    def _decoded(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        """Float32 values of a rectangle of a block-scaled tensor that may begin and end anywhere."""
        assert self.form is not None
        shape = self.parameter.shape[-2:]
        outer, inner = [], []
        for part, size, block in zip((rows, columns), shape, self.form.block, strict=True):
            start, stop, _ = part.indices(size)
            corner = start // block * block
            outer.append(slice(corner, min(-(-stop // block) * block, size)))
            inner.append(slice(start - corner, stop - corner))
        return dequantise(*self._stored(name, *outer), self.form)[tuple(inner)]

    def _stored(self, name: str, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """Codes as stored and scales of a rectangle of whole blocks, after checking that they make sense together."""
        assert self.form is not None
        height, width = self.parameter.shape[-2:]
        codes = self.checkpoint.read(name, *_scaled((rows, columns), (height, width), (1, self.form.packing)))
        parts = _scaled((rows, columns), (height, width), self.form.block)
        scales = self.checkpoint.read(scale_name(name), *parts)
        check_scales(scale_name(name), scales, self.form)
        check_range(name, codes, scales, self.form)
        return codes, scales


def _scaled(parts: tuple[slice, slice], sizes: tuple[int, int], units: tuple[int, int]) -> list[slice]:
    """Ranges of elements as ranges of units of several elements; whole dimensions stay whole."""
    ranges = []
    for part, size, unit in zip(parts, sizes, units, strict=True):
        start, stop, _ = part.indices(size)
        whole = (start, stop) == (0, size)
        ranges.append(slice(None) if whole else slice(start // unit, -(-stop // unit)))
    return ranges


def _size(index: Index, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that XLA:CPU takes over as it is; one that is not aligned so would be copied."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _assemble(shapes: tuple[tuple[int, ...], ...], place: NamedSharding | None, fill: Fill) -> list[jax.Array]:
    """Arrays of the same placement, filled together.

    This is `jax.make_array_from_callback` for several arrays at once, so that codes and scales are read together, and
    with each shard handed to its devices before the next is read, so that the host holds one shard rather than all.
    """
    if place is None:
        return jax.block_until_ready([jax.device_put(values) for values in fill((slice(None),) * len(shapes[0]))])
    by_index: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in place.addressable_devices_indices_map(shapes[0]).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shapes[0], strict=True))
        by_index.setdefault(bounds, []).append(device)
    shards: list[list[jax.Array]] = [[] for _ in shapes]
    for bounds, devices in by_index.items():
        for made, values in zip(shards, fill(tuple(slice(*part) for part in bounds)), strict=True):
            made.extend(jax.device_put(values, device) for device in devices)
        jax.block_until_ready([made[-len(devices) :] for made in shards])
    return [
        jax.make_array_from_single_device_arrays(shape, place, made) for shape, made in zip(shapes, shards, strict=True)
    ]
