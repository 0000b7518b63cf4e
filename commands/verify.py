"""`v4-jax verify`: two checkpoints, tensor by tensor, or one against the digests that were written with it."""

from __future__ import annotations

from pathlib import Path

from v4_jax import checkpoint
from v4_jax.commands.shared.console import bad_input, progress_bar, say, show
from v4_jax.commands.shared.options import Count, Directory, OtherDirectory
from v4_jax.commands.shared.writing import require_directory
from v4_jax.commands.verify_report import differences, kinds_table
from v4_jax.json_files import escaped


def verify(a: Directory, b: OtherDirectory = None, /, *, rows: Count = 20) -> int:
    """Compares two checkpoints tensor by tensor and bit by bit, or checks one alone.

    Released and converted directories and training runs (as they would be exported) can be compared in any
    combination. The exit code is 0 if they hold the same configuration and the same tensors, and 1 if they differ.

    One converted directory or training run alone is compared with the digests that were written with it: the exit code
    is 1 if anything is not as it was written. A released directory has no digests: its headers are checked.

    Examples:
      v4-jax verify DeepSeek-V4-Flash flash-orbax
      v4-jax verify flash-orbax

    Args:
      a: A released or converted directory, or a training run.
      b: The directory to compare it with. Default: check the first one alone.
      rows: Most tensors that differ to list.
    """
    if b is None:
        return _alone(a, rows)
    for path in (a, b):
        require_directory(path)
    with bad_input(), progress_bar("verifying") as report:
        comparison = checkpoint.verify(a, b, progress=report)
    show(kinds_table(comparison))
    if not comparison.equal:
        show(*differences(comparison, rows))
    return 0 if comparison.equal else 1


def _alone(path: Path, rows: int) -> int:
    """Checks one directory."""
    require_directory(path)
    with bad_input(), progress_bar("verifying") as report:
        found = checkpoint.check(path, progress=report)
    for name in found.damaged[:rows]:
        print(f"damaged: {escaped(name)}")
    if left_out := len(found.damaged[rows:]):
        print(f"and {left_out:,} more (--rows)")
    if found.without:
        say(f"note: {path} has data without digests; its headers are in order, and its bytes may be anything")
    if not found.damaged and found.digests:
        print(f"{path}: everything with digests is as it was written")
    return 1 if found.damaged else 0
