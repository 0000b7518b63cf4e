"""Block-scaled weights as they lie on disk: packing, decoding on the host, and checks that their scales make sense.

FP8 is E4M3 with a scale per 128x128 tile. FP4 is E2M1 with a scale per row and 32 inputs, two codes to a byte along the
inputs, the even one in the low nibble. Scales are E8M0, a bare exponent (byte b means 2^(b - 127), 255 is NaN), or
float32 in the Base checkpoints. The dtype alone says which: bytes are never converted as if they were numbers.
NVFP4, of repackaged checkpoints, is E2M1 with a scale per row and 16 inputs, which is held in float32.

Source: technical report, sections 4.2 and 5.2, and the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from v4_jax.architecture import Architecture, ExpertDtype
from v4_jax.checkpoint.tensors import CheckpointError, TensorInfo
from v4_jax.number_formats import E2M1, E4M3, FP4_BLOCK, FP8_BLOCK, NVFP4_BLOCK
from v4_jax.parameters import Storage

ScaleType = Literal["F8_E8M0", "F32"]
SCALE_TYPES: tuple[ScaleType, ...] = ("F8_E8M0", "F32")

# Standard deviations of a trained or freshly initialised weight lie far inside; scales read as numbers far outside.
_PLAUSIBLE = (1e-6, 10.0)
_SAMPLED_ROWS = 16


class BlockFormat(NamedTuple):
    """One block-scaled format.

    Attributes:
      name: as in `Config.expert_dtype`.
      stored: dtype of the codes on disk.
      element: dtype of the codes in memory.
      block: elements of (out, in) under one scale.
      packing: elements per stored code.
    """

    name: Literal["fp4", "fp8", "nvfp4"]
    stored: str
    element: Any
    block: tuple[int, int]
    packing: int

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the codes on disk of a weight [out, in]."""
        return (*shape[:-1], shape[-1] // self.packing)


FP8 = BlockFormat("fp8", "F8_E4M3", E4M3, FP8_BLOCK, 1)
FP4 = BlockFormat("fp4", "I8", E2M1, FP4_BLOCK, 2)
NVFP4 = BlockFormat("nvfp4", "I8", E2M1, NVFP4_BLOCK, 2)
OF_NAME = {"fp8": FP8, "fp4": FP4, "nvfp4": NVFP4}
FLOATS = ("BF16", "F16", "F32")


def stored_as(codes: TensorInfo, scales: TensorInfo | None) -> BlockFormat | None:
    """The block format of a weight, by its codes and scales as they are stored; None if they are those of no format."""
    if codes.dtype == "F8_E4M3":
        return FP8
    if codes.dtype != "I8":
        return None
    ratio = scales.shape[-1] / max(codes.shape[-1], 1) if scales and scales.shape and codes.shape else 0
    return NVFP4 if ratio == NVFP4.packing / NVFP4.block[1] else FP4


class Formats(NamedTuple):
    """How one checkpoint stores its block-scaled weights; uniform over the checkpoint, by requirement.

    Attributes:
      expert: format of the routed experts' weights.
      fp8_scales: dtype of the scales of all other linear layers.
      expert_scales: dtype of the experts' scales.
      linear: format of all other linear layers; "bf16" in checkpoints that are not, or only in part, quantised.
    """

    expert: ExpertDtype
    fp8_scales: ScaleType = "F8_E8M0"
    expert_scales: ScaleType = "F8_E8M0"
    linear: Literal["fp8", "bf16"] = "fp8"

    @classmethod
    def of(cls, config: Architecture, scales: Mapping[Storage, ScaleType] | None = None) -> Formats:
        """The formats of a configuration, with scales of these dtypes where they are not E8M0."""
        found: dict[Storage, ScaleType] = {"expert": "F32"} if config.expert_dtype == "nvfp4" else {}
        found.update(scales or {})
        linear: Literal["fp8", "bf16"] = "bf16" if config.expert_dtype == "bf16" else "fp8"
        return cls(config.expert_dtype, found.get("fp8", "F8_E8M0"), found.get("expert", "F8_E8M0"), linear)

    def block(self, storage: Storage) -> BlockFormat | None:
        """Format of a parameter of this storage; None if it is a plain tensor."""
        name = {"fp8": self.linear, "expert": self.expert}.get(storage, "bf16")
        return OF_NAME.get(name)

    def scales(self, storage: Storage) -> ScaleType:
        """Dtype of the scales of a parameter of this storage."""
        return self.fp8_scales if storage == "fp8" else self.expert_scales


def scale_name(weight: str) -> str:
    """Released name of the scales of `<linear>.weight`."""
    return weight.removesuffix(".weight") + ".scale"


_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E2M1_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
# The two values of a packed byte, the even element first, looked up as one 64-bit item.
_E2M1_PAIRS = np.stack([_E2M1_VALUES[np.arange(256) & 15], _E2M1_VALUES[np.arange(256) >> 4]], axis=-1).view(np.uint64)


def unpack(codes: np.ndarray) -> np.ndarray:
    """[..., n] packed bytes to [..., 2n] E2M1."""
    pairs = np.ascontiguousarray(codes).view(np.uint8).astype("<u2")
    pairs |= pairs << 4  # each byte's nibbles to the low halves of two bytes, in place: four times faster than not
    pairs &= 0x0F0F
    return pairs.view(np.uint8).view(ml_dtypes.float4_e2m1fn)


def pack(codes: np.ndarray) -> np.ndarray:
    """[..., 2n] E2M1 to [..., n] int8; inverse of `unpack`."""
    nibbles = np.ascontiguousarray(codes).view(np.uint8) & 15
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).view(np.int8)


def in_memory(codes: np.ndarray, form: BlockFormat) -> np.ndarray:
    """Stored codes as elements."""
    return unpack(codes) if form.packing == 2 else codes


def dequantise(codes: np.ndarray, scales: np.ndarray, form: BlockFormat) -> np.ndarray:
    """Stored codes and the scales of their blocks to float32 values.

    Args:
      codes: [rows, stored columns], starting at a block's corner.
      scales: [ceil(rows / block[0]), ceil(columns / block[1])].
      form: their format.

    Returns:
      [rows, columns] float32, exact: the same as `number_formats.dequantise` in float32.
    """
    values = _decode(codes, form)
    with np.errstate(all="ignore"):  # a NaN scale is for the caller to find
        repeated = np.repeat(scales.astype(np.float32), form.block[1], axis=1)[:, : values.shape[1]]
        if form.block[0] == 1:
            values *= repeated
        else:
            for row, line in enumerate(repeated):
                values[row * form.block[0] : (row + 1) * form.block[0]] *= line
    return values


def _decode(codes: np.ndarray, form: BlockFormat) -> np.ndarray:
    """Stored codes as float32, without their scales."""
    stored = np.ascontiguousarray(codes).view(np.uint8)
    if form.packing == 1:
        return np.take(_E4M3_VALUES, stored)
    return np.take(_E2M1_PAIRS[:, 0], stored).view(np.float32)


def as_fp8(name: str, codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FP4 as FP8 of exactly the same values.

    E4M3 has the bits of E2M1 and three more of exponent, so that the scales of a tile's blocks go into its codes, as
    long as they do not differ by more than about 2^14 (facts of the report's FP4 training, section 5.2.1).

    Args:
      name: released name, for the message.
      codes: [out, in / 2] packed E2M1.
      scales: [out, in / 32] E8M0.

    Returns:
      E4M3 codes [out, in] and E8M0 scales [ceil(out / 128), ceil(in / 128)].

    Raises:
      CheckpointError: a tile whose scales are too far apart.
    """
    rows, columns = len(codes), codes.shape[1] * 2
    per_tile = FP8.block[1] // FP4.block[1]
    exponents = scales.view(np.uint8).astype(np.int32)
    padding = [(0, -rows % FP8.block[0]), (0, -exponents.shape[1] % per_tile)]
    tiles = np.pad(exponents, padding).reshape(-(-rows // FP8.block[0]), FP8.block[0], -1, per_tile)
    # The largest code, 6, times 2^6 is 384, below E4M3's 448.
    made_scales = np.maximum(tiles.max(axis=(1, 3)) - 6, 0)
    shifts = exponents - np.repeat(np.repeat(made_scales, FP8.block[0], 0), per_tile, 1)[:rows, : exponents.shape[1]]
    values = np.ldexp(_decode(codes, FP4), np.repeat(shifts, FP4.block[1], 1)[:, :columns])
    made = values.astype(ml_dtypes.float8_e4m3fn)
    if (wrong := made.astype(np.float32) != values).any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        tile = tiles[row // FP8.block[0], :, column // FP8.block[1]]
        raise CheckpointError(
            f"{name} cannot be FP8 of the same values: the tile of element [{row}, {column}] has scales up to "
            f"2^{tile.max() - 127}, and 2^{exponents[row, column // FP4.block[1]] - 127} there, expected a ratio of at "
            "most 2^14; use --format bf16"
        )
    return made, made_scales.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)


def check_scales(name: str, scales: np.ndarray, form: BlockFormat) -> None:
    """Refuses scales that are not positive finite numbers; NVFP4 has zeros where a block is all zero.

    Raises:
      CheckpointError: an E8M0 byte of 255 (NaN), or a float32 that is NaN, infinite, negative or (but in NVFP4) zero.
    """
    if scales.dtype == np.float32:
        bad = ~(np.isfinite(scales) & ((scales > 0) | ((scales == 0) & (form is NVFP4))))
        expected = "positive finite numbers"
    else:
        bad = scales.view(np.uint8) == 255
        expected = "exponents 0 to 254 (255 is NaN)"
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise CheckpointError(
            f"{name} holds {scales[place]} at {list(place)} (and {bad.sum() - 1} more), expected {expected}"
        )


def check_range(name: str, codes: np.ndarray, scales: np.ndarray, form: BlockFormat) -> None:
    """Refuses a weight whose values cannot be a weight's, judged by rows taken evenly from it.

    Args:
      name: released name, for the message.
      codes: [rows, stored columns], starting at a block's corner.
      scales: the scales of their blocks.
      form: their format.

    Raises:
      CheckpointError: values that are not finite, or whose standard deviation is outside 1e-6 to 10.
    """
    if not codes.size:
        return
    sample = np.unique(np.linspace(0, codes.shape[0] - 1, _SAMPLED_ROWS).astype(int))
    by_row = form._replace(block=(1, form.block[1]))
    values = dequantise(codes[sample], scales[sample // form.block[0]], by_row)
    with np.errstate(all="ignore"):
        deviation = float(np.std(values, dtype=np.float64))
    low, high = _PLAUSIBLE
    if not low < deviation < high:
        raise CheckpointError(
            f"{name} decodes to values of standard deviation {deviation:.3g}, expected between {low:g} and {high:g}: "
            "its scales or codes are damaged, or were converted as numbers (a scale byte b means 2^(b - 127))"
        )
