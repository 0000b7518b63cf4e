"""How likely is a text, and what would make it likelier? The model is a pure function, so `jax.grad` applies.

    python examples/score_and_gradient.py
    python examples/score_and_gradient.py --text "KB03 moon fox QZ47 pond KB05"

The embedded model was trained to look up records (two capital letters, two digits) that it was told earlier in a text.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

import v4_jax
from v4_jax.tokenizer import load_tokenizer

DEMO = Path(v4_jax.__file__).parent / "data" / "demo"


def main(model: Path = DEMO, text: str = "KB03 moon fox QZ47 pond KB03 QZ47 ") -> tuple[jax.Array, dict]:
    """Prints each token's log-probability, and the parameters with the largest gradients.

    Args:
      model: A released or converted checkpoint, or a training run.
      text: The text.
    """
    config, params = v4_jax.load(model, dtype="float32")  # gradients need plain arrays, not FP8 and FP4 codes
    transformer = v4_jax.Transformer(config, policy="float32")
    tokenizer = load_tokenizer(model, config.vocab_size)
    ids = tokenizer.encode(text)
    tokens = jnp.array([ids])

    def loss(params):
        logprobs = jax.nn.log_softmax(transformer.apply({"params": params}, tokens).logits[:, :-1])
        chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1)[0, :, 0]  # of each token but the first
        return -jnp.mean(chosen), chosen

    # Expert ids of the hash tables are integers: allow_int gives them gradients without a value.
    (mean, chosen), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))(params)
    for token, value in zip(ids[1:], chosen.tolist(), strict=True):
        print(f"{tokenizer.decode([token])!r:>6} {value:9.4f}")
    print(f"mean negative log-probability: {mean:.4f}")

    paths = jax.tree_util.tree_flatten_with_path(gradients)[0]
    norms = {jax.tree_util.keystr(at): float(jnp.linalg.norm(g)) for at, g in paths if g.dtype == jnp.float32}
    for name in sorted(norms, key=norms.__getitem__, reverse=True)[:5]:
        print(f"{norms[name]:9.4f}  {name}")
    return chosen, norms


if __name__ == "__main__":
    tyro.cli(main)
