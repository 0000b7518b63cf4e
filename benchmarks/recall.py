"""Recall far beyond the window: a small V4 that learns to look up what it was told, and how far back it finds it.

Texts and questions are those of `infer/evaluation/recall.py`. The model trains on rows of 256 tokens at first, with
dense attention to all compressed entries; then its indexer learns to pick; then rows grow, with sparse attention. What
it has learned is measured by length and depth, far beyond the length of its training; as a control with random picks in
place of the indexer's, everything else the same.

    python benchmarks/recall.py train DIRECTORY        one to two hours on two cores; continued if interrupted
    python benchmarks/recall.py measure MODEL          a run or a released directory; writes results/recall.json, .png
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from v4_jax import Transformer, init_cache, load
from v4_jax.architecture import RATIO_OF_ROLE
from v4_jax.config import Config
from v4_jax.infer.evaluation import recall
from v4_jax.outputs import Routing
from v4_jax.tokenizer import ByteTokenizer

RESULTS = Path(__file__).parent / "results"

CONTROL = 65536  # length up to which the control is measured

ARCHITECTURE = {
    **Config.tiny().to_hf(),
    "vocab_size": 320,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_hash_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 16,
    "sliding_window": 32,
    "num_nextn_predict_layers": 1,
    "compress_ratios": [0, 0, 4, 128, 4, 0],
}


class Lesson(NamedTuple):
    """A part of the curriculum: a run that starts from the one before.

    Attributes:
      texts: how many different ones.
      length: characters of a text, which is a row.
      told: records of a text, least and most.
      asked: repetitions, least and most.
      letters: of keys, one of these a text.
      rows: of a step.
      stages: (steps, how CSA layers attend).
      rate: learning rate, at its highest and at the end.
      released: round experts to FP4, as they will be released.
    """

    texts: int
    length: int
    told: tuple[int, int]
    asked: tuple[int, int]
    letters: tuple[int, ...]
    rows: int
    stages: tuple[tuple[int, str], ...]
    rate: tuple[float, float] = (0.01, 0.01)
    released: bool = False


CURRICULUM = (
    Lesson(40000, 256, (4, 8), (25, 32), (1, 2), 32, ((400, "dense"),)),
    Lesson(20000, 512, (10, 24), (40, 56), (1, 2, 2), 16, ((200, "dense"),)),
    Lesson(12000, 1024, (16, 40), (40, 70), (2,), 8, ((40, "indexer"), (90, "sparse"))),
    Lesson(6000, 1024, (16, 60), (90, 120), (2,), 8, ((150, "sparse"),)),
    Lesson(2500, 4096, (20, 200), (300, 450), (2,), 2, ((150, "sparse"),), (0.008, 0.003)),
    Lesson(250, 16384, (10, 120), (150, 900), (2,), 1, ((90, "sparse"),), (0.004, 0.002), released=True),
    Lesson(60, 49152, (10, 200), (300, 1500), (2,), 1, ((24, "sparse"),), (0.002, 0.0002), released=True),
)


def texts(lesson: Lesson, seed: int, path: Path) -> None:
    """Writes a lesson's texts, one a line."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(lesson.texts):
        letters = int(rng.choice(lesson.letters))
        told = int(rng.integers(lesson.told[0], lesson.told[1] + 1))
        asked = int(rng.integers(lesson.asked[0], lesson.asked[1] + 1))
        told = min(told, 26**letters)
        lines.append(json.dumps({"text": recall.lesson(rng, lesson.length, told=told, asked=asked, letters=letters)}))
    path.write_text("\n".join(lines) + "\n")


def train(directory: Path) -> Path:
    """Goes through the curriculum; what was done before is not done again."""
    directory.mkdir(parents=True, exist_ok=True)
    run: Path | None = None
    for number, lesson in enumerate(CURRICULUM, 1):
        data = directory / f"{number}.jsonl"
        if not data.exists():
            texts(lesson, number, data)
        before, run = run, directory / f"{number}-{lesson.length}"
        (highest, last), steps = lesson.rate, sum(steps for steps, _ in lesson.stages)
        warmup = 20 if before is None else min(5, steps // 10)
        settings: dict[str, Any] = {
            "run": str(run),
            **({"architecture": ARCHITECTURE} if before is None else {"model": str(before)}),
            "data": {"sources": [{"path": str(data)}], "begin": False, "end": False, "open_rows": 2},
            "stages": [
                {"steps": steps, "length": lesson.length, "rows": lesson.rows, "attention": attention}
                for steps, attention in lesson.stages
            ],
            "optimizer": {
                "learning_rate": highest,
                "final_learning_rate": last,
                "weight_decay": 0.01,
                "warmup_steps": warmup,
                "decay_steps": steps - warmup if last < highest else 0,
            },
            "checkpoints": {"every": 25},
            "log": {"tensorboard": False},
            "policy": "float32",
            "fp4_experts": lesson.released,
            "remat": "sublayers" if lesson.length > 4096 else "none",
        }
        file = directory / f"{run.name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        subprocess.run([str(Path(sys.executable).parent / "v4-jax"), "train", str(file)], check=True)
    assert run is not None
    return run


# ---- measuring -------------------------------------------------------------------------------------------------------


class Reader:
    """Reads texts of one length in chunks, and says what the model takes for the values that are due.

    Args:
      config: the architecture.
      params: its parameters.
      chunk: tokens that are read at once.
      seed: of random picks; None leaves the choice of entries to the indexer.
    """

    def __init__(self, config: Config, params: Any, *, chunk: int = 1024, seed: int | None = None) -> None:
        self._config, self._params, self._chunk = config, params, chunk
        self._rng = None if seed is None else np.random.default_rng(seed)
        self._tokenizer = ByteTokenizer(config.vocab_size)
        model = Transformer(config, policy="float32")

        def read(params: Any, tokens: jax.Array, cache: Any, routing: Any, last: bool) -> Any:
            output = model.apply(
                {"params": params}, tokens, cache=cache, routing=routing, logits="all" if last else "none"
            )
            return output.cache, None if output.logits is None else jnp.argmax(output.logits, axis=-1)

        self._read = jax.jit(read, static_argnums=4, donate_argnums=2)

    def right(self, questions: Sequence[recall.RecallQuestion]) -> np.ndarray:
        """[questions, digits] whether each digit of the value is the likeliest token, those before it given.

        The texts must be one longer than a multiple of the chunk.
        """
        encode = self._tokenizer.encode
        tokens = np.array([encode(one.text + one.record.value[:-1]) for one in questions], np.int32)
        due = np.array([encode(one.record.value) for one in questions])
        cache = init_cache(self._config, *tokens.shape, dtype="float32")
        ends = [*range(self._chunk, tokens.shape[1], self._chunk), tokens.shape[1]]
        first, best = 0, None
        for end in ends:
            part = tokens[:, first:end]
            last = end == tokens.shape[1]
            cache, best = self._read(self._params, part, cache, self._picks(first, part.shape), last)
            first = end
        return np.asarray(best)[:, -due.shape[1] :] == due

    def _picks(self, first: int, shape: tuple[int, int]) -> Routing | None:
        """Entries at random among those visible, as many as the indexer would pick."""
        if self._rng is None:
            return None
        layers = sum(layer.attention == "csa" for layer in self._config.layers)
        visible = (first + np.arange(shape[1]) + 1) // RATIO_OF_ROLE["csa"]
        count = (layers, *shape, self._config.index_topk)
        drawn = np.sort((self._rng.random(count) * visible[:, None]).astype(np.int32), axis=-1)
        twice = np.pad(drawn[..., 1:] == drawn[..., :-1], [(0, 0)] * 3 + [(1, 0)])
        return Routing(entries=jnp.asarray(np.where(twice | (visible[:, None] == 0), -1, drawn)))


def grid(reader: Reader, lengths: Sequence[int], depths: Sequence[float], questions: int, told: int) -> list[dict]:
    """Accuracy by length and depth: the share of values of which every digit is right."""
    found = []
    for length in lengths:
        rng = np.random.default_rng(length)
        count = max(8, min(questions, 2**18 // length))
        rows = max(1, min(count, 65536 // length))
        for depth in depths:
            asked = [recall.question(rng, length + 1, depth, told=told) for _ in range(count)]
            right = np.concatenate([reader.right(asked[i : i + rows]) for i in range(0, count, rows)])
            cell = {
                "length": length,
                "depth": depth,
                "questions": count,
                "distance": int(np.mean([one.distance for one in asked])),
                "right": float(right.all(axis=1).mean()),
                "digits": float(right.mean()),
            }
            found.append(cell)
            print(f"{length:>8,} {depth:5.2f}  values {cell['right']:.2f}  digits {cell['digits']:.2f}", flush=True)
    return found


def picture(results: dict[str, Any], path: Path) -> None:
    """Two grids beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for axes, (name, title) in zip(both, (("indexer", "the indexer's picks"), ("random", "random picks")), strict=True):
        cells = results[name]
        lengths, depths = (sorted({cell[key] for cell in cells}) for key in ("length", "depth"))
        values = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            values[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["right"]
        axes.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(lengths)), [f"{n // 1024}K" for n in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
        axes.set(xlabel="length", title=title)
        for (y, x), value in np.ndenumerate(values):
            axes.text(
                x, y, f"{value:.0%}", ha="center", va="center", color="black" if value > 0.6 else "white", fontsize=8
            )
    both[0].set_ylabel("depth of the record")
    figure.suptitle(f"Values recalled (chance {1 / recall.VALUES:.0%}); trained on rows up to {results['trained']:,}")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("train").add_argument("directory", type=Path)
    measuring = verbs.add_parser("measure")
    measuring.add_argument("model", type=Path)
    measuring.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 131072])
    measuring.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.5, 0.95])
    measuring.add_argument(
        "--questions", type=int, default=32, help="of a length and depth; fewer beyond 8K, at least 8"
    )
    measuring.add_argument("--told", type=int, default=24, help="records of a text")
    measuring.add_argument("--out", type=Path, default=RESULTS / "recall.json")
    options = parser.parse_args()
    if options.verb == "train":
        train(options.directory)
        return
    config, params = load(options.model, dtype="float32")
    results: dict[str, Any] = {"trained": max(lesson.length for lesson in CURRICULUM), "told": options.told}
    controlled = [length for length in options.lengths if length <= CONTROL]
    for name, seed, lengths in (("indexer", None, options.lengths), ("random", 0, controlled)):
        print(f"{name}: length, depth, share of values and of digits that are right")
        reader = Reader(config, params, seed=seed)
        results[name] = grid(reader, lengths, options.depths, options.questions, options.told)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    picture(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
