"""The tiny released checkpoints as others repackage them."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.checkpoint.directories import config_of, read_directory, write_directory
from v4_jax.checkpoint.names import in_stack, transformers_name

E4M3, E2M1, E8M0, BF16 = (
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float4_e2m1fn,
    ml_dtypes.float8_e8m0fnu,
    ml_dtypes.bfloat16,
)
Tensors = dict[str, np.ndarray]


def repackage(path: Path, source: Path, tensors: Tensors, *, shards: int = 2, **changes) -> Path:
    """A directory with these tensors and the source's configuration; a change of None removes a key."""
    config = {**config_of(source), **changes}
    return write_directory(path, {k: v for k, v in config.items() if v is not None}, tensors, shards)


def values_of(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Float32 values of a released block-scaled weight."""
    if codes.dtype == np.int8:
        pairs = np.stack([codes.view(np.uint8) & 15, codes.view(np.uint8) >> 4], axis=-1)
        return pairs.view(E2M1).astype(np.float32).reshape(len(codes), -1) * np.repeat(scales.astype(np.float32), 32, 1)
    scales = scales.astype(np.float32).repeat(128, 0).repeat(128, 1)[: codes.shape[0], : codes.shape[1]]
    return codes.astype(np.float32) * scales


def dequantised(source: Path) -> Tensors:
    """The source's tensors with all weights in BF16, under their released names."""
    tensors = read_directory(source)
    plain = {}
    for name, array in tensors.items():
        scales = tensors.get(re.sub(r"\.weight$", ".scale", name)) if name.endswith(".weight") else None
        if scales is not None:
            plain[name] = values_of(array, scales).astype(BF16)
        elif not name.endswith(".scale"):
            plain[name] = array
    return plain


def stacked(tensors: Tensors) -> Tensors:
    """Plain tensors as transformers' state dict has them, experts stacked."""
    out: Tensors = {}
    stacks: dict[str, dict[int, dict[int, np.ndarray]]] = {}
    for name, array in tensors.items():
        if place := in_stack(name):
            stacks.setdefault(place.name, {}).setdefault(place.expert, {})[place.part] = array
        else:
            out[transformers_name(name)] = array
    for name, experts in stacks.items():
        out[name] = np.stack(
            [np.concatenate([parts[p] for p in sorted(parts)]) for _, parts in sorted(experts.items())]
        )
    return out


def nvfp4(source: Path, *, packed: bool, seed: int = 0) -> tuple[Tensors, Tensors]:
    """The source with NVFP4 experts, and the float32 values of these.

    Args:
      packed: named as compressed-tensors does, or as modelopt does.
    """
    rng = np.random.default_rng(seed)
    tensors, values = read_directory(source), {}
    for name in [name for name in tensors if ".experts." in name and name.endswith(".weight")]:
        stem = name.removesuffix(".weight")
        del tensors[f"{stem}.scale"]
        codes = tensors.pop(name).view(np.uint8)
        scales = rng.uniform(0.5, 400, (len(codes), codes.shape[1] // 8)).astype(np.float32).astype(E4M3)
        scales[0, 0] = 0  # of a block of zeros
        factor = np.float32(rng.uniform(2e-5, 9e-5))
        tensors[f"{stem}.weight_packed" if packed else name] = codes
        tensors[f"{stem}.weight_scale"] = scales
        tensors[f"{stem}.weight_global_scale" if packed else f"{stem}.weight_scale_2"] = (
            np.array([1 / factor], np.float32) if packed else np.array(factor)
        )
        tensors[f"{stem}.input_global_scale" if packed else f"{stem}.input_scale"] = np.array([3.0], np.float32)
        product = scales.astype(np.float32) / np.float32(1 / factor) if packed else scales.astype(np.float32) * factor
        pairs = np.stack([codes & 15, codes >> 4], axis=-1).view(E2M1).astype(np.float32)
        values[name] = pairs.reshape(len(codes), -1) * product.repeat(16, 1)
    return tensors, values
