"""A run's adapters alone, laid out as PEFT has them: `adapter_config.json` and `adapter_model.safetensors`.

Modules have transformers' names. Of each there are `lora_A` [rank, in] and `lora_B` [out, rank] in float32, and its
weight with them is W + alpha / rank * B @ A.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from v4_jax.adapters import A, Adapters, B
from v4_jax.checkpoint.adapted import Merged
from v4_jax.checkpoint.building import Written, building, require_space
from v4_jax.checkpoint.interface import Progress
from v4_jax.checkpoint.names import transformers_name
from v4_jax.checkpoint.opening import open_checkpoint
from v4_jax.checkpoint.safetensors import write_file
from v4_jax.checkpoint.tensors import CheckpointError, TensorInfo

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_adapters(source: str | Path, target: str | Path, *, progress: Progress | None = None) -> Written:
    """Writes the adapters of a training run.

    Args:
      source: the run, or one of its steps.
      target: directory to make; must not exist.
      progress: called as progress(file, done bytes, total bytes).

    Raises:
      CheckpointError: the source has no adapters or cannot be trusted, the target exists, or the disk is full.
    """
    with open_checkpoint(source) as checkpoint:
        if not isinstance(checkpoint, Merged):
            raise CheckpointError(f"{source} has no adapters, expected a training run with lora in its settings")
        record = checkpoint.record
        assert isinstance(record.addition, Adapters)
        modules = {name: transformers_name(name).removesuffix(".weight") for name in checkpoint.adapted}
        tensors = {
            f"base_model.model.{modules[name]}.{factor}.weight": TensorInfo("F32", shape)
            for name, shapes in checkpoint.adapted.items()
            for factor, shape in zip((A, B), shapes, strict=True)
        }
        size, done = sum(info.nbytes for info in tensors.values()), 0

        def data() -> Iterator[np.ndarray]:
            nonlocal done
            for name in checkpoint.adapted:
                for factor in checkpoint.factors(name):
                    yield factor
                    done += factor.nbytes
                    if progress:
                        progress(WEIGHTS, done, size)

        with building(target, checkpoint, "adapters") as working:
            require_space(working, size, WEIGHTS)
            write_file(working / WEIGHTS, tensors, data())
            config = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": record.model,
                "r": record.addition.rank,
                "lora_alpha": record.addition.alpha,
                "lora_dropout": 0.0,
                "bias": "none",
                "inference_mode": True,
                "target_modules": sorted(modules.values()),
            }
            (working / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return Written(Path(target), len(tensors), size, 0)
