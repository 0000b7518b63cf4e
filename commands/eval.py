"""`v4-jax eval`: how useful a model stays at length."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from v4_jax.chat import Mode
from v4_jax.commands.eval_report import PICTURE, RESULTS, check_directory, draw, scores_table, write_results
from v4_jax.commands.shared.console import (
    CommandError,
    bad_input,
    check_output,
    needs,
    progress_bar,
    read_text,
    say,
    show,
)
from v4_jax.commands.shared.contexts import check_length, check_mode, room
from v4_jax.commands.shared.devices import join
from v4_jax.commands.shared.engines import EngineOptions
from v4_jax.commands.shared.models import ModelDirectory
from v4_jax.commands.shared.options import (
    Flag,
    Int,
    Model,
    OptionalCount,
    OptionalCounts,
    OptionalFile,
    OptionalFloat,
    OptionalFractions,
    OptionalSize,
    OptionalSizes,
    Profile,
)
from v4_jax.commands.shared.sampling import SamplingOptions
from v4_jax.commands.shared.sizes import format_size
from v4_jax.infer.engine.requests import NOT_FINITE
from v4_jax.infer.evaluation import synthetic
from v4_jax.infer.evaluation.asking import Answer, ask
from v4_jax.infer.evaluation.form import Asked, Form, fitting
from v4_jax.infer.evaluation.grading import Result, table
from v4_jax.infer.evaluation.tasks import TASKS, TaskName, read_set
from v4_jax.infer.score import write_lines

# Made-up sets, where nothing else is asked for.
_LENGTHS, _DEPTHS, _NEEDLES, _TOLD, _SAMPLES = (4096, 16384), (0.0, 0.25, 0.5, 0.75, 1.0), (2, 4, 8), 24, 8


def eval(
    model: Model,
    *,
    task: TaskName = "needle",
    data: OptionalFile = None,
    generate: OptionalFile = None,
    lengths: OptionalSizes = None,
    depths: OptionalFractions = None,
    needles: OptionalCounts = None,
    told: OptionalCount = None,
    samples: OptionalCount = None,
    seed: Int = 0,
    raw: Flag = False,
    no_bos: Flag = False,
    mode: Mode = "non-think",
    effort_profile: Profile = "auto",
    max_tokens: OptionalSize = None,
    context: OptionalSize = None,
    temperature: OptionalFloat = None,
    output: OptionalFile = None,
    engine: EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    distributed: Flag = False,
) -> None:
    """Asks questions about long contexts, grades the answers, and shows the scores by length.

    The tasks are needles (one record of many in a text, by length and depth), MRCR (one of several answers to the same
    request in a conversation, by length and number of needles; OpenAI's format) and questions about documents (CorpusQA
    and the like). Each reads JSON lines from a file or makes a set up. A length counts the tokens of prompt and answer.

    The table goes to stdout. With --output, results.json has the settings, each answer with its score, and the table
    with 95% intervals; results.png shows it.

    Examples:
      v4-jax eval DeepSeek-V4-Flash --lengths 64K,256K,1M --output needles
      v4-jax eval DeepSeek-V4-Flash --task mrcr --data mrcr.jsonl --mode high --output mrcr
      v4-jax eval DeepSeek-V4-Flash --task questions --data corpusqa.jsonl
      v4-jax eval DeepSeek-V4-Flash --task mrcr --lengths 8K,64K --generate made-up.jsonl

    Args:
      model: A directory with a released model, or one made by convert.
      task: What is asked.
      data: JSON lines with the set; - is stdin. Default: one is made up.
      generate: Write the set that is made up to this file, and stop.
      lengths: How long the questions made up are, such as 4K,64K,1M. Default: 4K,16K.
      depths: Where needles stand, from 0 (at the beginning) to 1. Default: 0,0.25,0.5,0.75,1.
      needles: How often an MRCR conversation makes the same request. Default: 2,4,8.
      told: Records of a text with a needle, of which one is asked for. Default: 24.
      samples: Questions made up of each length, and of each depth or number of needles. Default: 8.
      seed: The same seed makes up the same questions, and samples the same answers.
      raw: Continue plain text instead of answering a chat: for base models. Needles are then those that the embedded
        model was trained on.
      no_bos: With --raw, put no begin-of-sentence token in front: for models trained without, as the embedded one.
      mode: How a chat is answered: at once, or after reasoning with little, high or the most effort.
      effort_profile: What the model takes its reasoning efforts for: preview, official (Flash-0731, Pro-0813), or auto,
        which its own encoding says.
      max_tokens: Most tokens of a reply. Default: twice the set's longest answer and 32 more; with reasoning, 32K more.
      context: Most tokens of prompt and reply together. Longer questions are skipped. Default: the model's longest.
      temperature: Sample with this temperature. Default: the best token each time (0).
      output: A directory for results.json and results.png, made if need be.
      engine: How questions are served.
      distributed: This is one of several processes, one per host, that run the same command together.
    """
    join(distributed)
    directory = ModelDirectory.open(model)
    engine.check(directory)
    config, tokenizer, defaults = directory.config, directory.tokenizer(), directory.generation_defaults()
    if no_bos and not raw:
        raise CommandError("--no-bos is for --raw; a chat always begins with that token")
    form = Form(tokenizer, None if raw else mode, directory.effort_profile(effort_profile, mode), bos=not no_bos)
    if output is not None:
        check_directory(output)
        with needs("eval"):
            import matplotlib.figure  # noqa: F401 known to be there before hours of work
    with bad_input():
        sampling = SamplingOptions(temperature=temperature or 0.0).over(defaults, seed)
    longest = config.max_position_embeddings if context is None else check_length(config, context)
    made = {"lengths": lengths, "depths": depths, "needles": needles, "told": told, "samples": samples}
    name, lines = _lines(task, data, generate, form, longest, made, seed)
    if generate is not None:
        _write_set(lines, generate)
        return
    with bad_input(f"{name}: "):
        questions = read_set(task, lines)
    with bad_input(f"{name}: "):
        asked, skipped = fitting(questions, form, longest, max_tokens)
    needed = max(len(one.encoded.ids) + one.encoded.max_tokens for one in asked)
    check_mode(form.mode, longest, form.profile)
    server = engine.build(directory, room(needed, longest), len(asked))
    started = time.perf_counter()
    with progress_bar(f"asking {len(asked)} questions", "tokens") as report:
        answers = ask(
            server,
            tokenizer,
            [one.encoded for one in asked],
            thinking_mode=form.thinking_mode,
            sampling=sampling,
            stop_ids=defaults.stop_ids,
            progress=lambda done, total: report("", done, total),
        )
    server.close()
    seconds = time.perf_counter() - started
    results = [
        Result(one.length, one.question.series, TASKS[task].grade(one.question, form.said(answer)))
        for one, answer in zip(asked, answers, strict=True)
    ]
    cells = table(results, TASKS[task].metrics)
    if output is not None and not jax.process_index():
        settings = {
            "model": str(model),
            "task": task,
            **({"data": str(data)} if data else {**_made(task, made), "seed": seed}),
            "mode": form.mode,
            "effort_profile": form.profile,
            "bos": form.bos,
            "max_tokens": max(one.encoded.max_tokens for one in asked),
            "context": longest,
            "sampling": dataclasses.asdict(sampling),
            "engine": dataclasses.asdict(engine) | {"slots": server.slots},
        }
        records = [_record(task, *each) for each in zip(asked, answers, results, strict=True)]
        found = {"settings": settings, "seconds": round(seconds, 1), "table": [cell._asdict() for cell in cells]}
        write_results(output, found | {"skipped": skipped, "questions": records}, draw(task, cells))
    show(scores_table(task, cells))
    read, replied = sum(len(one.encoded.ids) for one in asked), sum(answer.tokens for answer in answers)
    cut, failed = (sum(answer.finish == ended for answer in answers) for ended in ("length", "error"))
    say(
        f"asked {len(asked)} questions: {read:,} tokens read and {replied:,} generated in {seconds:.1f} s"
        + (f"; {cut} of the replies cut at --max-tokens" if cut else "")
        + (f"; {failed} without a reply, as {NOT_FINITE}" if failed else "")
        + (f"; {len(skipped)} of the questions skipped, longer than {format_size(longest)} tokens" if skipped else "")
    )
    if output is not None:
        say(f"wrote {output / RESULTS} and {output / PICTURE}")


def _lines(
    task: TaskName,
    data: Path | None,
    generate: Path | None,
    form: Form,
    longest: int,
    made: dict[str, Any],
    seed: int,
) -> tuple[str, list[str]]:
    """The set's name and its JSON lines."""
    given = [f"--{key}" for key, value in made.items() if value is not None]
    if data is not None:
        if given or generate is not None:
            option = given[0] if given else "--generate"
            raise CommandError(f"{option} is for a set that is made up, but --data {data} gives one")
        return "stdin" if str(data) == "-" else str(data), read_text(data).split("\n")
    if task == "chats":
        raise CommandError("no set is made up for --task chats; expected --data FILE")
    chosen = _made(task, made)
    if unknown := [option for option in given if option[2:] not in chosen]:
        legal = ", ".join(f"--{key}" for key in chosen)
        raise CommandError(f"{unknown[0]} is not for --task {task}; expected some of {legal}")
    if max(chosen["lengths"]) > longest:
        raise CommandError(
            f"--lengths: {format_size(max(chosen['lengths']))} is more than the {format_size(longest)} tokens of "
            "--context or of the model"
        )
    with bad_input("--lengths: "):
        return "the set made up", [json.dumps(line) for line in _make(task, chosen, form, seed)]


def _made(task: TaskName, made: dict[str, Any]) -> dict[str, Any]:
    """What a made-up set of a task is made by, defaults filled in."""
    own: dict[str, Any] = {"needle": {"depths": _DEPTHS, "told": _TOLD}, "mrcr": {"needles": _NEEDLES}, "questions": {}}
    defaults = {"lengths": _LENGTHS, **own[task], "samples": _SAMPLES}
    return {key: default if made[key] is None else made[key] for key, default in defaults.items()}


def _make(task: TaskName, chosen: dict[str, Any], form: Form, seed: int) -> Iterator[synthetic.Line]:
    arguments = {**chosen, "seed": seed, "count": lambda line: form.length(task, line)}
    if task == "needle":
        return synthetic.needles(**arguments, plain=form.mode is None)
    return (synthetic.conversations if task == "mrcr" else synthetic.corpora)(**arguments)


def _record(task: TaskName, one: Asked, answer: Answer, result: Result) -> dict[str, Any]:
    series = TASKS[task].series
    return {
        "id": one.question.id,
        "length": one.length,
        **({series: one.question.series} if series else {}),
        "prompt_tokens": len(one.encoded.ids),
        "reply_tokens": answer.tokens,
        "finish": answer.finish,
        "expected": list(one.question.answers),
        "answer": answer.text,
        **({"reasoning": answer.reasoning} if answer.reasoning else {}),
        "scores": result.scores,
    }


def _write_set(lines: Sequence[str], path: Path) -> None:
    if str(path) == "-":
        print("\n".join(lines))
        return
    check_output(path)
    if not jax.process_index():
        with bad_input():
            write_lines(lines, path)
    say(f"wrote {len(lines)} questions to {path}")
