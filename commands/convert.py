"""`v4-jax convert`: a released checkpoint as an Orbax one, in the same number formats."""

from __future__ import annotations

from v4_jax import checkpoint
from v4_jax.commands.shared.options import Directory
from v4_jax.commands.shared.writing import write


def convert(source: Directory, target: Directory, /) -> None:
    """Converts a released checkpoint to Orbax, one part per layer, in the released number formats.

    Nothing is rounded and nothing is expanded: the result is as large as the release, and `verify` finds no
    difference. Memory stays bounded by one layer. TARGET appears when it is complete; an interrupted run is continued
    by giving the same command again.

    Examples:
      v4-jax convert DeepSeek-V4-Flash flash-orbax
      v4-jax verify DeepSeek-V4-Flash flash-orbax

    Args:
      source: The released directory: config.json, model.safetensors.index.json and its shards. It may be repackaged,
        and may lie elsewhere, as gs://BUCKET/DIRECTORY or hf://ORG/NAME[@REVISION].
      target: The directory to make.
    """
    write(checkpoint.convert, source, target, "converting")
