"""`v4-jax score`: log-probabilities of given texts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from v4_jax.commands.shared.console import (
    CommandError,
    Report,
    bad_input,
    check_output,
    progress_bar,
    read_text,
    say,
    working,
)
from v4_jax.commands.shared.devices import join, place
from v4_jax.commands.shared.models import ModelDirectory, cache_format
from v4_jax.commands.shared.options import CacheFormat, Count, Dtype, File, Flag, Model, OptionalText
from v4_jax.commands.shared.speed import memory_text, rate_text
from v4_jax.infer.score import ScoreError, Scorer, read_texts, write_lines
from v4_jax.policy import PolicyName
from v4_jax.sharding.axes import Preset


def score(
    model: Model,
    *,
    input: File = Path("-"),
    output: File = Path("-"),
    no_bos: Flag = False,
    batch: Count = 4,
    chunk: Count = 256,
    dtype: Dtype = "native",
    policy: PolicyName = "bfloat16",
    cache_dtype: CacheFormat = "auto",
    mesh: OptionalText = None,
    preset: Preset = "long-context",
    distributed: Flag = False,
) -> None:
    """Computes the log-probability of every token of given texts.

    Input is one JSON object a line, {"text": "..."} or {"tokens": [0, 17, 42]}, with an "id" of any kind if you like.
    Output has a line for each, in the same order: the tokens; their log-probabilities given all tokens before (null for
    the first); their "total" and "count"; the "id". An output file appears when it is complete.

    Examples:
      v4-jax score DeepSeek-V4-Flash --input texts.jsonl --output scores.jsonl
      echo '{"text": "The sky is blue."}' | v4-jax score DeepSeek-V4-Flash-Base

    Args:
      model: A directory with a released model, or one made by convert.
      input: JSON lines to score; stdin by default.
      output: Where the scores go; stdout by default.
      no_bos: Score "text" without a begin-of-sentence token in front of it; its first token is then given, not scored.
      batch: Texts at once.
      chunk: Tokens of each text that are read at once; logits take batch x chunk x vocabulary x 4 bytes.
      dtype: How weights are held: as released, or expanded.
      policy: Precision of the computation; released is bfloat16 with the release's rounding of keys and values.
      cache_dtype: Number format of the cache; auto is the policy's.
      mesh: How to spread the model over all devices: sizes of data, seq, expert and tensor, such as
        seq=4,expert=2; one, for one device; or auto, the best that fits, which is the default.
      preset: Which mesh axes split what; long-context splits long prompts over all axes but data.
      distributed: This is one of several processes, one per host, that run the same command together.
    """
    join(distributed)
    directory = ModelDirectory.open(model)
    cache = cache_format(cache_dtype, policy)
    name = "stdin" if str(input) == "-" else str(input)
    if str(output) != "-":
        check_output(output)
    with bad_input(f"{name}: "):
        # splitlines() would also split at characters that JSON strings may hold, such as U+2028
        texts = read_texts(read_text(input).split("\n"), directory.config, directory.tokenizer, bos=not no_bos)
    batch, longest = min(batch, len(texts)), max(len(text.tokens) for text in texts)
    where = place(directory.config, mesh, preset, batch=batch, dtype=dtype, context=longest, cache=cache)
    with bad_input():
        scorer = Scorer(
            directory.config,
            longest=longest,
            policy=policy,
            cache_dtype=cache,
            batch=batch,
            chunk=chunk,
            place=where,
        )
    params = directory.load(dtype, where)
    with working("compiling"):
        scorer.compile(params)
    started, total, count, failed = time.perf_counter(), [], 0, 0

    def lines(report: Report) -> Iterator[str]:
        nonlocal count, failed
        for result in scorer.score(params, texts, lambda done, all_: report("", done, all_)):
            if result.error:
                failed += 1
            else:
                total.append(float(result.logprobs.sum(dtype="float64")))
                count += len(result.logprobs)
            yield json.dumps(result.as_json(), ensure_ascii=False)

    try:
        if str(output) == "-" or jax.process_index():  # no bar: the lines themselves show how far it is
            for line in lines(lambda what, done, all_: None):
                print(line, flush=True)
        else:
            with progress_bar("scoring", "tokens") as report:
                write_lines(lines(report), output)
    except ScoreError as error:
        raise CommandError(f"{name}: {error}") from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(f"{output} cannot be written: {error.strerror or error}") from None
    seconds = time.perf_counter() - started
    mean = math.fsum(total) / max(count, 1)
    say(
        f"scored {len(texts)} texts, {rate_text(count, seconds)}, {memory_text()}, "
        f"mean log-probability {mean:.4f}, perplexity {math.exp(min(-mean, 700)):,.2f}"
        + (f"; {failed} of them have an error instead: log-probabilities that are not finite numbers" if failed else "")
    )
