"""Continue a text, token by token as they come.

    python examples/generate.py
    python examples/generate.py --model DeepSeek-V4-Flash --prompt "The sky is dark at night because" --temperature 1

The embedded model was trained to look up records (two capital letters, two digits) that it was told earlier in a text.
"""

from pathlib import Path

import tyro

import v4_jax
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.tokenizer import load_tokenizer

DEMO = Path(v4_jax.__file__).parent / "data" / "demo"
PROMPT = "tree fox QZ47 river moon KB03 pond wool mill lake PA81 stone ring gate corn east door bay moss hill QZ"


def main(
    model: Path = DEMO, prompt: str = PROMPT, max_tokens: int = 2, temperature: float = 0.0, policy: str = "float32"
) -> str:
    """Continues a text.

    Args:
      model: A released or converted checkpoint, or a training run.
      prompt: The text.
      max_tokens: Most tokens to add.
      temperature: 0 takes the most likely token.
      policy: float32, bfloat16 or released.
    """
    config, params = v4_jax.load(model)
    tokenizer = load_tokenizer(model, config.vocab_size)
    ids = tokenizer.encode(prompt)

    engine = Engine(config, params, slots=1, max_length=len(ids) + max_tokens, policy=policy, prefill_chunk=128)
    engine.submit(Request(ids, max_tokens, Sampling(temperature=temperature)))
    print(prompt, end="", flush=True)
    text = tokenizer.stream()  # a character may take several tokens
    pieces = []
    for event in engine.run():
        pieces.append(text.push(event.id))
        print(pieces[-1], end="", flush=True)
    print()
    return "".join(pieces)


if __name__ == "__main__":
    tyro.cli(main)
