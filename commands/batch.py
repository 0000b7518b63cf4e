"""`v4-jax batch`: a file of requests in, a file of answers out."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils

from v4_jax.chat import Mode
from v4_jax.checkpoint import fingerprint
from v4_jax.commands.shared.console import CommandError, bad_input, check_output, needs, progress_bar, say, working
from v4_jax.commands.shared.contexts import DEFAULT_MAX_TOKENS, check_length, check_mode, room
from v4_jax.commands.shared.devices import join
from v4_jax.commands.shared.engines import EngineOptions, describe_drafts
from v4_jax.commands.shared.models import ModelDirectory
from v4_jax.commands.shared.options import Count, Flag, Int, Model, OptionalFile, OptionalSize, OptionalText, Profile
from v4_jax.commands.shared.profiling import check_profile, profiled
from v4_jax.commands.shared.sampling import SamplingOptions
from v4_jax.commands.shared.speed import memory_text, rate_text

InputFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT", help_behavior_hint="")]
OutputFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT", help_behavior_hint="")]


def batch(
    model: Model,
    input: InputFile,
    output: OutputFile,
    *,
    mode: Mode = "non-think",
    effort_profile: Profile = "auto",
    raw: Flag = False,
    max_tokens: Count = DEFAULT_MAX_TOKENS,
    context: OptionalSize = None,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
    seed: Int = 0,
    part: OptionalText = None,
    as_finished: Flag = False,
    overwrite: Flag = False,
    profile: OptionalFile = None,
    engine: EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    distributed: Flag = False,
) -> None:
    """Answers a file of requests, many at a time.

    Input has a JSON value a line: a line of OpenAI's batch files (custom_id, method, url, body); a body alone, with
    "messages" or "prompt" and perhaps an "id"; or a string, which is a question. Output has a line for each, as OpenAI
    writes them, in the same order; a line that cannot be served becomes a record with its "error".

    Answers are kept in a journal next to the output as they come. Whatever ends the command, the same command goes on
    from there; the output appears when it is complete.

    Examples:
      v4-jax batch DeepSeek-V4-Flash requests.jsonl answers.jsonl --mode high --memory 16G
      v4-jax batch DeepSeek-V4-Flash requests.jsonl answers.jsonl --mesh tensor=8 --slots 64
      v4-jax batch DeepSeek-V4-Flash requests.jsonl answers.jsonl --part 2/4    # the second of four hosts

    Args:
      model: A directory with a released model, or one made by convert.
      input: The requests.
      output: The answers.
      mode: How a chat is answered whose body does not say: at once, or after reasoning with little, high or the most
        effort.
      effort_profile: What the model takes its reasoning efforts for: preview, official (Flash-0731, Pro-0813), or auto,
        which its own encoding says.
      raw: A line that is a string is a text to continue, not a question.
      max_tokens: Most tokens of an answer whose request does not say.
      context: Most tokens of a prompt and its answer; longer requests become errors. Default: what the longest needs.
      sampling: How tokens are chosen, where the request does not say.
      seed: Where the request does not say, its seed is this plus its line's number.
      part: Serve only a part of the lines, such as 2/4; the last of all parts to finish writes the output.
      as_finished: Write the answers in the order in which they finished.
      overwrite: Replace an output file that is there.
      profile: A directory for a trace of the first 64 chunks and steps, for XProf or Perfetto.
      engine: How requests are served.
      distributed: This is one of several processes, one per host, that serve one model together.
    """
    with needs("serve"):
        from v4_jax.infer.openai.batch import LEGAL_LINE, Lines, PreparedLine, answer_lines, read_request, survey
        from v4_jax.infer.openai.completions import Completion, Defaults
        from v4_jax.infer.openai.completions import Model as Asked
        from v4_jax.infer.openai.journal import Journal, JournalError, Share, join_shares, journal_path

    check_profile(profile)
    join(distributed)
    directory = ModelDirectory.open(model)
    engine.check(directory)
    config, tokenizer, release = directory.config, directory.tokenizer(), directory.generation_defaults()
    efforts = directory.effort_profile(effort_profile)
    longest = config.max_position_embeddings if context is None else check_length(config, context)
    with bad_input():
        chosen = sampling.over(release, seed)
        share = Share() if part is None else Share.parse(part)
    check_output(output)
    if output.exists() and not overwrite and not journal_path(output, share).exists():
        raise CommandError(f"{output} is there already; expected the name of a file to make, or --overwrite")
    with bad_input(f"{input} cannot be read: "):
        lines = Lines(input)
    if not lines.numbers:
        raise CommandError(f"{input} has no lines; each is to be {LEGAL_LINE}")
    with bad_input(f"{model} cannot be read: "):
        model_fingerprint = fingerprint(model)
    header = {
        "input": lines.digest,
        "parts": share.of,
        "model": directory.path.name,
        "fingerprint": model_fingerprint,
        "options": {
            "mode": mode,
            "effort_profile": efforts,
            "raw": raw,
            "max_tokens": max_tokens,
            "context": context,
            "sampling": dataclasses.asdict(chosen),
            "dtype": engine.dtype,
            "policy": engine.policy,
            "cache_dtype": engine.cache_dtype,
        },
    }
    mine = [number for number in lines.numbers if share.holds(number)]
    leads = jax.process_index() == 0
    try:
        with bad_input(f"{output} cannot be made: "):
            journal = Journal(output, share, header) if leads else None
    except JournalError as error:
        raise CommandError(str(error)) from None
    done = _everywhere(mine, journal.lines if journal else set())
    failed = 0

    def record(one: dict[str, Any]) -> None:
        nonlocal failed
        failed += one["error"] is not None
        done.add(one["line"])
        if journal:
            with bad_input(f"{output}: {len(done) - 1} of {len(mine)} answers are kept, to go on from: "):
                journal.add(one)

    defaults = Defaults(chosen, release.stop_ids, max_tokens, mode, efforts)
    asked = Asked(directory.path.name, config, tokenizer, defaults, longest, engine.slots)

    def prepare(number: int) -> PreparedLine:
        id, body = read_request(lines[number], raw=raw)
        return PreparedLine(number, id, Completion(body, asked, (seed + number) % 2**32))

    if done:
        say(f"{len(done)} of {len(mine)} requests are answered already")
    started, tokens = time.perf_counter(), 0
    first: float | None = None
    try:
        with working("reading the requests"):
            needed = survey([number for number in mine if number not in done], prepare, lines, record)
        if needed.numbers:
            length = room(needed.length, config.max_position_embeddings) if context is None else context
            check_mode(mode, length, efforts)
            server = engine.build(directory, length, needed.samples)
            started = time.perf_counter()
            with progress_bar("answering", "requests") as report:

                def progress() -> None:
                    nonlocal tokens, first
                    tokens += 1
                    first = time.perf_counter() - started if first is None else first
                    rate = tokens / (time.perf_counter() - started)
                    report(f"{rate:,.1f} tokens/s", len(done), len(mine))

                with profiled(server, profile):
                    answer_lines(server, needed.numbers, prepare, record, progress)
            server.close()
            if drafts := describe_drafts(server.acceptance):
                say(drafts)
        if journal:
            journal.close()
    except KeyboardInterrupt:
        say(f"interrupted: {len(done)} of {len(mine)} requests are answered; the same command goes on from there")
        raise
    seconds = time.perf_counter() - started
    say(
        f"answered {len(mine)} requests, {failed} of them with an error now; {rate_text(tokens, seconds)}, "
        + (f"first token after {first:.2f} s, " if first is not None else "")
        + memory_text()
    )
    if leads:
        try:
            with bad_input(f"{output} cannot be written: "):
                whole = join_shares(output, share.of, header, lines.numbers, as_finished=as_finished)
        except JournalError as error:
            raise CommandError(str(error)) from None
        if not whole:
            say(f"part {share.number} of {share.of} is done; {output} appears when all of them are")


def _everywhere(numbers: list[int], done: set[int]) -> set[int]:
    """What the first of several processes knows to be done."""
    if jax.process_count() == 1:
        return set(done)
    mask = multihost_utils.broadcast_one_to_all(np.asarray([number in done for number in numbers]))
    return {number for number, is_done in zip(numbers, np.asarray(mask).tolist(), strict=True) if is_done}
