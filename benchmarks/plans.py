"""Compiles a list of programs for TPU pods that are not there, and writes what each needs to docs/plans.md.

Every number comes from the TPU compiler or from the text of the program that it made; nothing is run.
The full plans are kept in benchmarks/plans/ as JSON.

    python benchmarks/plans.py                 all of them: some hours on two cores
    python benchmarks/plans.py --only flash    those whose name has "flash" in it; the others keep their last result
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax

from v4_jax import Config
from v4_jax.commands.plan_report import Attempt, as_json
from v4_jax.commands.shared.sizes import bytes_text, format_size, parse_size
from v4_jax.planning.compile import PlanError, Workload, compile_for_tpu
from v4_jax.planning.estimates import estimate
from v4_jax.planning.job import without_mtp
from v4_jax.sharding.chips import Topology
from v4_jax.sharding.mesh import parse_mesh

ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE = ROOT / "benchmarks" / "plans", ROOT / "docs" / "plans.md"
MODELS = {"flash": Config.flash, "pro": Config.pro}

# model, task, context, rows, chunk, topology, mesh, preset
PLANS = (
    ("flash", "decode", "1M", 1, "1", "v6e:2x4", "tensor=8", "decode"),
    ("flash", "decode", "1M", 1, "1", "tpu7x:2x2x1", "tensor=8", "decode"),
    ("flash", "decode", "32K", 128, "1", "v6e:4x4", "data=8,tensor=2", "decode"),
    ("flash", "decode", "32K", 128, "1", "v5e:4x8", "data=8,tensor=4", "decode"),
    ("flash", "decode", "8K", 1, "1", "tpu7x:2x2x1", "tensor=8", "decode"),
    ("flash", "decode", "9K", 64, "1", "tpu7x:2x2x1", "data=4,tensor=2", "decode"),
    ("flash", "prefill", "8K", 1, "8K", "tpu7x:2x2x1", "seq=8", "long-context"),
    ("flash", "prefill", "1M", 1, "8K", "v6e:4x4", "seq=16", "long-context"),
    ("flash", "prefill", "1M", 1, "8K", "v5p:2x2x2", "seq=8", "long-context"),
    ("pro", "decode", "1M", 1, "1", "v6e:8x8", "seq=8,tensor=8", "decode"),
    ("pro", "decode", "1M", 1, "1", "tpu7x:2x2x4", "seq=4,tensor=8", "decode"),
    ("pro", "prefill", "1M", 1, "16K", "v5p:4x4x8", "seq=128", "long-context"),
    ("flash", "train", "16K", 128, "16K", "v5p:4x4x8", "expert=128", "train"),
    ("flash", "train", "4K", 512, "4K", "v5p:4x4x8", "expert=128", "train"),
    ("flash", "train", "1M", 1, "1M", "v5p:4x4x16", "seq=256", "train"),
)

# Milliseconds by the compiler's estimate before any kernel but the experts', whose time was not in it.
BEFORE = {
    ("flash", "decode", "1M", 1, "v6e:2x4"): 41.6,
    ("flash", "decode", "32K", 128, "v6e:4x4"): 73.4,
    ("flash", "prefill", "1M", 1, "v6e:4x4"): 1366,
    ("flash", "prefill", "1M", 1, "v5p:2x2x2"): 5157,
    ("pro", "decode", "1M", 1, "tpu7x:2x2x4"): 58.1,
    ("flash", "train", "16K", 128, "v5p:4x4x8"): 35000,
}

HEADER = """# Plans

What the TPU compiler says about DeepSeek-V4 on slices of several generations. The programs were compiled on a machine
without TPUs by `python benchmarks/plans.py`; `v4-jax plan` does the same for one program of your own. Nothing here was
run or timed.

All numbers are per device: one chip, or half a chip on tpu7x.

- *Peak* is weights, cache and temporaries together, against the memory of the device. In training it is what is live at
  one time by the compiler's count: master weights and moments in float32, and temporaries, many of which reuse the same
  memory.
- *Estimate* is the compiler's: the cycles of every operation, times how often it runs. A Pallas kernel takes at least
  its FLOPs at peak and its bytes at full bandwidth, a collective 3 us and its bytes. It is *at least* that where the
  compiler has no cycles for some of the kernels, which then count by FLOPs and bytes alone. *Before* is without the
  kernels, and without the experts' time. *Operations* are all that a call runs, and the parts are the named scopes that
  take longest.
- *Floor* is the least time that a call can take: the largest of its FLOPs, memory traffic and interconnect traffic at
  the vendor's peak figures.
- *Over least* is how many times the FLOPs and the bytes exceed what the algorithm needs. That is two FLOPs per active
  weight and the attention's own; every weight that the tokens reach and the cache that they see, read once. In training
  it is three times the FLOPs, and master weights and moments read and written once.

Weights are in the released formats, the cache in bfloat16. Loops are multiplied out. What depends on the data counts as
on the mean, at the end of a full context and with experts evenly chosen. Rows without an estimate were compiled before
`plan` had one, and before most of the kernels.

"""
COLUMNS = (
    *("model", "task", "context", "rows", "slice", "mesh", "peak of memory", "estimate before", "estimate"),
    *("operations", "most of it in"),
    *("floor", "bound by", "FLOPs, bytes over least"),
)


def name_of(plan: tuple) -> str:
    model, task, context, rows, _, topology, mesh, _ = plan
    return f"{model}-{task}-{context}-{rows}-{topology}-{mesh}".replace(":", "-").replace(",", "-").replace("=", "")


def run(plan: tuple) -> dict:
    model, task, context, rows, chunk, topology, mesh, preset = plan
    config, slice_ = MODELS[model](), Topology.parse(topology)
    config, dtype = (config, "bfloat16") if task == "train" else (without_mtp(config), "native")
    sizes = (parse_size(context), rows, parse_size(chunk))
    workload = Workload(config, task, *sizes, parse_mesh(mesh), preset, dtype, slice_)
    try:
        outcome = compile_for_tpu(workload)
    except PlanError as error:
        outcome = error
    return as_json([Attempt(workload, outcome)], [estimate(workload)])


def estimated(attempt: dict) -> list[str]:
    """Time, operations, and parts that take longest; dashes for plans compiled before there was an estimate."""
    if "estimate_s" not in attempt:
        return ["-"] * 3
    seconds, longest = attempt["estimate_s"], list(attempt["parts"].items())[:3]
    parts = ", ".join(f"{part} {time / seconds:.0%}" for part, time in longest)
    least = "at least " if attempt["bounded"] else ""
    return [f"{least}{1e3 * seconds:,.1f} ms", f"{attempt['operations']:,.0f}", parts]


def row(plan: tuple, found: dict) -> str:
    model, task, context, rows, chunk, topology, mesh, _ = plan
    task += f" of {format_size(parse_size(chunk))}" if task == "prefill" else ""
    cells = [model.capitalize(), task, context, str(rows), topology, mesh]
    (attempt,) = found["attempts"]
    if not attempt["fits"]:
        return "| " + " | ".join([*cells, "does not compile (below)", *("",) * (len(COLUMNS) - 7)]) + " |"
    least, floor = attempt["least"], attempt["floor"]
    bound = {"flops": "FLOPs", "hbm": "memory", "ici": "interconnect"}[floor["bound"]]
    over = f"{attempt['flops'] / least['flops']:.1f}, {attempt['hbm'] / (least['weights'] + least['cache']):.0f}"
    peak = attempt["live" if task.startswith("train") else "peak"]
    cells += [
        f"{bytes_text(peak)} of {bytes_text(attempt['hbm_capacity'])}",
        f"{BEFORE[known]:,.1f} ms" if (known := (model, plan[1], context, rows, topology)) in BEFORE else "-",
        *estimated(attempt),
        *(f"{1e3 * floor['seconds']:,.1f} ms", bound, over),
    ]
    return "| " + " | ".join(cells) + " |"


def refused(plan: tuple, found: dict) -> str:
    model, task, context, rows, _, topology, mesh, _ = plan
    error = found["attempts"][0]["error"]
    return f"- {model.capitalize()} {task}, {context}, {rows} rows, {topology}, {mesh}: {error}."


def page(results: dict[str, dict]) -> str:
    known = [(plan, results[name_of(plan)]) for plan in PLANS if name_of(plan) in results]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *(row(*one) for one in known)]
    text = HEADER + "\n".join(lines) + "\n"
    failed = [refused(plan, found) for plan, found in known if not found["attempts"][0]["fits"]]
    return text + ("\nWhat does not compile, and why:\n\n" + "\n".join(failed) + "\n" if failed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="compile those whose name contains this")
    only = parser.parse_args().only
    jax.config.update("jax_platforms", "cpu")
    KEPT.mkdir(exist_ok=True)
    for plan in PLANS:
        if only in name_of(plan):
            start = time.monotonic()
            found = run(plan)
            (KEPT / f"{name_of(plan)}.json").write_text(json.dumps(found, indent=2) + "\n")
            fits = found["attempts"][0]["fits"]
            print(f"{name_of(plan)}: {'fits' if fits else 'does not'}, {time.monotonic() - start:.0f} s", flush=True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page({path.stem: json.loads(path.read_text()) for path in sorted(KEPT.glob("*.json"))}))


if __name__ == "__main__":
    main()
