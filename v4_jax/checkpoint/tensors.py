"""Tensors as stored: their types, by the names of the safetensors format, and the error of all that reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from v4_jax.json_files import escaped

# Names of the safetensors format; what numpy lacks comes from ml_dtypes.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or trusted; the message says what was found and what was expected."""


class TensorInfo(NamedTuple):
    """Type and shape of a tensor as stored. A packed FP4 weight [out, in] is I8 [out, in / 2]."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype as numpy knows it."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def names_in(names: Sequence[str], limit: int = 3) -> str:
    """The first few of a list of names, and how many there are, for a message."""
    first = ", ".join(map(escaped, names[:limit]))
    return first if len(names) <= limit else f"{first}, ... ({len(names)} in all)"
