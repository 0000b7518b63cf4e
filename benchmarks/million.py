"""A million tokens with the sequence split over eight devices: time, memory and cache against the predictions.

    pip install -e '.[benchmarks]'
    python benchmarks/million.py [--quick]

A tiny model with every layer role reads 65,536, 262,144 and 1,048,576 tokens in chunks, each chunk split over eight
virtual devices of this machine's CPU, and then writes 64 more. Every length is a process of its own, so that peak
memory is its own. Seconds per token are compared with the FLOPs that `v4_jax.costs` predicts at each position, bytes of
cache with what the configuration predicts, and at 65,536 tokens the logits with those of one device that holds
everything: the run fails if they differ. docs/million.md explains the numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "million.md"

DEVICES = 8
MESH, PRESET = f"seq={DEVICES}", "long-context"
LENGTHS, QUICK = (65536, 262144, 1048576), (16384, 65536)
COMPARED = 65536  # the length at which one device computes everything again
DECODED = 64
TOLERANCE = 2e-4  # the project's contract for float32 logits
MEGABYTE = 1e6

# Eight devices share the cores: the first to reach a collective waits for all others' work, which XLA takes for a hang.
PATIENCE = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600"
PATIENCE += " --xla_cpu_collective_call_terminate_timeout_seconds=3600"

# ---- one length, in its own process ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process measures.

    Attributes:
      length: prompt tokens.
      chunk: prompt tokens processed at once.
      split: over all devices, or everything on one.
      outputs: file for the logits and the tokens that were fed.
      replay: such a file, whose decoded tokens are fed instead of the own choices; empty for none.
    """

    length: int
    chunk: int
    split: bool
    outputs: str
    replay: str = ""


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


def run(task: Task) -> dict[str, Any]:
    """Prefills and decodes; times every chunk and every token."""
    import jax
    import jax.numpy as jnp

    from sharding.mesh import make_mesh
    from v4_jax import Transformer, costs, init_cache
    from v4_jax.placement import placements

    config, room = architecture(), task.length + DECODED
    mesh = make_mesh(MESH) if task.split else None
    model = Transformer(config, policy="float32", mesh=mesh, rules=PRESET)
    params = jax.device_put(weights(config), placements(config, mesh, PRESET) if mesh else None)
    cache = init_cache(config, 1, room, dtype="float32", mesh=mesh, rules=PRESET)
    on_each = bytes_on_first_device(cache)

    def apply(params: Any, tokens: Any, cache: Any) -> tuple[Any, Any]:
        output = model.apply({"params": params}, tokens, cache=cache, logits="last")
        return output.logits[0, -1], output.cache

    def program(size: int) -> Any:
        tokens = jax.ShapeDtypeStruct((1, size), jnp.int32)
        return jax.jit(apply, donate_argnums=2).lower(params, tokens, cache).compile()

    prefill, decode = program(task.chunk), program(1)
    tokens = np.random.default_rng(task.length).integers(0, config.vocab_size, task.length).astype(np.int32)
    replayed = np.load(task.replay)["tokens"][task.length :] if task.replay else None
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
                    # Only a chunk's last token reaches the head.
                    "dense": sum(flops.linear.values()) - flops.linear["head"] + sum(flops.attention.values()),
                    "index": flops.index,
                }
            )
            progress.advance(bar, task.chunk)
    for number in range(DECODED):
        token = np.argmax(logits[-1]).astype(np.int32) if replayed is None else replayed[number]
        tokens = np.append(tokens, token)
        wall = time.perf_counter()
        last, cache = decode(params, token[None, None], cache)
        logits.append(np.asarray(last))
        steps.append(time.perf_counter() - wall)
    np.savez(task.outputs, logits=np.stack(logits), tokens=tokens)
    seen = int(cache.lengths[0])
    if seen != room:
        raise SystemExit(f"the cache counts {seen} tokens after {room}")
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
    }


def bytes_on_first_device(cache: Any) -> dict[str, int]:
    """Bytes of cache that the first device really holds, by role, named as `Cache.nbytes` does."""
    import jax

    sizes: dict[str, int] = {}
    for role, rows in cache.rows.items():
        name = "open blocks" if role.endswith("state") else role
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


# ---- all of them -----------------------------------------------------------------------------------------------------


def measure(task: Task) -> dict[str, Any]:
    """Runs a task in a process of its own."""
    environment = dict(os.environ)
    flags = f"--xla_force_host_platform_device_count={DEVICES if task.split else 1} {PATIENCE}"
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}"
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, __file__, "--task", json.dumps(dataclasses.asdict(task))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"measuring {task} failed with status {done.returncode}")
    result = json.loads(lines[-1].removeprefix("RESULT "))
    where = f"{DEVICES} devices" if task.split else "1 device"
    print(f"{task.length:,} tokens on {where}: {prefill_seconds(result):,.1f} s", file=sys.stderr, flush=True)
    return result


def collect(lengths: tuple[int, ...], chunk: int) -> dict[str, Any]:
    """Measures every length, and compares one of them with an unsplit run that is fed the same tokens."""
    with tempfile.TemporaryDirectory() as folder:

        def task(length: int, split: bool, **more: str) -> Task:
            return Task(length, chunk, split, f"{folder}/{length}-{split}.npz", **more)

        runs = [measure(task(length, True)) for length in lengths[: lengths.index(COMPARED) + 1]]
        split = task(COMPARED, True).outputs
        alone = task(COMPARED, False, replay=split)
        unsplit = measure(alone)
        equality = compare(split, alone.outputs) | {"unsplit seconds": prefill_seconds(unsplit)}
        if not equality["equal"]:
            raise SystemExit(f"split and unsplit run differ: {sentence(equality)}")
        runs += [measure(task(length, True)) for length in lengths[len(runs) :]]
    return {"devices": DEVICES, "cores": os.cpu_count(), "runs": runs, "equality": equality}


def compare(split: str, unsplit: str) -> dict[str, Any]:
    """Logits at the last token of every chunk and at every decoded token, of two runs over the same tokens."""
    a, b = np.load(split), np.load(unsplit)
    assert np.array_equal(a["tokens"], b["tokens"])
    first, second = a["logits"].astype(np.float64), b["logits"].astype(np.float64)
    difference = np.abs(first - second).max(axis=-1)
    top = np.sort(second, axis=-1)
    clear = top[:, -1] - top[:, -2] > TOLERANCE  # a closer pair may change places within the tolerance
    moved = (first.argmax(axis=-1) != second.argmax(axis=-1)) & clear
    return {
        "tokens": len(difference),
        "difference": float(difference.max()),
        "typical difference": float(np.median(difference)),
        "largest logit": float(np.abs(second).max()),
        "argmax differs": int(moved.sum()),
        "equal": bool(difference.max() <= TOLERANCE and not moved.any()),
    }


def sentence(equality: dict[str, Any]) -> str:
    return (
        f"at {COMPARED:,} tokens, logits of {equality['tokens']} tokens (the last of every chunk, all decoded) differ "
        f"by at most {equality['difference']:.1e} (median {equality['typical difference']:.1e}, allowed "
        f"{TOLERANCE:.0e}, largest logit {equality['largest logit']:.1f}), and the likeliest token differs at "
        f"{equality['argmax differs']} of them"
    )


# ---- what it shows ---------------------------------------------------------------------------------------------------


def prefill_seconds(run: dict[str, Any]) -> float:
    return sum(chunk["seconds"] for chunk in run["chunks"])


def columns(run: dict[str, Any], *names: str) -> list[np.ndarray]:
    """Numbers of all chunks, one array for each name."""
    return [np.array([chunk[name] for chunk in run["chunks"]]) for name in names]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Seconds per FLOP: one constant for the indexer's scores, one for everything else."""

    dense: float
    index: float

    @classmethod
    def of(cls, run: dict[str, Any]) -> Fit:
        """Least squares over a run's chunks."""
        dense, index, seconds = columns(run, "dense", "index", "seconds")
        constants = np.linalg.lstsq(np.stack([dense, index], axis=1), seconds / run["chunk"], rcond=None)[0]
        return cls(*(float(constant) for constant in constants))

    def per_token(self, run: dict[str, Any]) -> np.ndarray:
        """Seconds per token in each chunk."""
        dense, index = columns(run, "dense", "index")
        return self.dense * dense + self.index * index

    def seconds(self, run: dict[str, Any]) -> float:
        """Seconds of a whole prefill."""
        return float(self.per_token(run).sum() * run["chunk"])

    def explained(self, run: dict[str, Any]) -> float:
        """Share of the variance of a run's seconds per token that it explains (R squared)."""
        seconds = columns(run, "seconds")[0] / run["chunk"]
        return float(1 - np.sum((seconds - self.per_token(run)) ** 2) / np.sum((seconds - seconds.mean()) ** 2))


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, headings and rows."""
    runs = results["runs"]
    fit = Fit.of(runs[-1])

    def on_device(run: dict[str, Any], name: str) -> str:
        program = run["programs"][name]
        both = (program["arguments"] + program["temporaries"]) / MEGABYTE
        return f"{both:.1f} ({program['temporaries'] / MEGABYTE:.1f})"

    overall = []
    for run in runs:
        seconds = prefill_seconds(run)
        overall.append(
            [
                f"{run['length']:,}",
                f"{seconds:,.1f}",
                f"{fit.seconds(run):,.1f}",
                f"{run['length'] / seconds:,.0f}",
                f"{1e3 * np.median(run['decode seconds']):.1f}",
                on_device(run, "prefill"),
                on_device(run, "decode"),
                f"{run['peak'] / MEGABYTE:,.0f}",
            ]
        )
    headings = ["tokens", "prefill, s", "by the fit, s", "tokens/s", "decode, ms/token"]
    headings += ["prefill, MB on a device (temporaries)", "decode, MB on a device (temporaries)", "peak of all, MB"]
    first = (f"Prefill and {DECODED} decoded tokens, {results['devices']} virtual devices", headings, overall)

    roles = []
    for role in runs[-1]["predicted cache"]:
        roles.append([role])
        for run in runs:
            held, predicted, each = (run[name][role] for name in ("cache", "predicted cache", "cache per device"))
            exact = "" if held == predicted else f" (predicted {predicted / MEGABYTE:.3f})"
            roles[-1] += [f"{held / MEGABYTE:.3f}{exact}", f"{each / MEGABYTE:.3f}"]
    total = ["all roles"]
    for run in runs:
        total += [f"{sum(run[name].values()) / MEGABYTE:.3f}" for name in ("cache", "cache per device")]
    roles.append(total)
    headings = ["role"]
    for run in runs:
        headings += [f"{run['length']:,}", "on a device"]
    exact = all(run["cache"] == run["predicted cache"] for run in runs)
    title = "Cache, MB of float32: " + ("exactly as the configuration predicts" if exact else "NOT as predicted")
    return [first, (title, headings, roles)]


def remarks(results: dict[str, Any]) -> list[str]:
    """The fit and the comparison, one sentence each."""
    runs, equality = results["runs"], results["equality"]
    fit, forecast = Fit.of(runs[-1]), Fit.of(runs[-2])
    ratio = forecast.seconds(runs[-1]) / prefill_seconds(runs[-1])
    return [
        f"Fit over the {len(runs[-1]['chunks'])} chunks of {runs[-1]['length']:,} tokens: {1e-9 / fit.index:.1f} "
        f"GFLOP/s in the indexer's scores, {1e-9 / fit.dense:.2f} in all else; it explains "
        f"{fit.explained(runs[-1]):.1%} of the variance.",
        f"The constants of {runs[-2]['length']:,} tokens alone forecast {ratio:.2f} times the seconds that "
        f"{runs[-1]['length']:,} took.",
        f"Split against unsplit: {sentence(equality)}.",
    ]


def show(results: dict[str, Any]) -> None:
    console = Console()
    for title, headings, rows in tables(results):
        table = Table(title=title)
        for heading in headings:
            table.add_column(heading, justify="right" if heading != "role" else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in remarks(results):
        console.print(line, highlight=False)


def markdown(results: dict[str, Any]) -> str:
    parts = []
    for title, headings, rows in tables(results):
        lines = [f"**{title}**", "", f"| {' | '.join(headings)} |", f"|{' ---: |' * len(headings)}"]
        parts.append("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]))
    parts.append("\n".join(f"- {line}" for line in remarks(results)))
    return "\n\n".join(parts)


def write_document(results: dict[str, Any]) -> None:
    """Replaces the measured part of the document."""
    begin, end = "<!-- measured -->\n", "<!-- end of measured -->"
    before, rest = DOCUMENT.read_text().split(begin)
    DOCUMENT.write_text(f"{before}{begin}\n{markdown(results)}\n\n{end}{rest.split(end)[1]}")


def draw(results: dict[str, Any], path: Path) -> None:
    """Cost against position, and memory against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = results["runs"]
    fit = Fit.of(runs[-1])
    figure, (cost, memory) = pyplot.subplots(1, 2, figsize=(13, 5), constrained_layout=True)

    for run in runs:
        position, seconds = columns(run, "position", "seconds")
        label = f"measured, {run['length'] // 1024}K tokens"
        cost.plot(position / 1024, 1000 * seconds / run["chunk"], ".", label=label)
    position = columns(runs[-1], "position")[0]
    cost.plot(position / 1024, 1000 * fit.per_token(runs[-1]), "k-", linewidth=1, label="predicted FLOPs, two rates")
    cost.set(xlabel="position, thousands (K) of tokens", ylabel="seconds per 1,000 tokens", title="Cost of a token")

    lengths = [run["length"] / 1024 for run in runs]

    def line(label: str, values: list[float], style: str) -> None:
        memory.plot(lengths, np.array(values) / MEGABYTE, style, label=label)

    line("peak of the whole process", [run["peak"] for run in runs], "s-")
    for name in ("prefill", "decode"):
        line(f"{name}: a device, arguments and temporaries", [sum(r["programs"][name].values()) for r in runs], "o-")
    line("cache, all devices", [sum(run["cache"].values()) for run in runs], "^-")
    line("cache, predicted", [sum(run["predicted cache"].values()) for run in runs], "k:")
    line("cache, a device", [sum(run["cache per device"].values()) for run in runs], "v-")
    memory.set(xlabel="length, thousands (K) of tokens", ylabel="MB", title="Memory", xscale="log", yscale="log")
    memory.set_xticks(lengths, [f"{length:.0f}" for length in lengths])
    memory.minorticks_off()
    for axes in (cost, memory):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="16,384 and 65,536 tokens only; the document stays as is")
    parser.add_argument("--chunk", type=int, default=8192, help="prompt tokens processed at once")
    parser.add_argument("--output", type=Path, help="directory for million.json and million.png")
    parser.add_argument("--report", action="store_true", help="measure nothing: report what the output directory holds")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print("RESULT " + json.dumps(run(Task(**options.task))), flush=True)
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
        results = collect(QUICK if options.quick else LENGTHS, options.chunk)
        saved.write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    draw(results, folder / "million.png")
    if not options.quick and not options.output:
        write_document(results)


if __name__ == "__main__":
    main()
