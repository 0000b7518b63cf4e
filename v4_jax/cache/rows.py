"""Rows of the cache in their storage formats, as bits: plain floats, or the release's E4M3 and E2M1 with scales."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from v4_jax.number_formats import E2M1, E4M3, E8M0, INDEX_BLOCK, KV_BLOCK, bytes_of, decode_rows, encode_rows

LANES = 128  # elements in a row of a TPU's memory tile
WORD_CHANNELS = 2 * LANES  # channels of such a row of words


class StoredRows(struct.PyTreeNode):
    """Rows [L, B, N, C] in one storage format, held as bit patterns.

    Where a backend lacks a small float type, it updates one row of an array by converting the whole array to a type
    that it has, and back. Integers of the same width are updated in place everywhere, so floats become bits.

    A "kv" row is one run of bytes: codes, scales, rotary channels, and zeros up to a multiple of 128, the width of a
    TPU's memory tile. Rows of any other width would be laid out across, and copied around every gather.

    A "words" row is bfloat16, channels c and c + C / 2 as the lower and upper half of a word, in [C / 256, 128] words:
    a run of memory of its own on a TPU, which interleaves neighbouring rows of 16-bit numbers.

    Attributes:
      arrays: the stored parts: one array; for "index" codes and scales.
      kind: "plain"; "words", bfloat16 in multiples of 256 channels, for rows that are read one by one; "kv", the first
        channels in E4M3 and the rotary rest in bfloat16; or "index", E2M1.
      dtype: number format of plain rows.
      channels: channels of a row.
      rotary: how many of a "kv" row's, the last ones, are kept in bfloat16.
    """

    arrays: tuple[Array, ...]
    kind: Literal["plain", "words", "kv", "index"] = struct.field(pytree_node=False, default="plain")
    dtype: Any = struct.field(pytree_node=False, default=jnp.float32)
    channels: int = struct.field(pytree_node=False, default=0)
    rotary: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def empty(cls, shape: tuple[int, int, int], channels: int, **form: Any) -> StoredRows:
        """Zeros [L, B, N] x channels in the format that the keyword arguments say."""
        template = cls((), channels=channels, **form)
        parts = jax.eval_shape(template.encode, jax.ShapeDtypeStruct((channels,), jnp.float32))
        # The bits of zero are zero in every format; an E8M0 scale of zero bits is 2^-127, which scales zeros.
        return template.replace(arrays=tuple(jnp.zeros((*shape, *part.shape), part.dtype) for part in parts))

    @property
    def shape(self) -> tuple[int, ...]:
        """(L, B, N)."""
        return self.arrays[0].shape[:3]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(bytes_of(array) for array in self.arrays)

    @property
    def padding(self) -> int:
        """How many of them fill rows up."""
        return 0 if self.kind != "kv" else math.prod(self.shape) * (self.arrays[0].shape[-1] - self._ends[-1])

    @property
    def _ends(self) -> tuple[int, int, int]:
        """Where codes, scales and rotary channels end in the bytes of a "kv" row."""
        codes = self.channels - self.rotary
        scales = codes + codes // KV_BLOCK
        return codes, scales, scales + 2 * self.rotary

    def encode(self, rows: Array) -> tuple[Array, ...]:
        """[..., C] rows as this format's parts."""
        if self.kind == "plain":
            return (_bits(rows.astype(self.dtype)),)
        if self.kind == "words":
            low, high = jnp.split(_bits(rows.astype(jnp.bfloat16)).astype(jnp.uint32), 2, axis=-1)
            words = jax.lax.bitcast_convert_type(low | (high << 16), jnp.int32)
            return (words.reshape(*rows.shape[:-1], -1, LANES),)
        if self.kind == "index":
            codes, scales = encode_rows(rows, E2M1, INDEX_BLOCK)
            return _bits(codes), _bits(scales)
        split = self.channels - self.rotary
        codes, scales = encode_rows(rows[..., :split], E4M3, KV_BLOCK)
        rotary = jax.lax.bitcast_convert_type(rows[..., split:].astype(jnp.bfloat16), jnp.uint8)
        row = [_bits(codes), _bits(scales), rotary.reshape(*rows.shape[:-1], 2 * self.rotary)]
        room = jnp.zeros((*rows.shape[:-1], -self._ends[-1] % LANES), jnp.uint8)
        return (jnp.concatenate([*row, room], axis=-1),)

    def decode(self, parts: tuple[Array, ...], dtype: Any) -> Array:
        """Inverse of `encode`: [..., C] of `dtype`."""
        if self.kind == "plain":
            return _float(parts[0], self.dtype).astype(dtype)
        if self.kind == "words":
            words = parts[0].reshape(*parts[0].shape[:-2], -1)
            halves = (jax.lax.bitcast_convert_type(x, jnp.float32) for x in (words << 16, words & -(1 << 16)))
            return jnp.concatenate([half.astype(dtype) for half in halves], axis=-1)
        if self.kind == "index":
            return decode_rows(_float(parts[0], E2M1), _float(parts[1], E8M0), dtype)
        codes, scales, rotary, _ = jnp.split(parts[0], self._ends, axis=-1)
        nope = decode_rows(_float(codes, E4M3), _float(scales, E8M0), dtype)
        rotary = rotary.reshape(*rotary.shape[:-1], self.rotary, 2)
        return jnp.concatenate([nope, jax.lax.bitcast_convert_type(rotary, jnp.bfloat16).astype(dtype)], axis=-1)

    def stored(self, rows: Array) -> Array:
        """[..., C] rows as they read back once stored, so that a chunk's own rows equal what later chunks will see."""
        return self.decode(self.encode(rows), rows.dtype)

    def read(self, layer: Any, rows: Array, index: Array, dtype: Any) -> Array:
        """Rows `index` [B, ...] of batch rows `rows` (broadcast with `index`): [B, ..., C]."""
        return self.decode(tuple(array[layer, rows, index] for array in self.arrays), dtype)

    def write(self, layer: Any, rows: Array, index: Array, values: Array) -> StoredRows:
        """Stores `values` [B, n, C] at `index` [B, n]; an index out of range stores nothing."""
        parts = self.encode(values)
        arrays = tuple(
            array.at[layer, rows, index].set(part, mode="drop") for array, part in zip(self.arrays, parts, strict=True)
        )
        return self.replace(arrays=arrays)


def _bits(x: Array) -> Array:
    """Floats narrower than 32 bits as unsigned integers; two 4-bit ones to a byte, along the last axis."""
    if x.dtype == E2M1:
        # By arithmetic: XLA:CPU has been seen to make invalid code of bitcasts that involve 4-bit types.
        values = x.astype(jnp.float32)
        size = jnp.abs(values)
        code = jnp.where(size <= 2, 2 * size, 5 + (size > 3) + (size > 4)).astype(jnp.uint8)
        code |= jnp.where(values < 0, 8, 0).astype(jnp.uint8)
        return code[..., 0::2] | (code[..., 1::2] << 4)
    width = x.dtype.itemsize
    return x if width >= 4 else jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}[width])


def _float(x: Array, dtype: Any) -> Array:
    """Inverse of `_bits`; E2M1 comes as float32."""
    if x.dtype == dtype:
        return x
    if jnp.dtype(dtype) == E2M1:
        code = jnp.stack([x & 15, x >> 4], axis=-1).reshape(*x.shape[:-1], 2 * x.shape[-1])
        step = (code & 7).astype(jnp.float32)
        size = jnp.where(step <= 4, step / 2, step - 2 + (step > 6))
        return jnp.where(code >= 8, -size, size)
    return jax.lax.bitcast_convert_type(x, dtype)


def batch_rows(like: Array, trailing: int) -> Array:
    """Batch row numbers shaped to broadcast against an index with `trailing` more axes."""
    return jnp.arange(like.shape[0]).reshape(-1, *(1,) * trailing)
