"""Checkpoints in another number format than they are held in, made tensor by tensor as they are read.

released  what is block-scaled stays as it is; what is plain is quantised as the release is
bf16      everything dequantised, which is exact but for NVFP4
fp8       FP4 experts as FP8, of exactly the same values (technical report, section 5.2.1); all else as for "released"
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import ml_dtypes
import numpy as np

from v4_jax.architecture import ExpertDtype
from v4_jax.checkpoint.block_formats import (
    FP4,
    FP8,
    BlockFormat,
    Formats,
    as_fp8,
    check_range,
    check_scales,
    dequantise,
    in_memory,
    scale_name,
)
from v4_jax.checkpoint.in_memory import InMemory
from v4_jax.checkpoint.interface import Checkpoint
from v4_jax.checkpoint.mapping import leaves
from v4_jax.checkpoint.orbax_arrays import nested
from v4_jax.checkpoint.repackaged import with_format
from v4_jax.checkpoint.tensors import DTYPES, CheckpointError
from v4_jax.number_formats import E8M0, BlockScaled, scale_shape
from v4_jax.parameters import Parameter

Format = Literal["released", "bf16", "fp8"]
FORMATS: tuple[Format, ...] = ("released", "bf16", "fp8")

_FLOAT: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "f32": np.float32, "i64": np.int64}


def reformatted(checkpoint: Checkpoint, format: Format) -> Checkpoint:
    """The same weights in another number format; the checkpoint itself where nothing changes.

    Raises:
      CheckpointError: NVFP4 experts, asked for in FP8, which cannot hold them exactly.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    held = checkpoint.formats
    kept: ExpertDtype = "fp4" if held.expert == "bf16" else held.expert
    expert: ExpertDtype = kept if format == "released" else format
    if (held.expert, held.linear) == (expert, "bf16" if format == "bf16" else "fp8"):
        return checkpoint
    config = dataclasses.replace(checkpoint.config, expert_dtype=expert)
    source = _Source(checkpoint, Formats.of(config))
    made = InMemory(config, nested({".".join(path): source.leaf(each) for path, each in leaves(config).items()}))
    made.label, made.files, made.fingerprint = checkpoint.label, checkpoint.files, checkpoint.fingerprint
    made.hf_config = with_format(checkpoint.hf_config, expert)
    return made


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """An array of which what is indexed is made."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    make: Callable[[tuple[int, ...]], np.ndarray]

    def __getitem__(self, place: tuple[int, ...]) -> np.ndarray:
        return self.make(place)


class _Source:
    """Leaves of a parameter tree that read a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, target: Formats):
        self._checkpoint, self._target = checkpoint, target
        # Codes and scales are asked for one after the other.
        self._stored = functools.lru_cache(maxsize=1)(self._read_stored)
        self._as_fp8 = functools.lru_cache(maxsize=1)(lambda name: as_fp8(name, *self._stored(name, FP4)))

    def leaf(self, parameter: Parameter) -> Any:
        """A parameter's leaf: `BlockScaled` if the target format is, and the values are not to be rounded to it."""
        held, target = (formats.block(parameter.storage) for formats in (self._checkpoint.formats, self._target))
        names = dict(parameter.tensors())
        shape = tuple(parameter.shape)
        if held is None or target is None:
            dtype = np.dtype(np.float32 if held else _FLOAT.get(parameter.storage, ml_dtypes.bfloat16))
            return _Lazy(shape, dtype, lambda at: self._values(names[at], held))
        if held is target:
            kind = DTYPES[self._checkpoint.formats.scales(parameter.storage)]
            codes = _Lazy(shape, np.dtype(held.element), lambda at: in_memory(self._stored(names[at], held)[0], held))
            scales = _Lazy(scale_shape(shape, held.block), kind, lambda at: self._stored(names[at], held)[1])
            return BlockScaled(codes, scales, held.block)
        if (held, target) != (FP4, FP8):
            raise CheckpointError(
                f"{self._checkpoint.label} has experts in {held.name.upper()}, which {target.name.upper()} cannot hold "
                "exactly: expected --format bf16 or released"
            )
        codes = _Lazy(shape, np.dtype(FP8.element), lambda at: self._as_fp8(names[at])[0])
        scales = _Lazy(scale_shape(shape, FP8.block), np.dtype(E8M0), lambda at: self._as_fp8(names[at])[1])
        return BlockScaled(codes, scales, FP8.block)

    def _values(self, name: str, held: BlockFormat | None) -> np.ndarray:
        """A tensor's values, as exactly as the checkpoint has them."""
        values = self._checkpoint.unrounded(name)
        if values is not None:
            return values
        return self._checkpoint.read(name) if held is None else dequantise(*self._stored(name, held), held)

    def _read_stored(self, name: str, held: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
        codes, scales = self._checkpoint.read(name), self._checkpoint.read(scale_name(name))
        check_scales(scale_name(name), scales, held)
        check_range(name, codes, scales, held)
        return codes, scales
