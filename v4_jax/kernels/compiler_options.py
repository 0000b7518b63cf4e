"""What XLA's compiler is told, by the platform that a program is for, and by its kind. Found by measurement."""

from __future__ import annotations

from typing import Any, Literal

_TPU = {
    # VMEM for one operation of XLA's own, where it takes a third of that by itself: products of dense weights come from
    # 85% to 98% of the matrix unit's peak. The other kernels' bound is their own.
    "xla_tpu_scoped_vmem_limit_kib": 48 << 10,
    # Work that needs no rows of other devices goes on while they travel.
    "xla_tpu_enable_async_ragged_all_to_all": True,
    # Gathers of weights run within products before them, step by step. tpu7x leaves them to its SparseCores.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}

_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        # The library that XLA:CPU hands sums to takes many times as long for them as its own loops, and only the
        # library's matmuls are kept; donated arrays are not copied where their readers can go first.
        "training": {
            "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT",
            "xla_cpu_copy_insertion_use_region_analysis": True,
        },
        # The usual scheduler cuts a layer's weights out of their stack long before it needs them, and a single token
        # waits for them. At 4,096 tokens of context: 1.1 to 1.2 times the tokens per second.
        "decoding": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    },
    "tpu": dict.fromkeys(("training", "decoding", "prefill"), _TPU),
}


def compiler_options(program: Literal["training", "decoding", "prefill"], platform: str) -> dict[str, Any] | None:
    """Options for `jax.jit(..., compiler_options=...)`: of a training step, or of one of the engine's programs."""
    return _OPTIONS.get(platform, {}).get(program)
