"""Released checkpoint to Orbax, part by part: no more than one layer of it is ever in memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from v4_jax.checkpoint.building import Written, building, copy_companions, require_space
from v4_jax.checkpoint.converted import MANIFEST, manifest
from v4_jax.checkpoint.digests import DIGESTS, Digests
from v4_jax.checkpoint.interface import Checkpoint, Progress
from v4_jax.checkpoint.mapping import Entry, entries, part_names
from v4_jax.checkpoint.opening import Source, opened
from v4_jax.checkpoint.orbax_arrays import chunking, nested, quiet

# TensorStore copies what it writes and holds it until a file is full: at its default of 2 GB that doubles a layer.
_FILE_BYTES = 64 << 20


def convert(source: Source, target: str | Path, *, progress: Progress | None = None) -> Written:
    """Writes a checkpoint as one Orbax directory per layer, in the released number formats.

    The target appears when it is complete. An interrupted run is continued by calling again with the same arguments:
    finished layers are kept.

    Args:
      source: a released directory (or anything else that `open_checkpoint` reads).
      target: directory to make; must not exist.
      progress: called as progress(part, done bytes, total bytes).

    Returns:
      What was written.

    Raises:
      CheckpointError: the source cannot be trusted, the target exists, or the disk is full.
    """
    with opened(source) as checkpoint, building(target, checkpoint, "orbax") as working:
        for unfinished in working.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished)
        table = entries(checkpoint.config, checkpoint.formats)
        done, resumed = 0, 0
        for part in part_names(checkpoint.config):
            tensors = {name: entry for name, entry in table.items() if entry.part == part}
            size = sum(entry.info.nbytes for entry in tensors.values())
            if (working / part).exists():
                if not (working / part / DIGESTS).exists():  # killed between the two
                    Digests(working / part).write()
                done, resumed = done + size, resumed + 1
                if progress:
                    progress(part, done, checkpoint.nbytes)
                continue
            require_space(working, size, part)
            report = _from(progress, part, done, checkpoint.nbytes)
            _save(working / part, _gather(checkpoint, tensors, report))
            Digests(working / part).write()
            _return_freed_memory()
            done += size
        copy_companions(checkpoint, working)
        (working / MANIFEST).write_text(json.dumps(manifest(checkpoint), indent=2) + "\n")
        return Written(Path(target), len(table), checkpoint.nbytes, resumed)


def _from(progress: Progress | None, part: str, done: int, total: int) -> Any:
    """A callback that adds up bytes from `done` on."""
    position = done

    def add(nbytes: int) -> None:
        nonlocal position
        position += nbytes
        if progress:
            progress(part, position, total)

    return add


def _gather(checkpoint: Checkpoint, tensors: Mapping[str, Entry], report: Any) -> dict[str, np.ndarray]:
    """Reads a part: key -> array, with all experts of a weight in one array."""
    experts = checkpoint.config.n_routed_experts
    arrays: dict[str, np.ndarray] = {}
    for name, entry in tensors.items():
        if entry.expert is None:
            arrays[entry.key] = checkpoint.read(name)
        else:
            if entry.key not in arrays:
                arrays[entry.key] = np.empty((experts, *entry.info.shape), entry.info.numpy_dtype)
            arrays[entry.key][entry.expert] = checkpoint.read(name)
        report(entry.info.nbytes)
    return arrays


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes one Orbax PyTree checkpoint; Orbax renames it into place when it is complete."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    tree = nested(arrays)
    chunks = nested({key: chunking(array) for key, array in arrays.items()})
    with quiet():
        # By default Orbax copies every array first, against changes by the caller; these are ours alone.
        handlers = type_handlers.create_type_handler_registry(
            (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False))
        )
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True,
            use_zarr3=False,
            use_compression=False,  # low-precision weights do not compress
            type_handler_registry=handlers,
        )
        with ocp.Checkpointer(handler) as checkpointer:
            options = ocp.args.PyTreeSave(tree, save_args=chunks, ocdbt_target_data_file_size=_FILE_BYTES)
            checkpointer.save(path, args=options)


def _return_freed_memory() -> None:
    """Gives freed memory back to the system.

    Chunks are copied by many threads, and glibc keeps what each of them freed: without this, memory creeps up from
    layer to layer until it has doubled.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
