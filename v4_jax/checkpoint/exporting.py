"""Any checkpoint back to the released layout: one shard for the embedding, each layer, the head and the MTP block."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from v4_jax.checkpoint.building import Written, building, copy_companions, require_space
from v4_jax.checkpoint.interface import Checkpoint, Progress
from v4_jax.checkpoint.mapping import entries, part_names
from v4_jax.checkpoint.opening import Source, opened
from v4_jax.checkpoint.released import INDEX
from v4_jax.checkpoint.safetensors import file_order, write_file
from v4_jax.checkpoint.tensors import TensorInfo


def export(source: Source, target: str | Path, *, progress: Progress | None = None) -> Written:
    """Writes the released layout: `config.json`, `model-0000i-of-0000N.safetensors` shards and their index.

    What is held in the released formats is written bit for bit. Float parameters are quantised as the release is
    (`number_formats.quantise`); plain tensors are cast to their released dtype. The target appears when it is complete,
    and an interrupted run from a directory is continued by calling again.

    Args:
      source: a directory, released or converted; a training run or one of its steps; or (config, params).
      target: directory to make; must not exist.
      progress: called as progress(shard, done bytes, total bytes).

    Returns:
      What was written.

    Raises:
      CheckpointError: the source cannot be trusted, the target exists, or the disk is full.
    """
    with opened(source) as checkpoint, building(target, checkpoint, "released") as working:
        table = entries(checkpoint.config, checkpoint.formats)
        parts = part_names(checkpoint.config)
        weight_map: dict[str, str] = {}
        done, resumed = 0, 0
        for number, part in enumerate(parts, start=1):
            shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            tensors = dict(file_order({name: entry.info for name, entry in table.items() if entry.part == part}))
            size = sum(info.nbytes for info in tensors.values())
            if (working / shard).exists():
                resumed += 1
                if progress:
                    progress(shard, done + size, checkpoint.nbytes)
            else:
                require_space(working, size, shard)
                write_file(working / shard, tensors, _data(checkpoint, tensors, shard, done, progress))
            done += size
            weight_map.update(dict.fromkeys(tensors, shard))
        index = {"metadata": {"total_size": done}, "weight_map": {name: weight_map[name] for name in table}}
        (working / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        copy_companions(checkpoint, working)
        return Written(Path(target), len(table), done, resumed)


def _data(
    checkpoint: Checkpoint, tensors: dict[str, TensorInfo], shard: str, done: int, progress: Progress | None
) -> Iterator[np.ndarray]:
    """Yields the shard's data in its order, in pieces, reporting progress."""
    for name in tensors:
        for _, piece in checkpoint.pieces(name):
            yield piece
            done += piece.nbytes
            if progress:
                progress(shard, done, checkpoint.nbytes)
