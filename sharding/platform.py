"""What differs by platform, decided by the platform that a program is compiled for and not by the process's own."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

_interpreted = contextvars.ContextVar("interpreted", default=False)

# Is told of every choice that is traced: its operands, the default and the forms by platform.
Watcher = Callable[[tuple[Any, ...], Callable[..., Any], dict[str, Callable[..., Any]]], None]
_watcher: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("watcher", default=None)


def by_platform(*operands: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """Runs the form of the platform that the program is compiled for, `cpu` or `tpu`, where there is one.

    A cross-compiling host is no exception: a CPU that compiles for TPUs takes the TPU's.

    Args:
      *operands: pytrees of arrays.
      default: what runs on other platforms.
      **forms: by platform, of the same signature and results.
    """
    if (watcher := _watcher.get()) is not None:
        with choices_watched(None):  # what it traces is no choice of the program's
            watcher(operands, default, forms)
    if interpreting() and "tpu" in forms:
        return forms["tpu"](*operands)
    return jax.lax.platform_dependent(*operands, default=default, **forms)


def platform_of_mesh() -> str | None:
    """The platform that what is traced now will run on, where a mesh tells: "cpu", "tpu"; None where there is none.

    For how work is cut, which changes no numbers, and whether a backward pass keeps values or computes them again.
    What computes is for `by_platform` to choose; the exchange of rows is told here first (`exchange.exchange`).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "tpu" if interpreting() else getattr(device, "platform", None)


@contextlib.contextmanager
def choices_watched(watcher: Watcher | None) -> Iterator[None]:
    """What is traced within calls `watcher` at every `by_platform`, inside the trace: to compare the forms."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """What is traced within takes the TPU's forms on any platform, with kernels in interpret mode: for tests."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def interpreting() -> bool:
    """Whether kernels that are traced now are to run in interpret mode."""
    return _interpreted.get()
