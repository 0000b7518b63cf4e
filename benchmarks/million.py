"""A million tokens with the sequence split over eight devices: time, memory and cache against the predictions.

    pip install -e '.[benchmarks]'
    python benchmarks/million.py [--quick]

A tiny model with every layer role reads 65,536, 262,144 and 1,048,576 tokens in chunks, each chunk split over eight
virtual devices of this machine's CPU, and then writes 64 more. Every length is a process of its own, so that peak
memory is its own. Seconds per token are compared with the FLOPs that `v4_jax.costs` predicts at each position, bytes of
cache with what the configuration predicts, and at 65,536 tokens logits and decisions with those of one device that
holds everything: the run fails if they differ. docs/million.md explains the numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from million_report import (
    COMPARED,
    DECODED,
    NEAR_TIES,
    TOLERANCE,
    draw,
    prefill_seconds,
    sentences,
    show,
    write_document,
)
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[1]

DEVICES = 8
MESH, PRESET = f"seq={DEVICES}", "long-context"
LENGTHS, QUICK = (65536, 262144, 1048576), (16384, 65536)

# Eight devices share the cores: the first to reach a collective waits for all others' work, which XLA takes for a hang.
PATIENCE = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600"
PATIENCE += " --xla_cpu_collective_call_terminate_timeout_seconds=3600"

# ---- one length, in its own process ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process does.

    Attributes:
      length: prompt tokens.
      chunk: prompt tokens processed at once.
      compare: compare with one device instead of measuring.
    """

    length: int
    chunk: int
    compare: bool = False


def architecture() -> Any:
    """Every layer role, a scan over layers, and so few index channels that a million tokens take minutes."""
    from v4_jax import Config

    return Config(
        vocab_size=256,
        hidden_size=48,
        moe_intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=24,
        o_groups=2,
        o_lora_rank=16,
        n_routed_experts=DEVICES,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        index_n_heads=4,
        index_head_dim=16,
        index_topk=32,
        compress_ratios=(0, 4, 128, 4, 128),
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        max_position_embeddings=2 * max(LENGTHS),  # the last prompt fills a million, and tokens follow it
    )


def weights(config: Any) -> Any:
    """Random numbers everywhere: fresh biases, scales and norms are constants that could hide a mistake."""
    import jax

    from v4_jax import declarations
    from v4_jax.parameters import is_parameter

    rng = np.random.default_rng(0)

    def value(declared: Any) -> np.ndarray:
        if declared.storage == "i64":
            experts = np.resize(np.arange(config.n_routed_experts, dtype=np.int32), declared.shape)
            return rng.permuted(experts, axis=-1)
        center = 1.0 if "norm" in declared.released else 0.0
        return rng.normal(center, 0.2, declared.shape).astype(np.float32)

    return jax.tree.map(value, declarations(config), is_leaf=is_parameter)


def prompt(task: Task) -> np.ndarray:
    """Token ids; a shorter prompt is the beginning of a longer one."""
    return np.random.default_rng(0).integers(0, architecture().vocab_size, task.length).astype(np.int32)


def build(task: Task, split: bool) -> tuple[Any, Any, Any]:
    """Model, parameters and an empty cache, on all devices or on the first."""
    import jax

    from v4_jax import Transformer, init_cache
    from v4_jax.parameter_tree import placements
    from v4_jax.sharding.mesh import make_mesh

    config, mesh = architecture(), make_mesh(MESH) if split else None
    model = Transformer(config, policy="float32", mesh=mesh, rules=PRESET)
    params = jax.device_put(weights(config), placements(config, mesh, PRESET) if mesh else jax.devices()[0])
    return model, params, init_cache(config, 1, task.length + DECODED, dtype="float32", mesh=mesh, rules=PRESET)


def predicted(flops: Any) -> dict[str, float]:
    """FLOPs of a token by whether they grow with its position; only a chunk's last token reaches the head."""
    growing = flops.index + flops.attention["hca"]
    every = sum(flops.linear.values()) - flops.linear["head"] + sum(flops.attention.values()) + flops.index
    return {"constant": every - growing, "growing": growing}


def measure(task: Task) -> dict[str, Any]:
    """Prefills and decodes on all devices; times every chunk and every token."""
    import jax
    import jax.numpy as jnp

    from v4_jax import costs

    model, params, cache = build(task, split=True)
    config, room, on_each = model.config, task.length + DECODED, bytes_on_first_device(cache)

    def apply(params: Any, tokens: Any, cache: Any) -> tuple[Any, Any]:
        output = model.apply({"params": params}, tokens, cache=cache, logits="last")
        return output.logits[0, -1], output.cache

    def program(size: int) -> Any:
        tokens = jax.ShapeDtypeStruct((1, size), jnp.int32)
        return jax.jit(apply, donate_argnums=2).lower(params, tokens, cache).compile()

    prefill, decode, tokens = program(task.chunk), program(1), prompt(task)
    compiled = peak_memory()

    logits, chunks, steps = [], [], []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"{task.length:,} tokens", total=task.length)
        for first in range(0, task.length, task.chunk):
            wall, busy = time.perf_counter(), time.process_time()
            last, cache = prefill(params, tokens[None, first : first + task.chunk], cache)
            logits.append(np.asarray(last))
            flops = costs.flops_per_token(config, first + task.chunk // 2)
            chunks.append(
                {
                    "position": first + task.chunk // 2,
                    "seconds": time.perf_counter() - wall,
                    "cpu seconds": time.process_time() - busy,
                    **predicted(flops),
                }
            )
            progress.advance(bar, task.chunk)
    last = logits[-1]
    for _ in range(DECODED):
        wall = time.perf_counter()
        last, cache = decode(params, np.argmax(last).astype(np.int32)[None, None], cache)
        last = np.asarray(last)
        steps.append(time.perf_counter() - wall)
    seen = int(cache.lengths[0])
    if seen != room or not np.isfinite(last).all():
        raise SystemExit(f"the cache counts {seen} tokens after {room}, or the last logits are not finite")
    return {
        "length": task.length,
        "chunk": task.chunk,
        "chunks": chunks,
        "decode seconds": steps,
        "cache": cache.nbytes(),
        "cache per device": on_each,
        "predicted cache": costs.cache_bytes(config, room, "float32").by_role,
        "programs": {"prefill": memory_of(prefill), "decode": memory_of(decode)},
        "peak": peak_memory(),
        "peak before": compiled,
        "first logits": np.stack(logits[: COMPARED // task.chunk]).tolist(),
    }


def bytes_on_first_device(cache: Any) -> dict[str, int]:
    """Bytes of cache that the first device really holds, by role, named as `Cache.nbytes` does."""
    import jax

    sizes: dict[str, int] = {}
    parts = [
        *cache.entries.items(),
        *((role, cache.rings[role]) for role in ("window", "draft") if role in cache.rings),
    ]
    parts += [("open blocks", rows) for role, rows in cache.rings.items() if role in cache.entries]
    for name, rows in parts:
        held = (array.addressable_shards[0].data for array in jax.tree.leaves(rows))
        sizes[name] = sizes.get(name, 0) + sum(data.nbytes for data in held)
    return sizes


def memory_of(program: Any) -> dict[str, int]:
    """What XLA allots to a program on each device."""
    found = program.memory_analysis()
    return {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes}


def peak_memory() -> int:
    """High-water mark of this process's resident memory, in bytes (`ru_maxrss` would inherit the parent's)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def compare(task: Task) -> dict[str, Any]:
    """All devices against one: logits at the last token of every chunk and at every decoded token, and all decisions.

    One device runs twice: deciding for itself, and with the decisions of the split run replayed. Float sums in another
    order turn a few near ties of the indexer or the router around, after which logits rightly differ by more than
    rounding. Replay takes that away: what is left must be within the tolerance.
    """
    import jax

    from v4_jax import Routing

    def feed(split: bool, tokens: np.ndarray, replay: list[Any] | None = None) -> tuple[np.ndarray, np.ndarray, Any]:
        """Logits, tokens with what was decoded, and decisions; tokens beyond the prompt are fed as given."""
        model, params, cache = build(task, split)

        @functools.partial(jax.jit, donate_argnums=2)
        def step(params: Any, tokens: Any, cache: Any, routing: Any) -> tuple[Any, Any, Any]:
            output = model.apply(
                {"params": params}, tokens, cache=cache, logits="last", routing=routing, return_routing=True
            )
            return output.logits[0, -1], output.cache, Routing(output.routing.experts, output.routing.entries)

        logits, decisions = [], []
        for number in range(task.length // task.chunk + DECODED):
            first = min(task.length, number * task.chunk) + max(0, number - task.length // task.chunk)
            if first == len(tokens):
                tokens = np.append(tokens, np.argmax(logits[-1]).astype(np.int32))
            piece = tokens[None, first : first + (task.chunk if first < task.length else 1)]
            last, cache, decided = step(params, piece, cache, replay[number] if replay else None)
            logits.append(np.asarray(last, np.float64))
            decisions.append(jax.tree.map(np.asarray, decided))
        return np.stack(logits), tokens, decisions

    def joined(decisions: list[Any], name: str) -> np.ndarray:
        """All tokens' decisions of a kind, in no order: [layers, tokens, choices]."""
        return np.sort(np.concatenate([getattr(decided, name)[:, 0] for decided in decisions], axis=1), axis=-1)

    ours, tokens, decided = feed(True, prompt(task))
    alone, _, decided_alone = feed(False, tokens)
    replayed, _, _ = feed(False, tokens, decided)

    picks, picks_alone = joined(decided, "entries"), joined(decided_alone, "entries")
    other = sum(
        len(np.setdiff1d(a, b))
        for a, b in zip(picks.reshape(-1, picks.shape[-1]), picks_alone.reshape(-1, picks.shape[-1]), strict=True)
        if (a != b).any()
    )
    experts = joined(decided, "experts") != joined(decided_alone, "experts")
    as_many = bool(((picks >= 0).sum(-1) == (picks_alone >= 0).sum(-1)).all())
    top = np.sort(replayed, axis=-1)
    clear = top[:, -1] - top[:, -2] > TOLERANCE  # a closer pair may change places within the tolerance
    moved = int(((ours.argmax(-1) != replayed.argmax(-1)) & clear).sum())
    difference = float(np.abs(ours - replayed).max())
    free = np.abs(ours - alone).max(axis=-1)
    return {
        "length": task.length,
        "chunks": task.length // task.chunk,
        "difference": difference,
        "argmax differs": moved,
        "largest logit": float(np.abs(replayed).max()),
        "picks": picks.size,
        "other picks": other,
        "tokens with other experts": int(experts.any(-1).sum()),
        "free difference": float(free.max()),
        "free argmax differs": int((ours.argmax(-1) != alone.argmax(-1)).sum()),
        "free within": int((free <= TOLERANCE).sum()),
        "equal": difference <= TOLERANCE and not moved and as_many and other <= NEAR_TIES * picks.size,
    }


# ---- all of them -----------------------------------------------------------------------------------------------------


def spawn(task: Task) -> dict[str, Any]:
    """Runs a task in a process of its own."""
    environment = dict(os.environ)
    flags = f"--xla_force_host_platform_device_count={DEVICES} {PATIENCE}"
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}"
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, __file__, "--task", json.dumps(dataclasses.asdict(task))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{task} failed with status {done.returncode}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def collect(lengths: tuple[int, ...], chunk: int, saved: Path) -> dict[str, Any]:
    """Compares at one length, and measures all; saves as it goes."""
    equality = spawn(Task(COMPARED, chunk, compare=True))
    print("\n".join(sentences(equality)), file=sys.stderr, flush=True)
    if not equality["equal"]:
        raise SystemExit("split and unsplit run differ")
    runs: list[dict[str, Any]] = []
    results = {"devices": DEVICES, "cores": os.cpu_count(), "equality": equality, "runs": runs}
    starts: dict[int, Any] = {}
    for length in lengths:
        run = spawn(Task(length, chunk))
        starts[length] = np.array(run.pop("first logits"))
        if length > COMPARED:
            run["difference of room"] = float(np.abs(starts[length] - starts[COMPARED]).max())
        runs.append(run)
        saved.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{length:,} tokens: {prefill_seconds(run):,.1f} s", file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="16,384 and 65,536 tokens only; the document stays as is")
    parser.add_argument("--chunk", type=int, default=8192, help="prompt tokens processed at once")
    parser.add_argument("--output", type=Path, help="directory for million.json and million.png")
    parser.add_argument("--report", action="store_true", help="measure nothing: report what the output directory holds")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task = Task(**options.task)
        print("RESULT " + json.dumps(compare(task) if task.compare else measure(task)), flush=True)
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("matplotlib not installed: pip install -e '.[benchmarks]'")
    results_folder = ROOT / ("build" if options.quick else "benchmarks/results")
    folder = options.output or results_folder
    folder.mkdir(parents=True, exist_ok=True)
    saved = folder / "million.json"
    if options.report:
        results = json.loads(saved.read_text())
    else:
        results = collect(QUICK if options.quick else LENGTHS, options.chunk, saved)
    show(results)
    draw(results, folder / "million.png")
    if not options.quick and not options.output:
        write_document(results)


if __name__ == "__main__":
    main()
