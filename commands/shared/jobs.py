"""What `plan` compiles and `bench` runs, from the options that both have."""

from __future__ import annotations

from v4_jax.commands.shared.console import CommandError
from v4_jax.commands.shared.contexts import check_length
from v4_jax.commands.shared.sizes import format_size
from v4_jax.config import Config
from v4_jax.number_formats import INDEX_BLOCK, KV_BLOCK
from v4_jax.on_mesh import UNIT
from v4_jax.planning.estimates import presets_of
from v4_jax.planning.job import Job, Task, WeightFormat, without_mtp
from v4_jax.sharding.axes import MESH_AXES
from v4_jax.sharding.axes import PRESETS as SHARDING_PRESETS

_CONTEXT = 1024**2
_CHUNK = 8192  # tokens per row of a prefill call, unless so many devices need more
_ROW = 16384  # tokens per row of a training step


def job_of(
    whole: Config,
    task: Task,
    *,
    devices: int,
    context: int | None,
    batch: int,
    chunk: int | None,
    preset: str | None,
    dtype: WeightFormat,
) -> Job:
    """A job on a mesh that is yet to be chosen, with every axis of one device.

    Args:
      whole: the model, with what drafts.
      task: decode, prefill, train, sft or dspark.
      devices: how many there will be.
      context: tokens of a row when the call is over; None for the task's default.
      batch: rows.
      chunk: tokens of a row that a prefill call takes; None for the default, and otherwise.
      preset: the sharding preset; None for what suits the task.
      dtype: format of the weights.

    Raises:
      CommandError: what was given makes no job.
    """
    if preset is not None and preset not in SHARDING_PRESETS:
        raise CommandError(f"no preset {preset!r}; expected one of {', '.join(SHARDING_PRESETS)}")
    trains = task in ("train", "sft", "dspark")
    if task == "dspark" and not whole.dspark_stages:
        raise CommandError("--task dspark trains DSpark's stages, and this model has none; expected one that has them")
    config = whole if trains else without_mtp(whole)
    context = min(_ROW if trains else _CONTEXT, config.max_position_embeddings) if context is None else context
    check_length(config, context)
    if chunk is not None and task != "prefill":
        takes = "decode takes one token of each row" if task == "decode" else "training takes whole rows"
        raise CommandError(f"--chunk is for prefill: {takes}")
    if chunk is None:
        taken = {"decode": 1, "prefill": min(context, max(_CHUNK, UNIT * devices))}
        chunk = taken.get(task, context)
    if chunk > context:
        raise CommandError(f"--chunk {format_size(chunk)} is more than --context {format_size(context)}")
    odd = config.nope_head_dim % KV_BLOCK or config.index_head_dim % INDEX_BLOCK
    if not trains and dtype == "native" and odd:
        raise CommandError(
            f"--dtype native rounds keys in blocks of {KV_BLOCK} non-rotary and {INDEX_BLOCK} index channels, and the "
            f"model has {config.nope_head_dim} and {config.index_head_dim}; expected --dtype bfloat16"
        )
    sizes = dict.fromkeys(MESH_AXES, 1)
    preset = preset or presets_of(task, config, devices)[-1]
    return Job(config, task, context, batch, chunk, sizes, preset, "bfloat16" if task == "train" else dtype)
