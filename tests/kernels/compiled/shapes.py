"""Shapes of operands, and what a compiled program does with them."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

from v4_jax.layer_stack import Cut
from v4_jax.number_formats import E2M1, E4M3, E8M0, FP4_BLOCK, FP8_BLOCK, BlockScaled, scale_shape

CODES = {"e2m1": (E2M1, FP4_BLOCK), "e4m3": (E4M3, FP8_BLOCK)}
SPARE = 4 << 20  # bytes: lists of visits and rows of a decode step; one expert in bfloat16 has 16 MiB
LAYERS = 20
PROJECTED = {"e4m3": (1024, 512), "bfloat16": (1024, 1024, 64, 256, 256)}


def shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype)


def weight(form, *sizes):
    if form == "bfloat16":
        return shape(jnp.bfloat16, *sizes)
    codes, block = CODES[form]
    return BlockScaled(shape(codes, *sizes), shape(E8M0, *scale_shape(sizes, block)), block)


def copied(compiled):
    """Bytes of the largest weight-like array that is copied or converted, wherever to."""
    kinds, moves = "f4|f8|s4|u8|bf16", "copy|transpose|bitcast-convert|convert"
    made = re.findall(rf"= (?:{kinds})\w*\[([\d,]+)\]\S* (?:{moves})\(", compiled.as_text())
    return max((int(np.prod([int(size) for size in sizes.split(",")])) for sizes in made), default=0)


def cuts(stacks, number):
    """Arrays as layers get them."""
    return jax.tree.map(lambda stack: Cut(stack[number], stack, number), stacks)
