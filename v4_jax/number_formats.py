"""The released number formats: block-scaled E4M3 and E2M1 weights, and the fake-quantisation of keys and queries.

Sources: technical report, sections 4.2 and 5.2, and the released checkpoints. E8M0 is a bare exponent: byte b means
2^(b - 127). Scales are powers of two throughout, so scaling is exact and encode . decode is the identity on its image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

E4M3 = jnp.float8_e4m3fn
E2M1 = jnp.float4_e2m1fn
E8M0 = jnp.float8_e8m0fnu

E4M3_MAX = 448.0
E2M1_MAX = 6.0

FP8_BLOCK = (128, 128)  # output x input elements that share a scale in an E4M3 weight
FP4_BLOCK = (1, 32)  # the same in an E2M1 weight
KV_BLOCK = 64  # non-rotary channels of a key/value row that share a scale
INDEX_BLOCK = 32  # channels of an index query or key that share a scale

NVFP4_BLOCK = (1, 16)  # the same in an NVFP4 weight, whose scales are float32 here: E4M3 times the tensor's own

_KV_AMAX_FLOOR = 1e-4
_INDEX_AMAX_FLOOR = 6.0 * 2.0**-126
_LARGEST_FLOAT = {jnp.dtype(E4M3): E4M3_MAX, jnp.dtype(E2M1): E2M1_MAX}


class Stack(struct.PyTreeNode):
    """Where a layer's weight was cut from: a kernel reads it there, so that no copy of it is made.

    Attributes:
      codes: [layers, ...] those of all layers.
      scales: [layers, ...] likewise.
      layer: int32 number of the layer among them.
    """

    codes: Any
    scales: Any
    layer: Any


class BlockScaled(struct.PyTreeNode):
    """A weight in low precision with one scale per block: `value = codes * scale of its block`.

    A pytree of two leaves that stands wherever a parameter array would. Leading axes (layers, experts) are shared.

    Attributes:
      codes: [..., out, in] E4M3 or E2M1.
      scales: [..., ceil(out / block[0]), ceil(in / block[1])] E8M0, or float32 in the Base checkpoints.
      block: elements of (out, in) under one scale.
      stack: the weights of all layers, of which it is one; None where they are not known.
    """

    codes: Any
    scales: Any
    block: tuple[int, int] = struct.field(pytree_node=False)
    stack: Stack | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it stands for."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Dimensions of the weight that it stands for."""
        return self.codes.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales in memory (E2M1 takes half a byte)."""
        return bytes_of(self.codes) + bytes_of(self.scales)


Weight = Array | BlockScaled


def bytes_of(array: Any) -> int:
    """Bytes that an array (or shape) occupies on a device, where 4-bit elements are packed in pairs."""
    bits = 4 if jnp.dtype(array.dtype) == E2M1 else 8 * jnp.dtype(array.dtype).itemsize
    return (int(np.prod(array.shape)) * bits + 7) // 8


class Layout(NamedTuple):
    """How a block-scaled weight is held: the dtype of its codes, elements under one scale, the dtype of the scales."""

    codes: Any
    block: tuple[int, int]
    scales: Any


def layout(storage: str, expert_dtype: str) -> Layout | None:
    """How a parameter is held in the released formats; None for a plain array.

    Args:
      storage: see `v4_jax.parameters.Storage`.
      expert_dtype: the configuration's. "fp8" marks the Base releases, where every scale is float32, and "bf16"
        checkpoints in which nothing is quantised.
    """
    if storage not in ("fp8", "expert") or expert_dtype == "bf16":
        return None
    if storage == "fp8" or expert_dtype == "fp8":
        return Layout(E4M3, FP8_BLOCK, jnp.float32 if expert_dtype == "fp8" else E8M0)
    return Layout(E2M1, NVFP4_BLOCK, jnp.float32) if expert_dtype == "nvfp4" else Layout(E2M1, FP4_BLOCK, E8M0)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a [..., out, in] weight."""
    *leading, rows, columns = shape
    return (*leading, -(-rows // block[0]), -(-columns // block[1]))


def scale_values(scales: Array) -> Array:
    """Scales as float32. An E8M0 byte is float32's exponent field; byte 0, 2^-127, is the one below its range.

    By integers rather than by a conversion, which the TPU compiler has been seen to crash on (v5p).
    """
    if scales.dtype != E8M0:
        return scales.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.uint32) << 23
    return jax.lax.bitcast_convert_type(jnp.maximum(bits, 1 << 22), jnp.float32)


def dequantise(weight: Weight, dtype: Any) -> Array:
    """The weight as a plain array [..., out, in] of `dtype`. A plain array is only cast."""
    if not isinstance(weight, BlockScaled):
        return weight.astype(dtype)
    rows, columns = weight.shape[-2:]
    scales = scale_values(weight.scales)
    scales = _repeated(scales, weight.block[0], rows, axis=-2)
    scales = _repeated(scales, weight.block[1], columns, axis=-1)
    return (weight.codes.astype(jnp.float32) * scales).astype(dtype)


def quantise(weight: Array, codes_dtype: Any, scales_dtype: Any = E8M0) -> BlockScaled:
    """Rounds a [..., out, in] weight to E4M3 in 128x128 blocks or to E2M1 in 1x32 blocks.

    The scale is the smallest power of two that brings the block's largest magnitude within range, which is what makes
    re-quantising a dequantised weight return it bit for bit whenever its scales were chosen the same way.
    """
    block = FP8_BLOCK if jnp.dtype(codes_dtype) == E4M3 else FP4_BLOCK
    largest = _LARGEST_FLOAT[jnp.dtype(codes_dtype)]
    rows, columns = weight.shape[-2:]
    padding = [(0, 0)] * (weight.ndim - 2) + [(0, -rows % block[0]), (0, -columns % block[1])]
    padded = jnp.pad(weight.astype(jnp.float32), padding)
    *leading, padded_rows, padded_columns = padded.shape
    tiles = padded.reshape(*leading, padded_rows // block[0], block[0], padded_columns // block[1], block[1])
    scales = power_of_two_scale(jnp.max(jnp.abs(tiles), axis=(-3, -1)), largest, 2.0**-126 * largest)
    codes = saturate(tiles / scales[..., :, None, :, None], codes_dtype).reshape(padded.shape)
    return BlockScaled(codes[..., :rows, :columns], scales.astype(scales_dtype), block)


def power_of_two_scale(amax: Array, largest: float, floor: float) -> Array:
    """2^ceil(log2(max(amax, floor) / largest)), computed on the exponent bits: exact, and never off by one."""
    ratio = jnp.maximum(amax.astype(jnp.float32), floor) / largest
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return jax.lax.bitcast_convert_type(jnp.clip(exponent, 1, 254) << 23, jnp.float32)


def round_to(values: Array, dtype: Any) -> Array:
    """Rounds to nearest, ties to even, clipping to the largest finite value of `dtype`; the result is float32."""
    largest = _LARGEST_FLOAT[jnp.dtype(dtype)]
    values = jnp.clip(values.astype(jnp.float32), -largest, largest)
    exponent = (jax.lax.bitcast_convert_type(values, jnp.int32) >> 23) & 0xFF  # signed: kernels know no other maximum
    kind = jnp.finfo(dtype)
    steps = jnp.maximum(exponent, 127 + kind.minexp) - kind.nmant << 23  # spacing of the format's values here
    step = jax.lax.bitcast_convert_type(steps.astype(jnp.int32), jnp.float32)
    return jnp.round(values / step) * step


def saturate(values: Array, dtype: Any) -> Array:
    """`round_to`, as `dtype`.

    The rounding is done in float32, so that the conversion itself is exact: compilers differ in how often they round
    on the way to a format this small.
    """
    return round_to(values, dtype).astype(dtype)


def shared_scale(amax: Array, dtype: Any) -> Array:
    """Scale of a block of key or index channels, of which `amax` is the largest magnitude."""
    floor = _KV_AMAX_FLOOR if jnp.dtype(dtype) == E4M3 else _INDEX_AMAX_FLOOR
    return power_of_two_scale(amax, _LARGEST_FLOAT[jnp.dtype(dtype)], floor)


def encode_rows(rows: Array, dtype: Any, block: int) -> tuple[Array, Array]:
    """Quantises [..., channels] in blocks along its last axis.

    Returns:
      codes [..., channels] of `dtype` and scales [..., channels / block] E8M0.

    Raises:
      ValueError: the channels are not a multiple of the block.
    """
    channels = rows.shape[-1]
    if channels % block:
        raise ValueError(f"{channels} channels cannot be quantised in blocks of {block}: expected a multiple")
    tiles = rows.astype(jnp.float32).reshape(*rows.shape[:-1], channels // block, block)
    scales = shared_scale(jnp.max(jnp.abs(tiles), axis=-1), dtype)
    codes = saturate(tiles / scales[..., None], dtype).reshape(rows.shape)
    return codes, scales.astype(E8M0)


def decode_rows(codes: Array, scales: Array, dtype: Any) -> Array:
    """Inverse of `encode_rows`: [..., channels] of `dtype`."""
    block = codes.shape[-1] // scales.shape[-1]
    repeated = _repeated(scale_values(scales), block, codes.shape[-1], axis=-1)
    return (codes.astype(jnp.float32) * repeated).astype(dtype)


def fake_quant(rows: Array, dtype: Any, block: int) -> Array:
    """Rounds [..., channels] to `dtype` and back, with straight-through gradients; the dtype of `rows` is kept."""
    return straight_through(decode_rows(*encode_rows(rows, dtype, block), rows.dtype), rows)


def straight_through(rounded: Array, values: Array) -> Array:
    """`rounded`, with the gradient of `values`, of which it is a rounding."""
    return jax.lax.stop_gradient(rounded) + (values - jax.lax.stop_gradient(values))  # the bracket is exactly zero


def fake_quant_kv(rows: Array, rotary: int) -> Array:
    """Rounds the non-rotary channels of [..., head_dim] key/value rows to E4M3 in blocks of 64 (section 5.2)."""
    split = rows.shape[-1] - rotary
    return jnp.concatenate([fake_quant(rows[..., :split], E4M3, KV_BLOCK), rows[..., split:]], axis=-1)


def fake_quant_index(rows: Array) -> Array:
    """Rotates index queries or keys [..., index_head_dim] by a Hadamard matrix and rounds to E2M1 in blocks of 32."""
    return fake_quant(hadamard(rows), E2M1, INDEX_BLOCK)


def hadamard(rows: Array) -> Array:
    """Multiplies the last axis by the orthonormal Walsh-Hadamard matrix; its length must be a power of two."""
    size = rows.shape[-1]
    if size & (size - 1):
        raise ValueError(f"a Hadamard rotation needs a power of two of channels, found {size}")
    values = rows.astype(jnp.float32)
    half = 1
    while half < size:
        pairs = values.reshape(*rows.shape[:-1], size // (2 * half), 2, half)
        values = jnp.concatenate(
            [pairs[..., :1, :] + pairs[..., 1:, :], pairs[..., :1, :] - pairs[..., 1:, :]], axis=-2
        )
        values = values.reshape(rows.shape)
        half *= 2
    return (values * size**-0.5).astype(rows.dtype)


def _repeated(scales: Array, block: int, size: int, axis: int) -> Array:
    """Repeats each scale over its block and crops the last, partial block."""
    if block == 1:
        return scales
    return jax.lax.slice_in_dim(jnp.repeat(scales, block, axis=axis), 0, size, axis=axis)
