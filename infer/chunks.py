"""Texts are read in chunks of one static size, the last one padded: a million tokens and five take the same program."""

from __future__ import annotations

from collections.abc import Callable

SMALLEST_CHUNK = 16  # shorter prompts are padded to this: fewer programs for no measurable time

Progress = Callable[[int, int], None]  # called with what is done, and what there is to do


def chunk_size(longest: int, largest: int) -> int:
    """The static chunk for texts of up to `longest` tokens: a power of two, or `largest` where that is smaller.

    Powers of two, so that prompts of all lengths share a handful of programs.
    """
    return min(largest, max(SMALLEST_CHUNK, 1 << (longest - 1).bit_length()))
