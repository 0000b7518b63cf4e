"""A training loop of one's own: some steps of Muon on the bytes of a file. `v4-jax train` is the one for real runs.

python examples/train_tiny.py
python examples/train_tiny.py --text LICENSE --steps 50
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import v4_jax
from v4_jax.tokenizer import load_tokenizer
from v4_jax.train.batch import Batch
from v4_jax.train.objectives.objective import Weights
from v4_jax.train.optimizer import optimizer
from v4_jax.train.step import TrainState, make_step

DEMO = Path(v4_jax.__file__).parent / "data" / "demo"


def main(
    model: Path = DEMO,
    text: Path = Path(__file__),
    steps: int = 20,
    rows: int = 4,
    length: int = 128,
    learning_rate: float = 3e-3,
) -> list[float]:
    """Continues the training of a small model.

    Args:
      model: A released or converted checkpoint, or a training run.
      text: A file to learn.
      steps: Updates.
      rows: Pieces of the text in each of them.
      length: Tokens of a piece.
      learning_rate: Of Muon, which updates the matrices, and of AdamW, which updates the rest.
    """
    config, params = v4_jax.load(model, dtype="float32")
    ids = np.array(load_tokenizer(model, config.vocab_size).encode(text.read_text(encoding="utf-8")), np.int32)
    transform = optimizer(config, learning_rate)
    step = jax.jit(make_step(v4_jax.Transformer(config, policy="float32"), transform, lambda step: Weights()))

    state, losses = TrainState(jnp.int32(0), params, jax.jit(transform.init)(params)), []
    random = np.random.default_rng(0)
    for number in range(1, steps + 1):
        starts = random.integers(len(ids) - length, size=rows)
        tokens = np.stack([ids[start : start + length] for start in starts])[None]  # [microbatches, rows, length]
        state, metrics = step(state, Batch(tokens, np.ones_like(tokens)))  # each row is one document, number 1
        losses.append(float(metrics["loss"]))
        print(f"step {number:3}  loss {losses[-1]:.3f}", flush=True)
    return losses


if __name__ == "__main__":
    tyro.cli(main)
