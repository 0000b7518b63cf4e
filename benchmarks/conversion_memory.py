"""Peak memory and speed of converting released checkpoints of growing size: memory must not grow with the layers.

    python benchmarks/conversion_memory.py [--sizes 1 2 4] [--directory /tmp]

Writes random checkpoints in the released layout (about 0.24 GB a layer), converts each in a process of its own, and
prints one table. Needs disk space for twice the largest size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from v4_jax.checkpoint import convert, export
from v4_jax.checkpoint.block_formats import Formats
from v4_jax.checkpoint.interface import Checkpoint
from v4_jax.checkpoint.mapping import entries
from v4_jax.config import Config

FLAT = 1.10  # largest over smallest peak that still counts as flat


def config_of(layers: int) -> Config:
    """The released architecture at a quarter of Flash's expert size, 64 experts."""
    return dataclasses.replace(
        Config.flash(),
        vocab_size=32768,
        hidden_size=2048,
        moe_intermediate_size=1024,
        num_hidden_layers=layers,
        n_routed_experts=64,
        num_attention_heads=32,
        num_nextn_predict_layers=0,
        compress_ratios=tuple((0, 0, *(4, 128) * layers)[:layers]),
    )


class Random(Checkpoint):
    """A checkpoint that makes up its tensors when they are read: legal values, no memory."""

    def __init__(self, config: Config):
        super().__init__()
        self.label, self.config, self.hf_config = "random tensors", config, config.to_hf()
        self.formats = Formats(config.expert_dtype)
        self.tensors = {name: entry.info for name, entry in entries(config, self.formats).items()}
        self._noise = np.random.default_rng(0).integers(0, 256, 1 << 26, np.uint8)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Rows of a tensor; another stretch of the same noise for each name."""
        info = self.tensors[name]
        height = len(range(*rows.indices(info.shape[0])))
        shape = (height, *info.shape[1:])
        count = math.prod(shape) * info.numpy_dtype.itemsize
        start = zlib.crc32(name.encode()) % (self._noise.size - count)
        noise = self._noise[start : start + count]
        if info.dtype == "I64":
            return (noise[:: info.numpy_dtype.itemsize].astype(np.int64) % self.config.n_routed_experts).reshape(shape)
        if info.dtype == "F8_E8M0":
            noise = 118 + noise % 4
        elif info.dtype == "F8_E4M3":
            noise = noise & 0b1011_1111  # keeps clear of NaN
        elif info.dtype in ("BF16", "F32"):
            return (
                (noise[:: info.numpy_dtype.itemsize].astype(np.float32) / 4096).astype(info.numpy_dtype).reshape(shape)
            )
        return noise.view(info.numpy_dtype).reshape(shape)

    def close(self) -> None:
        """Nothing to close."""


def measure(source: str, target: str) -> None:
    """Runs in a process of its own: one conversion, its time and its peak memory."""
    import jax
    import orbax.checkpoint  # noqa: F401

    jax.devices()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    convert(source, target)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "before": before / 1e6, "peak": peak / 1e6}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 2, 4], help="gigabytes of each checkpoint")
    parser.add_argument("--directory", default=None, help="where to put them; default: a temporary directory")
    parser.add_argument("--measure", nargs=2, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    print(f"{'size GB':>8} {'layers':>7} {'layer GB':>9} {'seconds':>8} {'GB/s':>6} {'before GB':>10} {'peak GB':>8}")
    peaks = []
    for wanted in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
            small, large = (Random(config_of(layers)).nbytes for layers in (4, 6))
            layer = (large - small) / 2
            layers = max(2, round((wanted * 1e9 - (small - 4 * layer)) / layer))
            source, target = Path(folder) / "released", Path(folder) / "orbax"
            size = export(Random(config_of(layers)), source).bytes
            command = [sys.executable, __file__, "--measure", str(source), str(target)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            shutil.rmtree(target)
        peaks.append(found["peak"])
        print(
            f"{size / 1e9:8.2f} {layers:7d} {layer / 1e9:9.2f} {found['seconds']:8.1f} "
            f"{size / 1e9 / found['seconds']:6.2f} {found['before']:10.2f} {found['peak']:8.2f}",
            flush=True,
        )
    ratio = max(peaks) / min(peaks)
    print(f"largest over smallest peak: {ratio:.2f}: {'flat' if ratio <= FLAT else 'NOT flat'} (limit {FLAT})")


if __name__ == "__main__":
    main()
