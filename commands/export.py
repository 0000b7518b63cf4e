"""`v4-jax export`: a converted checkpoint or a training run as safetensors, in the released layout or for others."""

from __future__ import annotations

import functools
from typing import Literal

from v4_jax import checkpoint
from v4_jax.commands.shared.options import Directory
from v4_jax.commands.shared.writing import write


def export(
    source: Directory, target: Directory, /, *, format: Literal["released", "bf16", "fp8", "adapters"] = "released"
) -> None:
    """Writes a checkpoint as safetensors shards, their index and config.json.

    What is held in the released formats is written bit for bit; a training run's newest complete step is rounded to
    them. TARGET appears when it is complete; an interrupted run is continued by giving the same command again.

    Examples:
      v4-jax export flash-orbax DeepSeek-V4-Flash-again
      v4-jax verify DeepSeek-V4-Flash DeepSeek-V4-Flash-again
      v4-jax export my-run my-model
      v4-jax export DeepSeek-V4-Flash flash-bf16 --format bf16
      v4-jax export DeepSeek-V4-Flash flash-fp8 --format fp8
      v4-jax export my-run my-adapters --format adapters

    Args:
      source: A converted or released directory (also gs:// and hf://), a training run, or RUN/checkpoints/STEP for an
        older step of one.
      target: The directory to make.
      format: "released", the layout of the release; "bf16", all weights in BF16 under the names of transformers;
        "fp8", the released layout with FP4 experts as FP8 of exactly the same values; "adapters", of a run with
        lora the adapters alone, as PEFT lays them out.
    """
    if format == "adapters":
        write(checkpoint.export_adapters, source, target, "exporting")
        return
    write(functools.partial(checkpoint.export, format=format), source, target, "exporting")
