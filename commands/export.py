"""`v4-jax export`: a converted checkpoint or a training run in the released layout."""

from __future__ import annotations

from v4_jax import checkpoint
from v4_jax.commands.shared.options import Directory
from v4_jax.commands.shared.writing import write


def export(source: Directory, target: Directory, /) -> None:
    """Writes a checkpoint in the released layout: safetensors shards, their index and config.json.

    What is held in the released formats is written bit for bit; a training run's newest complete step is rounded to
    them. TARGET appears when it is complete; an interrupted run is continued by giving the same command again.

    Examples:
      v4-jax export flash-orbax DeepSeek-V4-Flash-again
      v4-jax verify DeepSeek-V4-Flash DeepSeek-V4-Flash-again
      v4-jax export my-run my-model

    Args:
      source: A converted or released directory, a training run, or RUN/checkpoints/STEP for an older step of one.
      target: The directory to make.
    """
    write(checkpoint.export, source, target, "exporting")
