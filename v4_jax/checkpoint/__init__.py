"""Checkpoints: the released directories as they are, the same tensors in Orbax, training runs, parameters in memory.

    released directory  --convert-->  Orbax directory  --export-->  released directory
             |                              |                             ^
             +------------ load ------------+----> (config, params) ------+ export
             |                                                            |
        training run -----------------------------------------------------+

All four present the released tensors (`Checkpoint`), and every tensor is accounted for. Native formats survive any
path bit for bit; `verify` shows it.
"""

from v4_jax.checkpoint.building import Written
from v4_jax.checkpoint.conversion import convert
from v4_jax.checkpoint.exporting import export
from v4_jax.checkpoint.interface import Checkpoint, Progress
from v4_jax.checkpoint.loading import load
from v4_jax.checkpoint.opening import Source, open_checkpoint
from v4_jax.checkpoint.tensors import CheckpointError, TensorInfo
from v4_jax.checkpoint.trained import run_of
from v4_jax.checkpoint.verification import Checked, Comparison, Kind, TensorComparison, check, verify

__all__ = [
    "Checked",
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "Kind",
    "Progress",
    "Source",
    "TensorComparison",
    "TensorInfo",
    "Written",
    "check",
    "convert",
    "export",
    "load",
    "open_checkpoint",
    "run_of",
    "verify",
]
