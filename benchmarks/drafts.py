"""DSpark's stages for the embedded model: three of them, trained on its trunk by the texts that it was trained on.

Texts are those of `infer/evaluation/recall.py`. The trunk stays as it is: what is trained, and how well the stages then
draft, is told by `v4-jax train` and `benchmarks/serving.py --stages DIRECTORY/model`.

    python benchmarks/drafts.py DIRECTORY              twenty minutes on two cores; continued if interrupted

Makes DIRECTORY/model, a released directory: the embedded model with the stages in place of its MTP block.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from v4_jax.infer.evaluation import recall

MODEL = Path(__file__).parents[1] / "v4_jax" / "data" / "demo"

TEXTS, LENGTH = 4000, 1024  # how many, and characters of each, which are tokens
STEPS = 900

SETTINGS: dict[str, Any] = {
    "model": str(MODEL),
    "objective": {"kind": "dspark", "noise_token": 319, "target_layers": [2, 3, 4], "rank": 32, "anchors": 64},
    "stages": [{"steps": STEPS, "length": LENGTH // 2, "rows": 8}],
    "optimizer": {
        "learning_rate": 0.01,
        "final_learning_rate": 0.0003,
        "weight_decay": 0.01,
        "warmup_steps": 10,
        "decay_steps": 600,
    },
    "checkpoints": {"every": 25},
    "log": {"tensorboard": False},
    "policy": "float32",
    "fp4_experts": True,
    "remat": "none",
}


def texts(path: Path) -> None:
    """Writes the texts, one a line."""
    rng = np.random.default_rng(7)
    lines = [json.dumps({"text": recall.lesson(rng, LENGTH, told=24, asked=24)}) for _ in range(TEXTS)]
    path.write_text("\n".join(lines) + "\n")


def train(directory: Path) -> Path:
    """Trains the stages and exports the model; what was done before is not done again."""
    directory.mkdir(parents=True, exist_ok=True)
    data, run, model = directory / "texts.jsonl", directory / "run", directory / "model"
    if not data.exists():
        texts(data)
    sources = {"sources": [{"path": str(data)}], "begin": False, "end": False, "open_rows": 2}
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump({"run": str(run), "data": sources} | SETTINGS))
    program = str(Path(sys.executable).parent / "v4-jax")
    subprocess.run([program, "train", str(file)], check=True)
    if not model.exists():
        subprocess.run([program, "export", str(run), str(model)], check=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    print(train(parser.parse_args().directory))


if __name__ == "__main__":
    main()
