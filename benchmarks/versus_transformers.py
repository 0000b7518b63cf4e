"""Speed and memory against transformers' DeepSeek-V4 on a CPU: the same weights, float32, side by side in one run.

    pip install -e '.[oracle]'
    python benchmarks/versus_transformers.py

A small model of the real shape (about 125M parameters, every layer role, hash and score routing) is prefilled and
decoded by both. Every measurement is a process of its own, ours and theirs in turn, so that threads do not meet and
peak memory belongs to one of them. Compilation and warm-up are left out of the rates and printed beside them.
transformers is measured as it runs by default, the whole prompt at once, and again with the prompt cut into chunks,
which it computes correctly too. Both sides' next-token logits and greedy continuations are compared in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
GIGABYTE = 1e9
LOGITS_TOLERANCE = 2e-4  # the project's contract for float32

# ---- one measurement, in its own process -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process measures.

    Attributes:
      side: "ours" or "theirs", or "weights", which writes the weights for both.
      length: prompt tokens.
      decode: tokens generated after the prompt; 0 measures the prefill.
      chunk: prompt tokens processed at once; 0 for all.
      repeats: timed repetitions, of which the median counts.
      weights: directory of the weights.
      profile: directory for a profiler trace, or empty.
    """

    side: str
    length: int
    decode: int = 0
    chunk: int = 0
    repeats: int = 3
    weights: str = ""
    profile: str = ""


def architecture() -> Any:
    """The benchmark's model."""
    from v4_jax import Config

    return Config(
        vocab_size=8192,
        hidden_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=16,
        head_dim=128,
        qk_rope_head_dim=32,
        q_lora_rank=256,
        o_groups=4,
        o_lora_rank=128,
        n_routed_experts=32,
        num_experts_per_tok=4,
        routed_scaling_factor=1.5,
        index_n_heads=8,
        index_head_dim=64,
        index_topk=128,
        compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128),
        num_hash_layers=3,
        num_nextn_predict_layers=0,
    )


def prompt(length: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, vocabulary, (1, length)).astype(np.int32)


def peak_memory() -> float:
    """High-water mark of this process's resident memory, in GB (`ru_maxrss` would inherit the parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / GIGABYTE


def write_weights(task: Task) -> dict[str, Any]:
    """Random weights, saved for each side in the form that it loads without a second copy."""
    import jax

    from tests.oracle import hf

    config = architecture()
    model = hf.build(config)
    hf.randomise(model, config, seed=0)
    state = hf.state_of(model)
    leaves = jax.tree.leaves(hf.params_from_state(state, config))
    (Path(task.weights) / "config.json").write_text(json.dumps(hf.hf_content(config)))
    for side, arrays in (("theirs", state.values()), ("ours", leaves)):
        for number, array in enumerate(arrays):
            np.save(weights_file(task, side, number), array)
    return {"parameters": sum(leaf.size for leaf in leaves)}


def weights_file(task: Task, side: str, number: int) -> Path:
    return Path(task.weights) / f"{side}-{number}.npy"


def measure_ours(task: Task) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from v4_jax import Transformer, init_cache
    from v4_jax.kernels.compiler_options import compiler_options
    from v4_jax.parameter_tree import declarations
    from v4_jax.parameters import is_parameter

    config = architecture()
    tree = jax.tree.structure(declarations(config), is_leaf=is_parameter)
    leaves = [jax.device_put(np.load(weights_file(task, "ours", i))) for i in range(tree.num_leaves)]
    params = jax.block_until_ready(jax.tree.unflatten(tree, leaves))
    model = Transformer(config, policy="float32")
    tokens = prompt(task.length, config.vocab_size)
    chunk = min(task.chunk or task.length, task.length)
    pieces = [jnp.asarray(tokens[:, start : start + chunk]) for start in range(0, task.length, chunk)]

    def apply(params: Any, tokens: Any, cache: Any) -> tuple[Any, Any, Any]:
        output = model.apply({"params": params}, tokens, cache=cache, logits="last")
        return jnp.argmax(output.logits[:, -1:], axis=-1).astype(jnp.int32), output.logits[0, -1], output.cache

    step = jax.jit(apply, donate_argnums=2)
    options = compiler_options("decoding", jax.default_backend())
    single = jax.jit(apply, donate_argnums=2, compiler_options=options)

    def fresh() -> Any:
        return init_cache(config, 1, task.length + task.decode, dtype="float32")

    def prefill(cache: Any) -> tuple[Any, Any, Any]:
        for piece in pieces:
            token, logits, cache = step(params, piece, cache)
        return jax.block_until_ready((token, logits, cache))

    def trace(wanted: bool) -> Any:
        return jax.profiler.trace(task.profile) if wanted and task.profile else contextlib.nullcontext()

    def run() -> tuple[float, Any, list[int]]:
        cache = jax.block_until_ready(fresh())
        with trace(not task.decode):
            start = time.perf_counter()
            token, logits, cache = prefill(cache)
            seconds = time.perf_counter() - start
        produced = [token]
        if task.decode:
            with trace(True):
                start = time.perf_counter()
                for _ in range(task.decode):
                    token, _, cache = single(params, token, cache)
                    produced.append(token)
                jax.block_until_ready(token)
                seconds = time.perf_counter() - start
        return seconds, logits, [int(token[0, 0]) for token in produced]

    start = time.perf_counter()
    cache = fresh()
    for piece in {piece.shape: piece for piece in pieces}.values():
        token, _, cache = step(params, piece, cache)
    if task.decode:
        jax.block_until_ready(single(params, token, cache))
    jax.block_until_ready(token)
    warm_up = time.perf_counter() - start
    del cache
    return finish(task, warm_up, run)


def measure_theirs(task: Task) -> dict[str, Any]:
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

    config = DeepseekV4Config(**json.loads((Path(task.weights) / "config.json").read_text()))
    model = DeepseekV4ForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="eager")
    model = model.eval().requires_grad_(False)
    for number, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(torch.from_numpy(np.load(weights_file(task, "theirs", number))))
    tokens = torch.from_numpy(prompt(task.length, config.vocab_size).astype(np.int64))

    def prefill(tokens: Any) -> tuple[Any, Any]:
        cache = DynamicCache(config=model.config)
        for piece in tokens.split(task.chunk or tokens.shape[1], dim=1):
            logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits, cache

    def run() -> tuple[float, Any, list[int]]:
        start = time.perf_counter()
        logits, cache = prefill(tokens)
        next_logits, token = logits[0, -1], logits[:, -1:].argmax(-1)
        produced = [int(token)]
        if task.decode:
            start = time.perf_counter()
            for _ in range(task.decode):
                token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                produced.append(int(token))
        return time.perf_counter() - start, next_logits, produced

    with torch.inference_mode():
        start = time.perf_counter()
        prefill(tokens[:, :512])
        return finish(task, time.perf_counter() - start, run)


def finish(task: Task, warm_up: float, run: Callable[[], tuple[float, Any, list[int]]]) -> dict[str, Any]:
    """Times the repetitions and gathers what both sides report."""
    seconds = []
    for _ in range(task.repeats):
        elapsed, logits, produced = run()
        seconds.append(elapsed)
    return {
        "work": task.decode or task.length,
        "seconds": seconds,
        "warm_up": warm_up,
        "peak": peak_memory(),
        "logits": np.asarray(logits, np.float64).tolist(),
        "tokens": produced,
    }


def child(task: Task) -> None:
    sys.path.insert(0, str(ROOT))  # the weights' way between the two models is shared with the tests
    result = {"ours": measure_ours, "theirs": measure_theirs, "weights": write_weights}[task.side](task)
    print("RESULT " + json.dumps(result), flush=True)


# ---- all of them, in turn --------------------------------------------------------------------------------------------


def measure(task: Task) -> dict[str, Any]:
    """Runs a task in a process of its own."""
    environment = dict(os.environ)
    # By default torch's threads spin while they wait for each other: with a busy neighbour, at a tenth of the speed.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if task.profile:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_dump_to={task.profile}/hlo"
    command = [sys.executable, __file__, "--task", json.dumps(dataclasses.asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"measuring {task} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def wait_for_quiet(patience: float) -> None:
    """Waits until no process had to wait for a core in the last ten seconds, or patience ends (Linux only)."""
    pressure, end = Path("/proc/pressure/cpu"), time.monotonic() + patience
    while pressure.exists() and time.monotonic() < end:
        if float(pressure.read_text().split("avg10=")[1].split()[0]) < 3:
            return
        time.sleep(1)


@dataclasses.dataclass
class Series:
    """The runs of one task.

    Attributes:
      task: what was measured.
      best: count the fastest repetition instead of the median.
      runs: results, one of each round.
    """

    task: Task
    best: bool
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second over every timed repetition of all rounds."""
        rates = [run["work"] / seconds for run in self.runs for seconds in run["seconds"]]
        return max(rates) if self.best else statistics.median(rates)

    @property
    def peak(self) -> float:
        return max(run["peak"] for run in self.runs)

    def __str__(self) -> str:
        work = f"{self.task.decode} tokens after {self.task.length:,}" if self.task.decode else f"{self.task.length:,}"
        how = f"in chunks of {self.task.chunk:,}" if self.task.chunk else "at once"
        return f"{self.task.side} {work} {how}"


class Results:
    """All series, by side, prompt length, whether they decode, and whether the prompt was cut into chunks."""

    def __init__(self, options: argparse.Namespace, weights: str) -> None:
        self.options, self.weights = options, weights
        self.series: dict[tuple[str, int, bool, bool], Series] = {}

    def add(self, task: Task) -> None:
        wait_for_quiet(self.options.patience)
        key = (task.side, task.length, task.decode > 0, task.chunk > 0)
        series = self.series.setdefault(key, Series(task, self.options.best))
        run = measure(dataclasses.replace(task, weights=self.weights))
        series.runs.append(run)
        rates = ", ".join(f"{run['work'] / seconds:,.1f}" for seconds in run["seconds"])
        print(
            f"{series}: {rates} tokens/s, peak {run['peak']:.2f} GB, left out {run['warm_up']:.1f} s of warm-up",
            file=sys.stderr,
            flush=True,
        )

    def find(self, side: str, length: int, *, decode: bool = False, chunked: bool = True) -> Series:
        return self.series[side, length, decode, chunked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind, of which the median counts")
    parser.add_argument("--best", action="store_true", help="count the fastest instead: for a machine never quiet")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for quiet before each measurement")
    parser.add_argument("--chunk", type=int, default=2048, help="prompt tokens that we process at once")
    parser.add_argument("--their-chunk", type=int, default=256, help="the same for transformers' second measurement")
    parser.add_argument("--decode", type=int, default=64, help="tokens generated in the decode measurement")
    parser.add_argument("--quick", action="store_true", help="one round, nothing beyond 4,096 tokens")
    parser.add_argument("--profile", type=Path, help="instead: trace our prefill and decode into this directory")
    parser.add_argument("--json", type=Path, help="write every measurement there")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        return child(Task(**options.task))
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"{' and '.join(missing)} not installed: pip install -e '.[oracle]'")
    with tempfile.TemporaryDirectory() as weights:
        results = Results(options, weights)
        parameters = measure(Task("weights", 0, weights=weights))["parameters"]
        if options.profile:
            return profile(results)
        collect(results)
    if options.json:
        every = [{**dataclasses.asdict(series.task), "runs": series.runs} for series in results.series.values()]
        options.json.write_text(json.dumps(every, indent=1))
    print(f"{parameters / 1e6:.0f}M parameters, float32, {os.cpu_count()} cores; tokens/s, peak resident memory\n")
    print(table(results))
    print(agreement(results))


def collect(results: Results) -> None:
    """Every measurement, ours and theirs in turn; our 4,096 and 16,384 tokens, whose rates are compared, in a row."""
    options = results.options
    chunk, their_chunk, decode = options.chunk, options.their_chunk, options.decode
    for _ in range(1 if options.quick else options.rounds):
        results.add(Task("ours", 1024, chunk=chunk))
        results.add(Task("theirs", 1024))
        results.add(Task("theirs", 1024, chunk=their_chunk))
        results.add(Task("theirs", 4096, repeats=1))
        results.add(Task("theirs", 4096, chunk=their_chunk))
        results.add(Task("ours", 4096, chunk=chunk))
        if not options.quick:
            results.add(Task("ours", 16384, chunk=chunk, repeats=1))
            results.add(Task("theirs", 16384, chunk=their_chunk, repeats=1))
        # How the prompt was processed does not matter to the rate of decoding.
        results.add(Task("ours", 4096, decode=decode, chunk=chunk))
        results.add(Task("theirs", 4096, decode=decode, chunk=their_chunk))
    if not options.quick:
        results.add(Task("ours", 65536, chunk=chunk, repeats=1))


def table(results: Results) -> str:
    """The comparison as a Markdown table."""
    rows = [
        "| measurement | ours | transformers | ratio | target | ours, GB | transformers, GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def compare(what: str, ours: Series, theirs: Series, least: float | None = None) -> None:
        ratio = ours.rate / theirs.rate
        target = "" if least is None else f"{least:.0f}x: {met(ratio >= least)}"
        rows.append(
            f"| {what} | {ours.rate:,.1f} | {theirs.rate:,.1f} | {ratio:.1f}x | {target} | {ours.peak:.2f} "
            f"| {theirs.peak:.2f} |"
        )

    chunks = f"... transformers in chunks of {results.options.their_chunk}"
    for length, least in ((1024, 2.0), (4096, 10.0)):
        compare(
            f"prefill {length:,}", results.find("ours", length), results.find("theirs", length, chunked=False), least
        )
        compare(chunks, results.find("ours", length), results.find("theirs", length))
    if not results.options.quick:
        long, longest = results.find("ours", 16384), results.find("ours", 65536)
        share = long.rate / results.find("ours", 4096).rate
        # Its attention holds a number for every pair of positions: four times the length, sixteen times the memory.
        short, shorter = (results.find("theirs", length, chunked=False).peak for length in (4096, 1024))
        rows.append(
            f"| prefill 16,384 | {long.rate:,.1f} | n/a | | {share:.0%} of 4,096, at least 80%: {met(share >= 0.8)} "
            f"| {long.peak:.2f} | needs about {16 * (short - shorter):.0f} |"
        )
        compare(chunks, long, results.find("theirs", 16384))
        rows.append(
            f"| prefill 65,536 | {longest.rate:,.1f} | | | below 6 GB: {met(longest.peak < 6)} | {longest.peak:.2f} | |"
        )
    decode = (results.find(side, 4096, decode=True) for side in ("ours", "theirs"))
    compare("decode at 4,096", *decode, 3.0)
    return "\n".join(rows) + "\n"


def met(target: bool) -> str:
    return "met" if target else "missed"


def agreement(results: Results) -> str:
    """Compares what both sides computed; ends the run if logits differ after 1,024 tokens: rates would mean nothing."""
    lines = []
    for theirs in results.series.values():
        task = theirs.task
        if task.side != "theirs":
            continue
        a, b = results.find("ours", task.length, decode=task.decode > 0).runs[0], theirs.runs[0]
        gap = float(np.max(np.abs(np.subtract(a["logits"], b["logits"]))))
        same = sum(x == y for x, y in zip(a["tokens"], b["tokens"], strict=True))
        lines.append(f"{theirs}: logits within {gap:.1e} of ours, {same} of {len(b['tokens'])} greedy tokens equal")
        if task.length == 1024 and gap > LOGITS_TOLERANCE:
            raise SystemExit(f"the two sides do not compute the same function: {lines[-1]}")
    return "\n".join(lines)


# ---- where our time goes ---------------------------------------------------------------------------------------------


def profile(results: Results) -> None:
    """Traces our prefill and decode, and prints the share of each part of the model."""
    options = results.options
    for name, task in {
        "prefill": Task("ours", 4096, chunk=options.chunk, repeats=1),
        "decode": Task("ours", 4096, decode=options.decode, chunk=options.chunk, repeats=1),
    }.items():
        folder = (options.profile / name).resolve()
        shutil.rmtree(folder, ignore_errors=True)
        result = measure(dataclasses.replace(task, weights=results.weights, profile=str(folder)))
        programs = sorted(folder.glob("hlo/*jit_apply*after_optimizations.txt"))  # prefill's comes first
        parts = busy_time(folder, programs[-1 if task.decode else 0].read_text())
        total = sum(parts.values())
        rate = result["work"] / result["seconds"][0]
        print(f"\n{name}: {rate:,.1f} tokens/s while traced; busy time of all threads, by part ({folder})")
        for part, seconds in parts.most_common(30):
            print(f"{seconds / total:7.1%}  {1e3 * seconds:9.1f} ms  {part}")


def busy_time(folder: Path, program: str) -> Counter[str]:
    """Seconds of busy threads by part of the model and operation, from a trace and the compiled program's text."""
    inside = {}  # fused computation -> the most telling operation in it
    for block in program.split("\n\n"):
        names = re.findall(r'op_name="([^"]*)"', block)
        inside[block.lstrip("%").split(" ")[0]] = max(names, key=lambda x: ("dot_general" in x, len(x)), default="")
    source: dict[str, str] = {}
    for name, shape, rest in re.findall(r"%([\w.-]+) = (\S+)([^\n]*)", program):
        found = re.search(r'op_name="([^"]*)"', rest)
        calls = re.search(r"calls=%([\w.-]+)", rest)
        source[name] = found[1] if found else inside.get(calls[1], "") if calls else ""
        source[name] = source[name] or f"unnamed {re.sub(r'[.0-9]+$', '', name)} {shape.split('{')[0]}"
    packed = next(folder.glob("plugins/profile/*/*.trace.json.gz")).read_bytes()
    events = json.loads(gzip.decompress(packed))["traceEvents"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    total: Counter[str] = Counter()
    for event in events:
        name = event.get("name", "")
        if event.get("ph") != "X" or "XLA" not in threads.get((event["pid"], event["tid"]), ""):
            continue
        if name not in source or re.match(r"(while|conditional|call)\b", name):
            continue  # these contain the others
        steps = source[name].split("/")
        path = [x for x in steps if x in ("attn", "ffn", "hc_attn", "hc_ffn", "indexer", "compressor")]
        what = next((x for x in reversed(steps) if "->" in x), steps[-1])
        total["/".join([*path, what])] += event["dur"] / 1e6
    return total


if __name__ == "__main__":
    main()
