"""Seconds and memory of a training step against the length of its row, for a deep and narrow DeepSeek-V4.

The shape is the one that MaxText ships as `deepseek4-tiny`: 43 layers of width 64 under a vocabulary of 129,280, so
that nothing is large but the number of parts. Float32, one row, the whole step: gradients with the MTP block left out
(the shape has none), and the update of every parameter.

    python benchmarks/train_step.py                       both optimisers at 256, 1,024 and 4,096 tokens
    python benchmarks/train_step.py --lengths 256 --steps 5

Each case runs in a process of its own, whose glibc is told to use large pages and to keep them (see `MEMORY`).
Prints a table and writes benchmarks/results/train_step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "train_step.json"

# The step of this shape of MaxText 0.2.5 (JAX 0.11.1; float32, attention=dot_product, sparse_matmul=false, the
# rematerialisation that is its default), in the hour of the published table on its machine: seconds by length.
MAXTEXT = {256: 2.8, 1024: 11.3}

# A step's temporaries are otherwise spread over small pages by the hundred thousand, which go back to the system after
# each step and come again cleared. A thread's own arena cannot hold them: there is one arena.
MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
    ":glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=68719476736"
}


def config() -> Any:
    from v4_jax import Config

    return Config(
        vocab_size=129280,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=43,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=32,
        q_lora_rank=16,
        o_groups=4,
        o_lora_rank=16,
        n_routed_experts=16,
        num_experts_per_tok=4,
        routed_scaling_factor=1.5,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=16,
        sliding_window=32,
        num_hash_layers=3,
        num_nextn_predict_layers=0,
        compress_ratios=(0, 0, 4, *(128, 4) * 20),
    )


def measure(length: int, matrices: str, steps: int) -> dict[str, float]:
    """Compiles and takes `steps` steps; what they took, in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from v4_jax import Transformer, init
    from v4_jax.placement import Place
    from v4_jax.train.batch import Batch
    from v4_jax.train.objectives.objective import Weights
    from v4_jax.train.optimizer import optimizer
    from v4_jax.train.step import TrainState, abstract_state, jit_step, make_step

    shape, place = config(), Place()
    transform = optimizer(shape, 1e-3, matrices=matrices)
    model = Transformer(shape, policy="float32", remat="none")
    params = init(shape, jax.random.key(0))
    state = TrainState(jnp.int32(0), params, transform.init(params))
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (1, 1, length), np.int32)
    batch = Batch(jnp.asarray(tokens), jnp.ones_like(tokens))
    start = time.perf_counter()
    step = make_step(model, transform, lambda step: Weights())
    step = jit_step(step, abstract_state(shape, transform, place), place)
    program = step.lower(state, batch, None).compile()
    compiled = time.perf_counter() - start
    took = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(program(state, batch, None))
        took.append(time.perf_counter() - start)
    assert np.isfinite(float(metrics["loss"]))
    return {
        "seconds": statistics.median(took[1:]),
        "seconds_best": min(took[1:]),
        "compile_seconds": compiled,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--one", nargs=2, metavar=("LENGTH", "OPTIMIZER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(int(options.one[0]), options.one[1], options.steps)))
        return
    found = []
    print("| tokens | optimiser | step | MaxText's | ratio | temporaries | peak memory | compiled in |")
    print("|---|---|---|---|---|---|---|---|")
    for length in options.lengths:
        for name in options.optimizers:
            command = [sys.executable, __file__, "--steps", str(options.steps), "--one", str(length), name]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | MEMORY)
            one = json.loads(run.stdout.splitlines()[-1])
            found.append({"tokens": length, "optimizer": name} | one)
            peer = MAXTEXT.get(length)
            beside = (f"{peer:.1f} s", f"{one['seconds'] / peer:.2f}") if peer else ("", "")
            print(
                f"| {length:,} | {name} | {one['seconds']:.2f} s | {beside[0]} | {beside[1]} | "
                f"{one['temporary_bytes'] / 1e9:.2f} GB | {one['peak_rss_bytes'] / 1e9:.2f} GB | "
                f"{one['compile_seconds']:.0f} s |",
                flush=True,
            )
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
