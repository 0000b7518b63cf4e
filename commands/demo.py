"""`v4-jax demo`: the tour, on a tiny model that comes with the package."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

from v4_jax import chat, checkpoint
from v4_jax.checkpoint import Comparison
from v4_jax.commands import PROGRAM
from v4_jax.commands import info_report as card
from v4_jax.commands.generate import Limits
from v4_jax.commands.info_report import make_table
from v4_jax.commands.shared import devices
from v4_jax.commands.shared.console import CommandError, bad_input, progress_bar, say, show
from v4_jax.commands.shared.engines import compile_engine
from v4_jax.commands.shared.models import ModelDirectory
from v4_jax.commands.shared.options import OptionalCount, OptionalFile
from v4_jax.commands.shared.reply import Writer
from v4_jax.commands.shared.speed import memory_text
from v4_jax.commands.shared.streaming import stream
from v4_jax.commands.verify_report import kinds_table
from v4_jax.infer.chunks import chunk_size
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import GREEDY, Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.evaluation import recall
from v4_jax.infer.generate import Generation
from v4_jax.infer.text import Reply

PROMPT, SAID = "Write one sentence about the sea.", 64  # tokens of the reply at most

# A prompt that the embedded model continues with what it was told.
TOLD_BRIEFLY = "fox QZ47 moon KB03 wool PA81 gate QZ"

# What the embedded model is asked: texts of so many characters, each with a record told at another depth.
LENGTH, DEPTHS, TOLD = 32768, (0.02, 0.25, 0.5, 0.75), 24
DEVICES, CHUNK = 4, 4096  # virtual devices, where there are no others; tokens of a text that are read at once


def demo(*, model: OptionalFile = None, max_tokens: OptionalCount = None) -> None:
    """Shows the whole way in two minutes: a released checkpoint, its weights in memory, its card, what it says.

    The model that comes with the package has every part of DeepSeek-V4 in the released layout and number formats, in
    2.3 megabytes. It was trained by this package to look up what it was told, and is asked for records that
    stand tens of thousands of characters back, with the text split over devices. With --model the same tour goes
    through a model of yours, which writes a sentence.

    Examples:
      v4-jax demo
      v4-jax demo --model DeepSeek-V4-Flash

    Args:
      model: A directory with a released model, or one made by convert. Default: the embedded one.
      max_tokens: Most tokens of the reply of a model of yours; 64 by default.
    """
    if model is not None:
        _sentence(*_tour(model, str(model)), max_tokens or SAID)
        _next(("chat", model), ("info", model, "--context", "1M"), ("generate", model, "--prompt", PROMPT))
        return
    if max_tokens is not None:
        raise CommandError("--max-tokens is for the reply of a model of yours, and there is none; expected --model too")
    devices.virtual(DEVICES)
    with _embedded() as path:
        directory, _ = _tour(path, "the embedded model")
        _recall(directory)
        asked = ("--raw", "--greedy", "--max-tokens", "2", "--prompt", TOLD_BRIEFLY)
        _next(("generate", path, *asked), ("info", "flash", "--context", "1M"), ("chat", "DeepSeek-V4-Flash"))


def _tour(path: Path, name: str) -> tuple[ModelDirectory, Any]:
    """Load, verify and card; returns the directory and its weights in native formats."""
    directory = ModelDirectory.open(path)
    config = directory.config
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
    return directory, params


def _sentence(directory: ModelDirectory, params: Any, max_tokens: int) -> None:
    """A streamed reply to a short prompt."""
    config, tokenizer, defaults = directory.config, directory.tokenizer(), directory.generation_defaults()
    ids = tokenizer.encode(chat.encode([{"role": "user", "content": PROMPT}], thinking_mode="chat"))
    limits = Limits.of(len(ids), max_tokens, None, config)
    with bad_input():
        sampling = Sampling(defaults.temperature, defaults.top_p, defaults.top_k, defaults.min_p)
    _step(4, "Generate: chunked prefill, then a token at a time through the compressed cache")
    engine = Engine(config, params, slots=1, max_length=limits.allocated, prefill_chunk=chunk_size(len(ids), 512))
    print(f"{PROMPT}\n", flush=True)
    reply = Reply(tokenizer, (), "chat")
    writer = Writer(sys.stdout, show_reasoning=True, headings=False, safe=True)
    request = Request(ids, limits.max_tokens, sampling, defaults.stop_ids)
    say(stream(engine, request, reply, writer).summary())


def _recall(directory: ModelDirectory) -> None:
    """Records told far back are asked for, with the texts split over all devices."""
    config, tokenizer = directory.config, directory.tokenizer()
    rng = np.random.default_rng(0)
    questions = [recall.question(rng, LENGTH, depth, told=TOLD) for depth in DEPTHS]
    prompts = [tokenizer.encode(question.text) for question in questions]
    count = jax.device_count()
    mesh = f"seq={count}"
    _step(4, f"Recall: {len(prompts)} texts of {LENGTH:,} characters, split over {count} devices ({mesh})")
    print(f"Each tells {TOLD} records, a key of letters with a number, and ends with the key of one of them:\n")
    print(f"  {_shortened(questions[0])}\n", flush=True)
    place = devices.place(config, mesh, "long-context", batch=len(prompts), length=CHUNK, dtype="native")
    engine = Engine(
        config,
        directory.load("native", place),
        slots=len(prompts),
        max_length=LENGTH + recall.DIGITS,
        policy="float32",
        prefill_chunk=CHUNK,
        place=place,
    )
    compiled = compile_engine(engine)
    requests = [Request(prompt, recall.DIGITS, GREEDY, stop_ids=()) for prompt in prompts]
    with progress_bar("reading", "tokens") as report:
        generation = Generation(engine, requests, lambda done, total: report("", done, total))
        found = [""] * len(prompts)
        for event in generation:
            found[event.request] += tokenizer.decode([event.id])
    shown = make_table("", "told before", "asked for", "found", "")
    for question, value in zip(questions, found, strict=True):
        right = value == question.record.value
        shown.add_row(f"{question.distance:,} characters", question.record.key, value, "right" if right else "wrong")
    show(shown)
    window, picked = config.sliding_window, config.index_topk
    say(
        f"read {generation.prompt_tokens:,} tokens in {generation.prefill_seconds + generation.decode_seconds:.1f} s, "
        f"first token after {generation.prefill_seconds:.1f} s, after compiling for {compiled:.0f} s; {memory_text()}"
    )
    print(
        f"\nThe window of full attention is {window} tokens. All else comes through compressed entries, one for four "
        f"tokens,\nof which the indexer picks {picked} for each token. The same commands take the released checkpoints."
    )


def _next(*commands: tuple[str | Path, ...]) -> None:
    """What to try now: the last lines, as a shell takes them."""
    print("\nNext, try\n")
    for command in commands:
        print(f"  {_program()} {shlex.join(map(str, command))}")


def _program() -> str:
    """What a shell here calls the program, which `make demo` runs in an environment that is not activated."""
    beside = Path(sys.executable).with_name(PROGRAM)
    if shutil.which(PROGRAM) or not beside.exists():
        return PROGRAM
    return shlex.quote(min(str(beside), os.path.relpath(beside), key=len))


def _shortened(question: recall.RecallQuestion) -> str:
    """The text around the record and at its end."""
    told = len(question.text) - question.distance
    return f"... {question.text[told - 30 : told + 30]} ... {question.text[-30:]}"


@contextlib.contextmanager
def _embedded() -> Iterator[Path]:
    """The checkpoint that comes with the package, as a directory."""
    with resources.as_file(resources.files("v4_jax") / "data" / "demo") as path:
        yield path


def _step(number: int, title: str) -> None:
    print(f"\n{number}. {title}\n" if number > 1 else f"{number}. {title}\n", flush=True)
