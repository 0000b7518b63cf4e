"""A training run that is killed again and again, against one that is not: do they end alike, bit for bit?

    python benchmarks/kill_training.py DIRECTORY --kills 12 --seed 0

A small model learns by rewards of its own answers (GRPO), with a reference, rounds of two steps, and sets that are
asked between steps. `kill -9` comes at moments of three kinds in turn, after a random number of steps and up to 0.3
seconds: while a round's answers are generated, read and written, while a checkpoint is, and at any time. The same
command then goes on. In the end every array of the newest and of the best checkpoint, and every metric but the times,
have to be those of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from v4_jax.checkpoint.orbax_arrays import open_arrays
from v4_jax.checkpoint.trained import BEST, CHECKPOINTS
from v4_jax.config import Config
from v4_jax.train.evaluation import EVALUATION_SECONDS

TIMES = {"time", "tokens_per_second", "flops_per_second", EVALUATION_SECONDS}
STEPS = 12
POLL = 0.001

ARCHITECTURE = {
    **Config.tiny().to_hf(),
    "vocab_size": 320,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "compress_ratios": [0, 4],
    "num_hash_layers": 1,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 2,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 8,
    "sliding_window": 32,
    "hc_mult": 2,
    "max_position_embeddings": 4096,
}


def prepare(folder: Path) -> dict[str, object]:
    """Writes prompts, and returns the settings but for the run's name."""
    lines = [
        {"messages": [{"role": "user", "content": f"{i}+{i}"}, {"role": "assistant", "content": str(2 * i)}]}
        for i in range(40)
    ]
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = {"policy": "float32", "remat": "none", "mesh": "one", "log": {"every": 1, "tensorboard": False}}
    data_section = {"sources": [{"path": str(data), "field": "messages"}], "open_rows": 2}
    begin = {
        "run": str(folder / "begin"),
        "architecture": ARCHITECTURE,
        "data": data_section,
        "stages": [{"steps": 2, "length": 128, "rows": 4}],
    }
    _train(folder, "begin", begin | shared)
    return shared | {
        "model": str(folder / "begin"),
        "data": data_section,
        "objective": {
            "kind": "grpo",
            "round": 2,
            "rollouts": {
                "prompts": 4,
                "samples": 4,
                "max_tokens": 16,
                "slots": 16,
                "prefill_chunk": 32,
                "dtype": "float32",
            },
            "rewards": [{"kind": "regex", "pattern": "[0-9a-f]"}],
            "reference": {"model": str(folder / "begin"), "dtype": "float32", "policy": "float32"},
            "kl": 0.01,
        },
        "stages": [{"steps": STEPS, "length": 128, "rows": 4, "microbatches": 2}],
        "optimizer": {"learning_rate": 0.003},
        "checkpoints": {"every": 3, "keep": 2},
        "evaluate": {
            "every": 4,
            "sets": {"doubles": {"path": str(data), "max_tokens": 4}},
            "dtype": "float32",
            "slots": 16,
            "prefill_chunk": 32,
        },
    }


def _command(folder: Path, name: str, settings: dict[str, object]) -> list[str]:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return [str(Path(sys.executable).parent / "v4-jax"), "train", str(file)]


def _train(folder: Path, name: str, settings: dict[str, object]) -> None:
    subprocess.run(_command(folder, name, settings), check=True, stderr=subprocess.DEVNULL)


def killed(command: list[str], run: Path, kind: str, rng: random.Random) -> str:
    """Runs the command until a moment of some kind, and kills it there; says where, or "done" if it ended before."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    begun = _lines(run)

    def reached(sign: Callable[[], bool]) -> bool:
        while not sign():
            if process.poll() is not None:
                return False
            time.sleep(POLL)
        return True

    skipped = rng.randint(1, 3)  # steps that are taken in peace
    alive = reached(lambda: _lines(run) >= begun + skipped)
    if alive and kind == "a round":
        alive = reached(lambda: any((run / "rounds").glob(".[0-9]*")))
    elif alive and kind == "a save":
        alive = reached(lambda: any((run / CHECKPOINTS).glob("*orbax-checkpoint-tmp*")))
    if alive:
        time.sleep(rng.uniform(0, 0.3))
    process.kill()
    process.wait()
    if process.returncode == 0:
        return "done"
    saving = any((run / CHECKPOINTS).glob("*orbax-checkpoint-tmp*"))
    writing = any((run / "rounds").glob(".[0-9]*"))
    found = "in a save" if saving else "while a round is made" if writing else "amid a step"
    return f"{found}, {_lines(run)} steps noted"


def _lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def differences(one: Path, other: Path) -> list[str]:
    """What two runs do not have in common: arrays of the newest and best checkpoints, metrics."""
    found = []
    for step in (str(STEPS), (one / BEST).readlink().name):
        for item in ("params", "optimizer"):
            first, second = (dict(open_arrays(run / CHECKPOINTS / step / item)) for run in (one, other))
            if first.keys() != second.keys():
                found.append(f"step {step}: other arrays of {item}")
            for name, array in first.items():
                whole = tuple(slice(None) for _ in array.shape)
                bits = [np.asarray(store.read(whole, name)).tobytes() for store in (array, second[name])]
                if bits[0] != bits[1]:
                    found.append(f"step {step}: {item} {name}")
    if (one / BEST).readlink() != (other / BEST).readlink():
        found.append("other best checkpoints")
    logs = []
    for run in (one, other):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        logs.append([{key: value for key, value in line.items() if key not in TIMES} for line in lines])
    return found + [f"metrics of step {line['step']}" for line, second in zip(*logs, strict=True) if line != second]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, rng = options.directory, random.Random(options.seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = prepare(folder)
    _train(folder, "whole", settings | {"run": str(folder / "whole")})
    left, number, all_different = options.kills, 0, []
    kinds = ("a save", "a round", "a step")
    while left:
        number += 1
        run = folder / f"killed-{number}"
        command = _command(folder, run.name, settings | {"run": str(run)})
        while left:
            where = killed(command, run, kinds[left % len(kinds)], rng)
            if where == "done":
                break
            left -= 1
            print(f"run {number}: killed {where}", flush=True)
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        found = differences(folder / "whole", run)
        print(f"run {number}: {'; '.join(found) or 'the same, bit for bit'}", flush=True)
        all_different += found
    sys.exit(1 if all_different else 0)


if __name__ == "__main__":
    main()
