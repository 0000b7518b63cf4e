"""Any checkpoint back to safetensors: one shard for the embedding, each layer, the head and what drafts.

The names are the released ones, but for BF16, which is what transformers reads: there they are its own, with the routed
experts of a layer stacked.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from v4_jax.checkpoint.building import Written, building, copy_companions, require_space
from v4_jax.checkpoint.interface import Checkpoint, Progress
from v4_jax.checkpoint.mapping import Entry, entries, part_names
from v4_jax.checkpoint.names import in_stack, transformers_name
from v4_jax.checkpoint.opening import Source, opened
from v4_jax.checkpoint.reformatting import Format, reformatted
from v4_jax.checkpoint.released import INDEX
from v4_jax.checkpoint.safetensors import file_order, write_file
from v4_jax.checkpoint.tensors import TensorInfo


def export(
    source: Source, target: str | Path, *, format: Format = "released", progress: Progress | None = None
) -> Written:
    """Writes `config.json`, `model-0000i-of-0000N.safetensors` shards and their index.

    What is held in the released formats is written bit for bit. Float parameters are quantised as the release is
    (`number_formats.quantise`); plain tensors are cast to their released dtype. The target appears when it is complete,
    and an interrupted run from a directory is continued by calling again.

    Args:
      source: a directory, released or converted; a training run or one of its steps; or (config, params).
      target: directory to make; must not exist.
      format: "released"; "bf16" for all weights in BF16, under the names of transformers; "fp8" for the released layout
        with FP4 experts as FP8 of exactly the same values.
      progress: called as progress(shard, done bytes, total bytes).

    Returns:
      What was written.

    Raises:
      CheckpointError: the source cannot be trusted or cannot be had in this format, the target exists, or the disk is
        full.
    """
    with contextlib.ExitStack() as stack:
        checkpoint = reformatted(stack.enter_context(opened(source)), format)
        working = stack.enter_context(building(target, checkpoint, format))
        table = entries(checkpoint.config, checkpoint.formats)
        parts = part_names(checkpoint.config)
        weight_map: dict[str, str] = {}
        done, resumed = 0, 0
        for number, part in enumerate(parts, start=1):
            shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            released = {name: entry for name, entry in table.items() if entry.part == part}
            items = _of_transformers(released) if format == "bf16" else _as_released(released)
            tensors = dict(file_order({name: item.info for name, item in items.items()}))
            size = sum(info.nbytes for info in tensors.values())
            if (working / shard).exists():
                resumed += 1
                if progress:
                    progress(shard, done + size, checkpoint.nbytes)
            else:
                require_space(working, size, shard)
                members = [member for name in tensors for member in items[name].members]
                write_file(working / shard, tensors, _data(checkpoint, members, shard, done, progress))
            done += size
            weight_map.update(dict.fromkeys(tensors, shard))
        index = {"metadata": {"total_size": done}, "weight_map": weight_map}
        (working / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        copy_companions(checkpoint, working)
        return Written(Path(target), len(weight_map), done, resumed)


class _Item(NamedTuple):
    """A tensor of a file, and the released ones that make it up, one after another."""

    info: TensorInfo
    members: list[str]


def _as_released(part: Mapping[str, Entry]) -> dict[str, _Item]:
    return {name: _Item(entry.info, [name]) for name, entry in part.items()}


def _of_transformers(part: Mapping[str, Entry]) -> dict[str, _Item]:
    """Plain tensors under transformers' names; of a stack, all members are of the same part."""
    items: dict[str, _Item] = {}
    stacks: dict[str, dict[tuple[int, int], str]] = {}
    for name, entry in part.items():
        if place := in_stack(name):
            stacks.setdefault(place.name, {})[place.expert, place.part] = name
        else:
            items[transformers_name(name)] = _Item(entry.info, [name])
    for name, places in stacks.items():
        experts, parts = (1 + max(place[axis] for place in places) for axis in (0, 1))
        dtype, (rows, columns) = part[places[0, 0]].info
        info = TensorInfo(dtype, (experts, parts * rows, columns))
        items[name] = _Item(info, [places[place] for place in sorted(places)])
    return items


def _data(
    checkpoint: Checkpoint, members: list[str], shard: str, done: int, progress: Progress | None
) -> Iterator[np.ndarray]:
    """Yields the shard's data in its order, in pieces, reporting progress."""
    for name in members:
        for _, piece in checkpoint.pieces(name):
            yield piece
            done += piece.nbytes
            if progress:
                progress(shard, done, checkpoint.nbytes)
