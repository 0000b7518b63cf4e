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
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
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
NEAR_TIES = 1e-4  # share of picked entries that may differ: of two that score alike to the last digit, either is right
MEGABYTE = 1e6

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


def sentences(equality: dict[str, Any]) -> list[str]:
    tokens = equality["chunks"] + DECODED
    return [
        f"Split against one device, {equality['length']:,} tokens and {DECODED} decoded, the split run's decisions "
        f"replayed: logits at the ends of {equality['chunks']} chunks and of all decoded tokens differ by at most "
        f"{equality['difference']:.1e} (allowed {TOLERANCE:.0e}; largest logit {equality['largest logit']:.1f}), "
        f"another likeliest token at {equality['argmax differs']} of {tokens}.",
        f"Deciding for itself, one device picks {equality['other picks']:,} of {equality['picks']:,} entries otherwise "
        f"(near ties, allowed {NEAR_TIES:.0e} of them) and other experts for "
        f"{equality['tokens with other experts']:,} tokens of all layers; logits are then within {TOLERANCE:.0e} at "
        f"{equality['free within']} of {tokens} tokens, at most {equality['free difference']:.1e} apart, another "
        f"likeliest token at {equality['free argmax differs']}.",
    ]


# ---- what it shows ---------------------------------------------------------------------------------------------------


def prefill_seconds(run: dict[str, Any]) -> float:
    return sum(chunk["seconds"] for chunk in run["chunks"])


def cpu_seconds(run: dict[str, Any]) -> float:
    return sum(chunk["cpu seconds"] for chunk in run["chunks"])


def columns(run: dict[str, Any], *names: str) -> list[np.ndarray]:
    """Numbers of all chunks, one array for each name."""
    return [np.array([chunk[name] for chunk in run["chunks"]]) for name in names]


def cost(run: dict[str, Any]) -> np.ndarray:
    """Seconds of CPU per token in each chunk."""
    return columns(run, "cpu seconds")[0] / run["chunk"]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Seconds of CPU per FLOP: of what grows with the position (index scores and HCA), and of everything else.

    CPU time of all threads, since whatever else runs on the machine moves the wall clock far more.
    """

    constant: float
    growing: float

    @classmethod
    def of(cls, run: dict[str, Any]) -> Fit:
        """Least squares of the relative deviations over a run's chunks."""
        work = np.stack(columns(run, "constant", "growing"), axis=1) / cost(run)[:, None]
        rates = np.linalg.lstsq(work, np.ones(len(work)), rcond=None)[0]
        return cls(*(float(rate) for rate in rates))

    def per_token(self, run: dict[str, Any]) -> np.ndarray:
        """Seconds of CPU per token in each chunk."""
        constant, growing = columns(run, "constant", "growing")
        return self.constant * constant + self.growing * growing

    def seconds(self, run: dict[str, Any]) -> float:
        """Seconds of CPU of a whole prefill."""
        return float(self.per_token(run).sum() * run["chunk"])

    def explained(self, run: dict[str, Any]) -> float:
        """Share of the variance of a run's cost per token that it explains (R squared)."""
        return float(1 - np.sum((cost(run) - self.per_token(run)) ** 2) / np.sum((cost(run) - cost(run).mean()) ** 2))

    def deviation(self, run: dict[str, Any]) -> float:
        """Median relative deviation of a run's chunks."""
        return float(np.median(np.abs(self.per_token(run) / cost(run) - 1)))


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
                f"{cpu_seconds(run):,.1f}",
                f"{fit.seconds(run):,.1f}",
                f"{run['length'] / seconds:,.0f}",
                f"{1e3 * np.median(run['decode seconds']):.1f}",
                on_device(run, "prefill"),
                on_device(run, "decode"),
                f"{run['peak'] / MEGABYTE:,.0f}",
            ]
        )
    headings = ["tokens", "prefill, s", "CPU, s", "CPU by the fit, s", "tokens/s", "decode, ms/token"]
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
    runs = results["runs"]
    fit, forecast = Fit.of(runs[-1]), Fit.of(runs[-2])
    ratio = forecast.seconds(runs[-1]) / cpu_seconds(runs[-1])
    rooms = [run for run in runs if "difference of room" in run]

    def growth(total: Callable[[dict[str, Any]], int]) -> str:
        """Bytes per further token between each length and the next."""
        steps = itertools.pairwise(runs)
        return " and ".join(f"{(total(b) - total(a)) / (b['length'] - a['length']):.1f}" for a, b in steps)

    return [
        f"Fit over the {len(runs[-1]['chunks'])} chunks of {runs[-1]['length']:,} tokens: {1e-9 / fit.growing:.1f} "
        f"GFLOP/s in index scores and HCA, {1e-9 / fit.constant:.2f} in all else, of CPU time; it "
        f"explains {fit.explained(runs[-1]):.1%} of the variance, and half of the chunks are within "
        f"{fit.deviation(runs[-1]):.1%} of it.",
        f"The rates of {runs[-2]['length']:,} tokens alone forecast {ratio:.2f} times the CPU time that "
        f"{runs[-1]['length']:,} took.",
        "Bytes per further token, from each length to the next: "
        f"{growth(lambda run: sum(run['cache'].values()))} of cache (predicted "
        f"{growth(lambda run: sum(run['predicted cache'].values()))}); on a device, "
        f"{growth(lambda run: sum(run['programs']['prefill'].values()))} in prefill and "
        f"{growth(lambda run: sum(run['programs']['decode'].values()))} in decoding; "
        f"{growth(lambda run: run['peak'])} of the process' peak.",
        *sentences(results["equality"]),
        *(
            f"In a cache with room for {run['length']:,}, the first {COMPARED:,} tokens give the same logits: greatest "
            f"difference {run['difference of room']:.1e}."
            for run in rooms
        ),
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
    figure, (per_token, memory) = pyplot.subplots(1, 2, figsize=(13, 5), constrained_layout=True)

    for number, run in enumerate(runs):
        position, wall = columns(run, "position", "seconds")
        longest = run is runs[-1]
        name = "wall clock: with whatever else ran" if longest else None
        per_token.plot(position / 1024, 1000 * wall / run["chunk"], ".", color="0.85", label=name, zorder=0)
        label = f"CPU time, {run['length'] // 1024}K tokens"
        per_token.plot(position / 1024, 1000 * cost(run), ".", color=f"C{number}", label=label)
    position = columns(runs[-1], "position")[0]
    line = 1000 * fit.per_token(runs[-1])
    per_token.plot(position / 1024, line, "k-", linewidth=1, label="predicted FLOPs, two rates")
    per_token.set(
        xlabel="position, thousands (K) of tokens", ylabel="seconds per 1,000 tokens", title="Cost of a token"
    )

    lengths = [run["length"] / 1024 for run in runs]

    def curve(label: str, values: list[float], style: str) -> None:
        memory.plot(lengths, np.array(values) / MEGABYTE, style, label=label)

    curve("peak of the whole process", [run["peak"] for run in runs], "s-")
    for name in ("prefill", "decode"):
        curve(f"{name}: a device, arguments and temporaries", [sum(r["programs"][name].values()) for r in runs], "o-")
    curve("cache, all devices", [sum(run["cache"].values()) for run in runs], "^-")
    curve("cache, predicted", [sum(run["predicted cache"].values()) for run in runs], "k:")
    curve("cache, a device", [sum(run["cache per device"].values()) for run in runs], "v-")
    memory.set(xlabel="length, thousands (K) of tokens", ylabel="MB", title="Memory", xscale="log", yscale="log")
    memory.set_xticks(lengths, [f"{length:.0f}" for length in lengths])
    memory.minorticks_off()
    memory.set_ylim(top=30 * max(run["peak"] for run in runs) / MEGABYTE)  # room for the legend
    for axes in (per_token, memory):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
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
