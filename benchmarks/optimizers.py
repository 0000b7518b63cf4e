"""Muon against AdamW on the same tokens: a byte-level model of all roles, trained on Python's own standard library.

Each optimiser is first tried at several learning rates for a short while, and then trained at its best one for longer.
What differs is what updates the matrices; embedding, head, norms, biases and gates are AdamW's in either case.

    python benchmarks/optimizers.py DIRECTORY               the search and the comparison: about an hour on two cores
    python benchmarks/optimizers.py DIRECTORY --search 40 --steps 100

Runs are kept in DIRECTORY, and continued there if this is interrupted. Writes benchmarks/results/optimizers.json and
optimizers.png, which docs/training.md shows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import yaml

from v4_jax.config import Config
from v4_jax.costs import parameter_counts
from v4_jax.train.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
RATES = {"muon": (1e-3, 3e-3, 1e-2, 3e-2), "adamw": (3e-4, 1e-3, 3e-3, 1e-2)}
LENGTH, ROWS = 512, 8

ARCHITECTURE = {
    **Config.tiny().to_hf(),
    "vocab_size": 320,
    "hidden_size": 160,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_hash_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 80,
    "o_groups": 2,
    "o_lora_rank": 64,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 16,
    "sliding_window": 64,
    "num_nextn_predict_layers": 1,
    "compress_ratios": [0, 0, 4, 128, 4, 0],
}


def corpus(directory: Path) -> Path:
    """The library's modules, tests and installed packages left out, one a line."""
    path = directory / "library.jsonl"
    if not path.exists():
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
        modules = sorted(file for file in root.rglob("*.py") if not skipped & set(file.relative_to(root).parts))
        texts = [file.read_text(encoding="utf-8", errors="ignore") for file in modules]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def train(directory: Path, matrices: str, rate: float, steps: int) -> Path:
    """A run of the command, continued if it is there."""
    run = directory / f"{matrices}-{rate:g}-{steps}"
    settings = {
        "run": str(run),
        "architecture": ARCHITECTURE,
        "data": {"sources": [{"path": str(corpus(directory))}]},
        "stages": [{"steps": steps, "length": LENGTH, "rows": ROWS}],
        "optimizer": {
            "matrices": matrices,
            "learning_rate": rate,
            "warmup_steps": steps // 20,
            "decay_steps": steps // 4,
        },
        "stability": {"spike": None},
        "checkpoints": {"every": steps, "keep": 1},
        "log": {"every": 1, "tensorboard": False},
        "policy": "float32",
        "remat": "none",
    }
    file = directory / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    subprocess.run([str(Path(sys.executable).parent / "v4-jax"), "train", str(file)], check=True)
    return run


def final_loss(run: Path) -> float:
    """Mean of the last tenth, in nats a byte."""
    losses = read_metrics(run / "metrics.jsonl")["loss"]
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def smoothed(tokens: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running means of 25 steps, or of all if there are fewer, and the tokens at which each ends."""
    width = min(25, len(losses))
    return tokens[width - 1 :], np.convolve(losses, np.ones(width) / width, mode="valid")


def picture(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Smoothed loss against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (tokens, losses) in curves.items():
        at, means = smoothed(tokens, losses)
        axes.plot(at / 1e6, means, label=name)
    axes.set(xlabel="million bytes", ylabel="loss, nats a byte", title="Byte-level V4 on the standard library")
    axes.set_ylim(top=4)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--search", type=int, default=150, metavar="STEPS", help="of each learning rate tried")
    parser.add_argument("--steps", type=int, default=800, help="at the best ones")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)

    found: dict[str, dict] = {}
    for matrices, rates in RATES.items():
        searched = {rate: final_loss(train(options.directory, matrices, rate, options.search)) for rate in rates}
        found[matrices] = {"search": {f"{rate:g}": loss for rate, loss in searched.items()}}
        found[matrices]["rate"] = min(searched, key=searched.__getitem__)
    curves = {}
    for matrices, one in found.items():
        run = train(options.directory, matrices, one["rate"], options.steps)
        metrics = read_metrics(run / "metrics.jsonl")
        tokens = np.cumsum(metrics["tokens"])
        one |= {"loss": final_loss(run), "tokens": int(tokens[-1])}
        curves[f"{matrices}, {one['rate']:g}"] = tokens, metrics["loss"]
        one["curve"] = [[int(t), round(float(x), 4)] for t, x in zip(tokens, metrics["loss"], strict=True)]
    at, means = smoothed(*curves[f"muon, {found['muon']['rate']:g}"])
    below = at[means <= found["adamw"]["loss"]]
    summary = {
        "parameters": parameter_counts(Config.from_hf(ARCHITECTURE)).checkpoint,
        "search_steps": options.search,
        "steps": options.steps,
        "muon_tokens_to_adamws_loss": int(below[0]) if len(below) else None,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "optimizers.json").write_text(json.dumps(summary | found) + "\n")
    picture(curves, RESULTS / "optimizers.png")
    shown = {name: {key: one[key] for key in ("search", "rate", "loss", "tokens")} for name, one in found.items()}
    print(json.dumps(summary | shown, indent=2))


if __name__ == "__main__":
    main()
