"""Checkpoints: the released directories as they are, the same tensors in Orbax, training runs, parameters in memory.

    released directory  --convert-->  Orbax directory  --export-->  released directory
             |                              |                             ^
             +------------ load ------------+----> (config, params) ------+ export
             |                                                            |
        training run -----------------------------------------------------+

All four present the released tensors (`Checkpoint`), and every tensor is accounted for. Native formats survive any
path bit for bit; `verify` shows it. A released directory may be one that others have repackaged, and may lie in a
bucket or on the hub.
"""

from v4_jax.checkpoint.building import Written
from v4_jax.checkpoint.conversion import convert
from v4_jax.checkpoint.exporting import export
from v4_jax.checkpoint.fingerprint import fingerprint
from v4_jax.checkpoint.interface import Checkpoint, Progress
from v4_jax.checkpoint.loading import load
from v4_jax.checkpoint.opening import Source, open_checkpoint
from v4_jax.checkpoint.peft import export_adapters
from v4_jax.checkpoint.reformatting import Format
from v4_jax.checkpoint.released import local
from v4_jax.checkpoint.remote import url_of
from v4_jax.checkpoint.tensors import CheckpointError, TensorInfo
from v4_jax.checkpoint.trained import run_of
from v4_jax.checkpoint.verification import Checked, Comparison, Kind, TensorComparison, check, verify

__all__ = [
    "Checked",
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "Format",
    "Kind",
    "Progress",
    "Source",
    "TensorComparison",
    "TensorInfo",
    "Written",
    "check",
    "convert",
    "export",
    "export_adapters",
    "fingerprint",
    "load",
    "local",
    "open_checkpoint",
    "run_of",
    "url_of",
    "verify",
]
