"""`v4-jax export`: a converted checkpoint or a training run as safetensors, in the released layout or for others."""

from __future__ import annotations

import functools

from v4_jax import checkpoint
from v4_jax.commands.shared.options import Directory
from v4_jax.commands.shared.writing import write


def export(source: Directory, target: Directory, /, *, format: checkpoint.Format = "released") -> None:
    """Writes a checkpoint as safetensors shards, their index and config.json.

    What is held in the released formats is written bit for bit; a training run's newest complete step is rounded to
    them. TARGET appears when it is complete; an interrupted run is continued by giving the same command again.

    Examples:
      v4-jax export flash-orbax DeepSeek-V4-Flash-again
      v4-jax verify DeepSeek-V4-Flash DeepSeek-V4-Flash-again
      v4-jax export my-run my-model
      v4-jax export DeepSeek-V4-Flash flash-bf16 --format bf16
      v4-jax export DeepSeek-V4-Flash flash-fp8 --format fp8

    Args:
      source: A converted or released directory (also gs:// and hf://), a training run, or RUN/checkpoints/STEP for an
        older step of one.
      target: The directory to make.
      format: "released", the layout of the release; "bf16", all weights in BF16 under the names of transformers;
        "fp8", the released layout with FP4 experts as FP8 of exactly the same values.
    """
    write(functools.partial(checkpoint.export, format=format), source, target, "exporting")
