"""What differs by platform, decided by the platform that a program is compiled for and not by the process's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def by_platform(*operands: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """Runs the form of the platform that the program is compiled for, `cpu` or `tpu`, where there is one.

    A cross-compiling host is no exception: a CPU that compiles for TPUs takes the TPU's.

    Args:
      *operands: pytrees of arrays.
      default: what runs on other platforms.
      **forms: by platform, of the same signature and results.
    """
    return jax.lax.platform_dependent(*operands, default=default, **forms)
