"""Two specialists and the student that joins them, trained for real: all of post-training, by a small model on a CPU.

Two domains, in bytes. *Sums*: `27+35=`, answered at once, or after the digits were added one by one between the
thinking tags. *Records*: six keys with their values between words, and a key, whose value is asked; the reasoning
repeats the record. The base is the embedded model, which looks up records in plain texts and never saw a conversation,
after plain texts of both domains. Of each domain a specialist is fine-tuned from it on conversations, ends early, and
goes on by rewards of its own answers (GRPO). One student, fine-tuned from the base on conversations of both, is
distilled from the specialists over its own answers, each prompt by the teacher of its domain. The sums that are asked
in the end are in no training data.

    python benchmarks/specialists.py DIRECTORY     trains, measures, writes results/specialists.json and .png, and the
                                                   table in docs/post_training.md; goes on where it was interrupted

Every stage is a run of `v4-jax train`, whose settings and metrics stay in the directory.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from v4_jax import load
from v4_jax.commands.shared.evaluation import EngineEvaluation
from v4_jax.infer.evaluation import recall
from v4_jax.placement import Place
from v4_jax.tokenizer import ByteTokenizer
from v4_jax.train.evaluation import EvaluationSettings
from v4_jax.train.metrics import METRICS, read_metrics

HERE = Path(__file__).parent
MODEL = HERE.parent / "v4_jax" / "data" / "demo"
RESULTS = HERE / "results" / "specialists.json"
PAGE = HERE.parent / "docs" / "post_training.md"
BEGIN, END = "<!-- specialists: written by benchmarks/specialists.py -->", "<!-- /specialists -->"

DOMAINS = ("sums", "records")
MODES = ("non-think", "high")
MOST = {"raw": 3, "non-think": 12, "high": 24}  # tokens of a reply
TEXTS, CONVERSATIONS, DEVELOPED, ASKED = 30000, 40000, 100, 400
RECORDS = 6
WEIGHTS = {"sums": 2.0, "records": 1.0}  # looking up records is what the embedded model was made for
TAUGHT = {"sums": 4.0, "records": 1.0}  # what the student has still to learn

# Steps, highest learning rate, steps that it rises, and steps that it falls in the end.
SCHEDULES = {
    "base": (400, 0.006, 20, 100),
    "sums-sft": (150, 0.008, 20, 37),
    "records-sft": (60, 0.003, 6, 15),
    "both-sft": (200, 0.008, 20, 50),
    "sums": (110, 0.001, 6, 40),
    "records": (120, 0.001, 4, 30),
    "student": (80, 0.002, 4, 60),
}
PROMPTS = {"sums": 64, "records": 16}  # of a step of GRPO

# Columns of the table, and whose scores they are.
KINDS = (
    ("base", "base"),
    ("specialist before GRPO", "{}-sft"),
    ("specialist", "{}"),
    ("student before distillation", "both-sft"),
    ("student", "student"),
)
COLORS = ("#BBBBBB", "#56B4E9", "#0072B2", "#E69F00", "#D55E00")

# ---- what is learnt, and what is asked -------------------------------------------------------------------------------


def sums(rng: np.random.Generator) -> dict[str, list[tuple[int, int]]]:
    """All pairs, in three parts without a pair in common."""
    pairs = [(a, b) for a in range(10, 60) for b in range(10, 40)]
    mixed = [pairs[i] for i in rng.permutation(len(pairs))]
    return {"test": mixed[:ASKED], "dev": mixed[ASKED : ASKED + DEVELOPED], "train": mixed[ASKED + DEVELOPED :]}


def conversation(domain: str, mode: str, rng: np.random.Generator, pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """A question with its answer, and the reasoning in thinking modes."""
    if domain == "sums":
        a, b = pairs[rng.integers(len(pairs))]
        question, answer = f"{a}+{b}=", str(a + b)
        reasoning = f"{a % 10}+{b % 10}={a % 10 + b % 10} {a // 10}+{b // 10}={a // 10 + b // 10}"
    else:
        told = recall.lesson(rng, 48, told=RECORDS, asked=0)
        key, answer = re.findall(r"([A-Z]+)(\d+)", told)[rng.integers(RECORDS)]
        question, reasoning = told + key, key + answer
    said = {"role": "assistant", "content": answer} | ({"reasoning_content": reasoning} if mode == "high" else {})
    return {"messages": [{"role": "user", "content": question}, said], "answer": answer, "mode": mode}


def text(domain: str, rng: np.random.Generator, pairs: list[tuple[int, int]]) -> str:
    """Some sums, or records that are told and asked."""
    if domain == "sums":
        chosen = [pairs[rng.integers(len(pairs))] for _ in range(13)]
        return " ".join(f"{a}+{b}={a + b}" for a, b in chosen)
    return recall.lesson(rng, 128, told=RECORDS, asked=12)


def data(folder: Path) -> None:
    """Writes all that is trained on and asked, the same each time."""
    parts, working = sums(np.random.default_rng(0)), folder / "data"
    working.mkdir(exist_ok=True)
    for number, domain in enumerate(DOMAINS):
        rng = np.random.default_rng(number + 1)
        texts = ({"text": text(domain, rng, parts["train"])} for _ in range(TEXTS))
        _write(working / f"{domain}-texts.jsonl", texts)
        # Sums at once are the harder ones, and come twice as often.
        modes = ("non-think", "non-think", "high") if domain == "sums" else MODES
        said = (conversation(domain, modes[i % len(modes)], rng, parts["train"]) for i in range(CONVERSATIONS))
        _write(working / f"{domain}.jsonl", said)
        for part, count in (("dev", DEVELOPED), ("test", ASKED)):
            for mode in MODES:
                asked = (
                    conversation(domain, mode, rng, parts[part][i : i + 1] if domain == "sums" else [])
                    for i in range(count)
                )
                _write(working / f"{domain}-{mode}-{part}.jsonl", asked)
        tested = map(json.loads, (working / f"{domain}-non-think-test.jsonl").read_text().splitlines())
        plain = ({"text": one["messages"][0]["content"], "answer": one["answer"], "depth": 0.0} for one in tested)
        _write(working / f"{domain}-raw-test.jsonl", plain)


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if not path.exists() or path.read_text() != text:  # a run may be reading it
        path.write_text(text)


# ---- stages ----------------------------------------------------------------------------------------------------------


def stages(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings of each run, by its name, in their order."""
    found: dict[str, dict[str, Any]] = {}

    def sources(kind: str, weights: dict[str, float], taught: bool = False) -> dict[str, Any]:
        field = {} if kind == "-texts" else {"field": "messages"}
        chosen = [
            {
                "path": str(folder / "data" / f"{domain}{kind}.jsonl"),
                "weight": weight,
                **field,
                **({"teacher": domain} if taught else {}),
            }
            for domain, weight in weights.items()
        ]
        return {"sources": chosen, "open_rows": 8, "begin": False}

    def run(name: str, begins: Path, *, microbatches: int = 1, **changes: Any) -> None:
        steps, rate, warmup, decay = SCHEDULES[name]
        values = {
            "stages": [{"steps": steps, "length": 256, "rows": 16, "microbatches": microbatches, "attention": "dense"}],
            "optimizer": {
                "learning_rate": rate,
                "final_learning_rate": rate / 10,
                "warmup_steps": warmup,
                "decay_steps": decay,
                "weight_decay": 0.01,
            },
            "checkpoints": {"every": 100, "keep": 1},
            "log": {"every": 5, "tensorboard": False},
            "policy": "float32",
            "remat": "none",
            "mesh": "one",
        }
        found[name] = {"model": str(begins)} | values | changes

    def rollouts(prompts: int, samples: int) -> dict[str, Any]:
        return {
            "prompts": prompts,
            "samples": samples,
            "max_tokens": MOST["high"],
            "slots": 128,
            "prefill_chunk": 64,
            "dtype": "float32",
        }

    def evaluate(domains: tuple[str, ...]) -> dict[str, Any]:
        return {"every": 20, "keep_best": False} | asked(folder, "dev", domains)

    watched = {"log": {"every": 1, "tensorboard": False}, "checkpoints": {"every": 20, "keep": 1}}
    run("base", MODEL, data=sources("-texts", WEIGHTS))
    for domain in DOMAINS:
        run(f"{domain}-sft", folder / "base", data=sources("", {domain: 1.0}))
    run("both-sft", folder / "base", data=sources("", WEIGHTS))
    for domain in DOMAINS:
        run(
            domain,
            folder / f"{domain}-sft",
            microbatches=2,
            data=sources("", {domain: WEIGHTS[domain]}),
            objective={"kind": "grpo", "rollouts": rollouts(PROMPTS[domain], 8), "rewards": [{"kind": "exact"}]},
            evaluate=evaluate((domain,)),
            **watched,
        )
    teachers = {domain: {"model": str(folder / domain), "dtype": "float32", "policy": "float32"} for domain in DOMAINS}
    run(
        "student",
        folder / "both-sft",
        microbatches=2,
        data=sources("", TAUGHT, taught=True),
        objective={
            "kind": "distillation",
            "teachers": teachers,
            "rollouts": rollouts(256, 1),
            "round": 2,
            "keep_teachers": True,
        },
        evaluate=evaluate(DOMAINS),
        **watched,
    )
    return found


def asked(
    folder: Path, part: str, domains: tuple[str, ...] = DOMAINS, modes: tuple[str, ...] = MODES
) -> dict[str, Any]:
    """The sets of a part, as a section of settings."""
    sets = {
        f"{domain}-{mode}": {
            "path": str(folder / "data" / f"{domain}-{mode}-{part}.jsonl"),
            "task": "needle" if mode == "raw" else "chats",
            "mode": mode,
            "max_tokens": MOST[mode],
        }
        for domain in domains
        for mode in modes
    }
    return {"sets": sets, "slots": 128, "dtype": "float32", "prefill_chunk": 64}


def train(folder: Path) -> None:
    """Goes through the stages; what was done before is not done again."""
    data(folder)
    for name, values in stages(folder).items():
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"run": str(folder / name)} | values, sort_keys=False))
        print(f"---- {name}", flush=True)
        subprocess.run([str(Path(sys.executable).parent / "v4-jax"), "train", str(file)], check=True)


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(folder: Path) -> dict[str, Any]:
    """The share of right answers of every model to every set, how rewards rose, and what stages took."""
    models = ["base", *(f"{domain}-sft" for domain in DOMAINS), "both-sft", *DOMAINS, "student"]
    config, _ = load(folder / "base", dtype="float32")
    settings = EvaluationSettings(every=1, **asked(folder, "test", modes=("raw", *MODES)))
    tokenizer = ByteTokenizer(config.vocab_size)
    sets = EngineEvaluation(config, tokenizer, Place(), settings, "float32", profile="preview", bos=False)
    scores: dict[str, dict[str, float]] = {}
    for model in models:
        scores[model] = sets.scores(load(folder / model, dtype="float32")[1])
        print(model, json.dumps(scores[model]), flush=True)
    metrics = {name: read_metrics(folder / name / METRICS) for name in stages(folder)}
    return {
        "asked": ASKED,
        "scores": scores,
        "rewards": {
            domain: {name: metrics[domain][name].tolist() for name in ("step", "reward")} for domain in DOMAINS
        },
        "stages": {
            name: {"steps": int(found["step"][-1]), "seconds_a_step": seconds(found["step"], found["time"])}
            for name, found in metrics.items()
        },
    }


def seconds(step: np.ndarray, time: np.ndarray) -> float:
    """Of a step on average, answers and all; without what came before the first one, and without interruptions."""
    taken = np.diff(time) / np.diff(step)
    return round(float(np.mean(taken[taken < 10 * np.median(taken)])), 2)


def percent(score: float, count: int) -> str:
    """A share of right answers with its standard error."""
    return f"{100 * score:.1f} ± {100 * math.sqrt(score * (1 - score) / count):.1f}"


def table(results: dict[str, Any]) -> str:
    """The scores in percent, as Markdown, and what they rest on."""
    scores, count = results["scores"], results["asked"]
    columns = ["domain", "mode", *(kind for kind, _ in KINDS)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for domain in DOMAINS:
        for mode in MODES:
            found = [scores[model.format(domain)][f"{domain}-{mode}"] for _, model in KINDS]
            lines.append(f"| {' | '.join([domain, mode, *(percent(score, count) for score in found)])} |")
    plain = [f"{percent(scores['base'][f'{domain}-raw'], count)}% of {domain}" for domain in DOMAINS]
    rose = [
        f"{np.mean(curve['reward'][:5]):.2f} to {np.mean(curve['reward'][-5:]):.2f} ({domain})"
        for domain, curve in results["rewards"].items()
    ]
    minutes = sum(stage["steps"] * stage["seconds_a_step"] / 60 for stage in results["stages"].values())
    said = (
        f"As plain text, without a conversation, the base answers {' and '.join(plain)}. Rewards of GRPO, as means of "
        f"five steps, went from {' and from '.join(rose)}. The steps of all stages took {minutes:.0f} minutes "
        "on two cores that had other work, too."
    )
    return "\n".join([*lines, "", *textwrap.wrap(said, 118)])


def picture(results: dict[str, Any], path: Path) -> None:
    """Rewards by step, and scores by domain and mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=(2, 3))
    width = 5
    for (domain, curve), color in zip(results["rewards"].items(), ("#0072B2", "#D55E00"), strict=True):
        steps, reward = np.asarray(curve["step"]), np.asarray(curve["reward"])
        left.plot(steps, reward, color=color, alpha=0.3, linewidth=1)
        mean = np.convolve(reward, np.ones(width) / width, "valid")
        left.plot(steps[width // 2 :][: len(mean)], mean, color=color, label=domain)
    left.set(xlabel="step of GRPO", ylabel=f"reward, and its mean over {width} steps", ylim=(None, 1))
    left.grid(alpha=0.3)
    left.legend(frameon=False, loc="lower right")
    cells = [(domain, mode) for domain in DOMAINS for mode in MODES]
    for number, ((kind, model), color) in enumerate(zip(KINDS, COLORS, strict=True)):
        found = [results["scores"][model.format(domain)][f"{domain}-{mode}"] for domain, mode in cells]
        errors = [100 * math.sqrt(score * (1 - score) / results["asked"]) for score in found]
        places = np.arange(len(cells)) + 0.17 * (number - 2)
        right.bar(places, [100 * score for score in found], 0.16, yerr=errors, color=color, label=kind)
    right.set_xticks(range(len(cells)), [f"{domain}\n{mode}" for domain, mode in cells])
    right.set(ylabel="right answers, %", ylim=(0, 103))
    right.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    folder = parser.parse_args().directory
    folder.mkdir(parents=True, exist_ok=True)
    train(folder)
    results = measure(folder)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    picture(results, RESULTS.with_suffix(".png"))
    shown = table(results)
    print(shown)
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        PAGE.write_text(f"{before}{BEGIN}\n\n{shown}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
