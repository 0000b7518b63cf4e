"""How fast something was, and what memory it took, as every verb says it."""

from __future__ import annotations

from v4_jax.commands.shared.sizes import bytes_text
from v4_jax.infer.memory import peak_memory


def rate_text(tokens: int, seconds: float) -> str:
    """Tokens, seconds, and how many a second that is."""
    return f"{tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):,.1f} tokens/s)"


def memory_text() -> str:
    """The most memory so far, in words."""
    peak, of_device = peak_memory()
    return f"memory at most {bytes_text(peak)}{' of a device' if of_device else ''}"
