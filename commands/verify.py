"""`v4-jax verify`: two checkpoints, tensor by tensor."""

from __future__ import annotations

from v4_jax import checkpoint
from v4_jax.commands.shared.console import bad_input, progress_bar, show
from v4_jax.commands.shared.options import Count, Directory
from v4_jax.commands.shared.writing import require_directory
from v4_jax.commands.verify_report import differences, kinds_table


def verify(a: Directory, b: Directory, /, *, rows: Count = 20) -> int:
    """Compares two checkpoints tensor by tensor and bit by bit, a few megabytes at a time.

    Released and converted directories and training runs (as they would be exported) can be compared in any
    combination. The exit code is 0 if they hold the same configuration and the same tensors, and 1 if they differ.

    Examples:
      v4-jax verify DeepSeek-V4-Flash flash-orbax

    Args:
      a: A released or converted directory, or a training run.
      b: The directory to compare it with.
      rows: Most tensors that differ to list.
    """
    for path in (a, b):
        require_directory(path)
    with bad_input(), progress_bar("verifying") as report:
        comparison = checkpoint.verify(a, b, progress=report)
    show(kinds_table(comparison))
    if not comparison.equal:
        show(*differences(comparison, rows))
    return 0 if comparison.equal else 1
