"""Parameters in memory, presented as the released tensors they would be stored as."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from v4_jax.checkpoint.block_formats import OF_NAME, SCALE_TYPES, BlockFormat, Formats, ScaleType, pack
from v4_jax.checkpoint.interface import Checkpoint, rectangle
from v4_jax.checkpoint.mapping import Entry, Path, Role, entries, leaves
from v4_jax.checkpoint.tensors import DTYPES, CheckpointError, names_in
from v4_jax.config import Config
from v4_jax.number_formats import BlockScaled, quantise
from v4_jax.parameters import Parameter, Storage

_quantise = jax.jit(quantise, static_argnums=(1, 2))


class InMemory(Checkpoint):
    """A parameter tree, native or in floats. Block-scaled leaves are handed out bit for bit, float ones quantised."""

    def __init__(self, config: Config, params: Any):
        """Matches a tree against the declarations.

        Args:
          config: the architecture.
          params: the tree of `v4_jax.declarations(config)`; leaves that the release stores in blocks are `BlockScaled`
            or float arrays, boxed or not. Anything with a shape, a dtype and an index for the stacked axes is an array.

        Raises:
          CheckpointError: a missing, unknown or mis-shaped leaf, or one in another format than the configuration's.
        """
        super().__init__()
        self.label = "the parameters"
        self._leaves = _flatten(nn.meta.unbox(params))
        declared = leaves(config)
        if missing := sorted("/".join(path) for path in set(declared) - set(self._leaves)):
            raise CheckpointError(f"the parameters lack {names_in(missing)}")
        if unknown := sorted("/".join(path) for path in set(self._leaves) - set(declared)):
            raise CheckpointError(f"the parameters hold {names_in(unknown)}, which the configuration has no place for")
        experts = [self._leaves[path] for path, parameter in declared.items() if parameter.storage == "expert"]
        if config.expert_dtype == "nvfp4" and not any(isinstance(leaf, BlockScaled) for leaf in experts):
            config = dataclasses.replace(config, expert_dtype="fp4")  # NVFP4 is read and kept, but not made
        self.config, self.hf_config = config, config.to_hf()
        scales: dict[Storage, ScaleType] = {}
        for path, parameter in declared.items():
            form = Formats.of(config).block(parameter.storage)
            found = _check_leaf("/".join(path), parameter, form, self._leaves[path])
            if found and scales.setdefault(parameter.storage, found) != found:
                raise CheckpointError(
                    f"{'/'.join(path)} has {found} scales, others have {scales[parameter.storage]}: expected one type"
                )
        self.formats = Formats.of(config, scales)
        self._entries = entries(config, self.formats)
        self.tensors = {name: entry.info for name, entry in self._entries.items()}
        self._last = threading.local()  # loading reads with several threads, each a tensor of its own

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Reads a tensor or a rectangle of it; see `Checkpoint.read`."""
        entry = self._entries[name]
        wanted = entry.path, entry.place
        if getattr(self._last, "place", None) != wanted:  # codes and scales are asked for one after the other
            self._last.place, self._last.arrays = wanted, self._tensor(name, entry)
        array = self._last.arrays[entry.role]
        return self._count(rectangle(array, rows, columns))

    def unrounded(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray | None:
        """Reads a rectangle of a float leaf as it is; see `Checkpoint.unrounded`."""
        entry = self._entries[name]
        leaf = self._leaves[entry.path]
        if isinstance(leaf, BlockScaled) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return None
        array = _on_host(leaf, entry.place)
        return self._count(rectangle(array, rows, columns))

    def close(self) -> None:
        """Forgets the tensors read last."""
        self._last = threading.local()

    def _tensor(self, name: str, entry: Entry) -> Mapping[Role, np.ndarray]:
        """One layer's or expert's share of a leaf, as stored."""
        leaf = self._leaves[entry.path]
        storage = leaves(self.config)[entry.path].storage
        if not isinstance(leaf, BlockScaled):
            array = _on_host(leaf, entry.place)
            if storage == "i64":
                check_expert_ids(name, array, self.config)
            return rounded(name, array, entry, storage, self.formats)
        form = self.formats.block(storage)
        assert form is not None
        return _packed(_on_host(leaf.codes, entry.place), _on_host(leaf.scales, entry.place), form)


def rounded(
    name: str, values: np.ndarray, entry: Entry, storage: Storage, formats: Formats
) -> Mapping[Role, np.ndarray]:
    """A tensor as stored, from one layer's or expert's plain values.

    Raises:
      CheckpointError: a number that is not finite where it would make zeros of its block.
    """
    form = formats.block(storage)
    if form is None:
        return {"plain": values.astype(entry.info.numpy_dtype)}
    if not (finite := np.isfinite(values)).all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise CheckpointError(
            f"{name} holds {values[place]} at {list(place)} (and {(~finite).sum() - 1} more), expected finite numbers: "
            f"{form.name.upper()} keeps no others"
        )
    made = _quantise(values, form.element, DTYPES[formats.scales(storage)])
    return _packed(np.asarray(made.codes), np.asarray(made.scales), form)


def _packed(codes: np.ndarray, scales: np.ndarray, form: BlockFormat) -> Mapping[Role, np.ndarray]:
    return {"codes": pack(codes) if form.packing == 2 else codes, "scales": scales}


def _on_host(array: Any, place: tuple[int, ...]) -> np.ndarray:
    """One place on the stacked axes of an array, put together from its shards.

    Indexing a sharded array would leave this to the partitioner, which adds up masked shards: -0 would become +0.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array[place])
    out = np.empty(array.shape[len(place) :], array.dtype)
    for shard in array.addressable_shards:
        ranges = [range(*part.indices(size)) for part, size in zip(shard.index, array.shape, strict=True)]
        if shard.replica_id == 0 and all(i in part for i, part in zip(place, ranges, strict=False)):
            local = tuple(i - part.start for i, part in zip(place, ranges, strict=False))
            out[shard.index[len(place) :]] = shard.data[local]
    return out


def check_expert_ids(name: str, ids: np.ndarray, config: Config) -> None:
    """Refuses a hash table that points at experts which do not exist.

    Raises:
      CheckpointError: an id outside 0 to n_routed_experts - 1.
    """
    if ids.size and not (ids.min() >= 0 and ids.max() < config.n_routed_experts):
        raise CheckpointError(
            f"{name} holds expert ids {ids.min()} to {ids.max()}, expected 0 to {config.n_routed_experts - 1}"
        )


def _flatten(params: Any, path: Path = ()) -> dict[Path, Any]:
    if isinstance(params, Mapping):
        return {key: leaf for name, node in params.items() for key, leaf in _flatten(node, (*path, name)).items()}
    return {path: params}


def _check_leaf(name: str, parameter: Parameter, form: BlockFormat | None, leaf: Any) -> ScaleType | None:
    """Checks one leaf against its declaration; returns the type of its scales, if it has them."""
    if tuple(leaf.shape) != tuple(parameter.shape):
        raise CheckpointError(f"{name} has shape {tuple(leaf.shape)}, expected {tuple(parameter.shape)}")
    for array in jax.tree.leaves(leaf):
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise CheckpointError(f"{name} is spread over several processes: gather it on one before exporting")
    if not isinstance(leaf, BlockScaled):
        kind = jnp.integer if parameter.storage == "i64" else jnp.floating
        if not jnp.issubdtype(leaf.dtype, kind):
            raise CheckpointError(f"{name} has dtype {leaf.dtype}, expected a subtype of {kind.__name__}")
        return None
    if form is None:
        raise CheckpointError(f"{name} is block-scaled, expected a plain array")
    if jnp.dtype(leaf.codes.dtype) != jnp.dtype(form.element) or tuple(leaf.block) != form.block:
        raise CheckpointError(
            f"{name} has {leaf.codes.dtype} codes in blocks of {leaf.block}, expected {jnp.dtype(form.element)} in "
            f"{form.block}; formats are {sorted(OF_NAME)}, of which config.expert_dtype chooses the experts'"
        )
    for scales in SCALE_TYPES:
        if DTYPES[scales] == leaf.scales.dtype:
            return scales
    raise CheckpointError(f"{name} has {leaf.scales.dtype} scales, expected F8_E8M0 or F32")
