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
from typing import NamedTuple

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


class Plan(NamedTuple):
    """One program; sizes as a person writes them. `before` is the compiler's estimate in milliseconds before any kernel
    but the experts', whose time was not in it.
    """

    model: str
    task: str
    context: str
    rows: int
    chunk: str
    topology: str
    mesh: str
    preset: str
    momentum_dtype: str = "float32"
    before: float | None = None

    @property
    def name(self) -> str:
        parts = (self.model, self.task, self.context, self.rows, self.topology, self.mesh)
        return "-".join(map(str, parts)).replace(":", "-").replace(",", "-").replace("=", "")


PLANS = (
    Plan("flash", "decode", "1M", 1, "1", "v6e:2x4", "tensor=8", "decode", before=41.6),
    Plan("flash", "decode", "1M", 1, "1", "tpu7x:2x2x1", "tensor=8", "decode"),
    Plan("flash", "decode", "32K", 128, "1", "v6e:4x4", "data=8,tensor=2", "decode", before=73.4),
    Plan("flash", "decode", "32K", 128, "1", "v5e:4x8", "data=8,tensor=4", "decode"),
    Plan("flash", "decode", "8K", 1, "1", "tpu7x:2x2x1", "tensor=8", "decode"),
    Plan("flash", "decode", "9K", 64, "1", "tpu7x:2x2x1", "data=4,tensor=2", "decode"),
    Plan("flash", "prefill", "8K", 1, "8K", "tpu7x:2x2x1", "seq=8", "long-context"),
    Plan("flash", "prefill", "1M", 1, "8K", "v6e:4x4", "seq=16", "long-context", before=1366),
    Plan("flash", "prefill", "1M", 1, "8K", "v5p:2x2x2", "seq=8", "long-context", before=5157),
    Plan("pro", "decode", "1M", 1, "1", "v6e:8x8", "seq=8,tensor=8", "decode"),
    Plan("pro", "decode", "1M", 1, "1", "tpu7x:2x2x4", "seq=4,tensor=8", "decode", before=58.1),
    Plan("pro", "prefill", "1M", 1, "16K", "v5p:4x4x8", "seq=128", "long-context"),
    Plan("flash", "train", "16K", 128, "16K", "v5p:4x4x8", "expert=128", "train", before=35000),
    Plan("flash", "train", "4K", 512, "4K", "v5p:4x4x8", "expert=128", "train"),
    Plan("flash", "train", "1M", 1, "1M", "v5p:4x4x16", "seq=256", "train"),
    Plan(
        *("pro", "train", "16K", 64, "16K", "tpu7x:4x4x8", "data=2,seq=4,expert=32", "train-split-experts"),
        momentum_dtype="bfloat16",
    ),
)

HEADER = """# Plans

What the TPU compiler says about DeepSeek-V4 on slices of several generations. The programs were compiled on a machine
without TPUs by `python benchmarks/plans.py`; `v4-jax plan` does the same for one program of your own. Nothing here was
run or timed.

All numbers are per device: one chip, or half a chip on tpu7x.

- *Peak* is weights, cache and temporaries together, against the memory of the device. In training it is what is live at
  one time by the compiler's count: master weights and moments in float32, and temporaries, many of which reuse the same
  memory.
- *Estimate* is the compiler's: the cycles of every operation, times how often it runs. A Pallas kernel takes at least
  its FLOPs at peak and its bytes at full bandwidth. Collectives take 3 us and the time of their busiest link, by where
  the mesh puts its devices in the slice; they share the links, and count as what the program waits for them. It is *at
  least* that where the compiler has no cycles for some of the kernels, which then count by FLOPs and bytes alone. The
  compiler takes data to be zeros; kernels say how often what depends on data happens. *Before* is without the kernels,
  and without the experts' time. *Operations* are all that a call runs, and the parts are the named scopes that take
  longest.
- *Floor* is the least time that a call can take: the largest of its FLOPs, memory traffic and interconnect traffic at
  the vendor's peak figures.
- *Over least* is how many times the FLOPs and the bytes exceed what the algorithm needs. That is two FLOPs per active
  weight and the attention's own; every weight that the tokens reach and the cache that they see, read once. In training
  it is three times the FLOPs, and master weights and moments read and written once.

Weights are in the released formats, the cache in bfloat16. Loops are multiplied out. What depends on the data counts as
on the mean, at the end of a full context and with experts evenly chosen. Rows without an estimate were compiled before
`plan` had one, and before most of the kernels. Those of Pro, and of training with a million tokens, are from before
work went on beside collectives, which count there in full and as if all links of a chip carried them, and from before
kernels told how often what depends on data happens: that counts at the chips' peak. Training at 4K is from before rows
went to their experts in two waves.

"""
COLUMNS = (
    *("model", "task", "context", "rows", "slice", "mesh", "peak of memory", "estimate before", "estimate"),
    *("operations", "most of it in"),
    *("floor", "bound by", "FLOPs, bytes over least"),
)


def run(plan: Plan) -> dict:
    config, slice_ = MODELS[plan.model](), Topology.parse(plan.topology)
    config, dtype = (config, "bfloat16") if plan.task == "train" else (without_mtp(config), "native")
    sizes = (parse_size(plan.context), plan.rows, parse_size(plan.chunk))
    place = (parse_mesh(plan.mesh), plan.preset, dtype, slice_)
    workload = Workload(config, plan.task, *sizes, *place, momentum_dtype=plan.momentum_dtype)
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


def row(plan: Plan, found: dict) -> str:
    task = plan.task + (f" of {format_size(parse_size(plan.chunk))}" if plan.task == "prefill" else "")
    task += f", momentum in {plan.momentum_dtype}" if plan.momentum_dtype != "float32" else ""
    cells = [plan.model.capitalize(), task, plan.context, str(plan.rows), plan.topology, plan.mesh]
    (attempt,) = found["attempts"]
    if not attempt["fits"]:
        return "| " + " | ".join([*cells, "does not compile (below)", *("",) * (len(COLUMNS) - 7)]) + " |"
    least, floor = attempt["least"], attempt["floor"]
    bound = {"flops": "FLOPs", "hbm": "memory", "ici": "interconnect"}[floor["bound"]]
    over = f"{attempt['flops'] / least['flops']:.1f}, {attempt['hbm'] / (least['weights'] + least['cache']):.0f}"
    peak = attempt["live" if plan.task == "train" else "peak"]
    cells += [
        f"{bytes_text(peak)} of {bytes_text(attempt['hbm_capacity'])}",
        f"{plan.before:,.1f} ms" if plan.before else "-",
        *estimated(attempt),
        *(f"{1e3 * floor['seconds']:,.1f} ms", bound, over),
    ]
    return "| " + " | ".join(cells) + " |"


def refused(plan: Plan, found: dict) -> str:
    where = f"{plan.context}, {plan.rows} rows, {plan.topology}, {plan.mesh}"
    return f"- {plan.model.capitalize()} {plan.task}, {where}: {found['attempts'][0]['error']}."


def page(results: dict[str, dict]) -> str:
    known = [(plan, results[plan.name]) for plan in PLANS if plan.name in results]
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
        if only in plan.name:
            start = time.monotonic()
            found = run(plan)
            (KEPT / f"{plan.name}.json").write_text(json.dumps(found, indent=2) + "\n")
            fits = found["attempts"][0]["fits"]
            print(f"{plan.name}: {'fits' if fits else 'does not'}, {time.monotonic() - start:.0f} s", flush=True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page({path.stem: json.loads(path.read_text()) for path in sorted(KEPT.glob("*.json"))}))


if __name__ == "__main__":
    main()
