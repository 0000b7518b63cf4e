"""`v4-jax demo`: the tour, on a tiny model that comes with the package."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from infer.generate import Generator
from infer.sampling import Sampling
from v4_jax import chat, checkpoint
from v4_jax.checkpoint import Comparison
from v4_jax.cli import info as card
from v4_jax.cli.checkpoints import kinds_table
from v4_jax.cli.console import CommandError, bad_input, progress_bar, say, show
from v4_jax.cli.generation import Limits, stream
from v4_jax.cli.models import ModelDirectory
from v4_jax.cli.options import Count, OptionalFile
from v4_jax.cli.reply import Reply, Writer

PROMPT = "Write one sentence about the sea."


def demo(*, model: OptionalFile = None, max_tokens: Count = 64) -> None:
    """Shows the whole way in two minutes: a released checkpoint, its weights in memory, its card, a streamed reply.

    The model that comes with the package has every part of DeepSeek-V4 in the released layout and number formats, in
    five megabytes. Its weights are random, so its reply is noise: what is shown is the machinery. With --model the same
    tour goes through a model of yours.

    Examples:
      v4-jax demo
      v4-jax demo --model DeepSeek-V4-Flash

    Args:
      model: A directory with a released model, or one made by convert. Default: the embedded one.
      max_tokens: Most tokens of the reply.
    """
    with _embedded() if model is None else contextlib.nullcontext(model) as path:
        directory = ModelDirectory.open(path)
        config, tokenizer, defaults = directory.config, directory.tokenizer(), directory.generation_defaults()
        ids = tokenizer.encode(chat.encode([{"role": "user", "content": PROMPT}], thinking_mode="chat"))
        limits = Limits.of(len(ids), max_tokens, None, config)
        with bad_input():
            sampling = Sampling(defaults.temperature, defaults.top_p, defaults.top_k, defaults.min_p)

        name = "the embedded tiny model" if model is None else str(model)
        _step(1, f"Load {name}: safetensors as released, number formats kept")
        started = time.perf_counter()
        params = directory.load("native")
        size = directory.checkpoint.nbytes
        print(f"{len(directory.checkpoint.tensors):,} tensors, {size:,} bytes in {time.perf_counter() - started:.1f} s")

        _step(2, "Verify: every tensor in memory against the files")
        with bad_input(), progress_bar("verifying") as report:
            comparison: Comparison = checkpoint.verify(directory.checkpoint, (config, params), progress=report)
        show(kinds_table(comparison))
        if not comparison.equal:
            raise CommandError(f"{name} does not come back from memory as it is on disk: run `v4-jax verify` on it")

        _step(3, "What it is and what it costs")
        show(card.render(config, config.max_position_embeddings))

        _step(4, "Generate: chunked prefill, then a token at a time through the compressed cache")
        generator = Generator(config, params, max_length=limits.allocated)
        print(f"{PROMPT}\n", flush=True)
        reply = Reply(tokenizer, (), "chat")
        writer = Writer(sys.stdout, show_reasoning=True, headings=False, safe=True)
        outcome = stream(generator, ids, limits.max_tokens, sampling, defaults.stop_ids, reply, writer)
        say(outcome.summary())
        if model is None:
            print(
                "\nThis tiny model has random weights, so its reply is noise. The machinery is the real one: the same "
                "commands take the released checkpoints."
            )


@contextlib.contextmanager
def _embedded() -> Iterator[Path]:
    """The checkpoint that comes with the package, as a directory."""
    with resources.as_file(resources.files("v4_jax") / "data" / "demo") as path:
        yield path


def _step(number: int, title: str) -> None:
    print(f"\n{number}. {title}\n" if number > 1 else f"{number}. {title}\n", flush=True)
