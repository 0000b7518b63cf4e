"""Asks a model many questions at once, and collects its answers."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from v4_jax.infer.chunks import Progress
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import GREEDY, Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.text import Reply, Sample
from v4_jax.tokenizer import Tokenizer


class Answer(NamedTuple):
    """What a model replied.

    Attributes:
      text: the answer, without the reasoning.
      reasoning: what it thought before.
      tokens: generated ones, a final stop token included.
      finish: "stop" (a stop token), "stop string", "length" (it was cut) or "error" (logits that are not finite).
    """

    text: str
    reasoning: str
    tokens: int
    finish: str


class EncodedQuestion(NamedTuple):
    """A question in the model's tokens.

    Attributes:
      ids: token ids, four bytes each: there may be hundreds of millions in a set.
      max_tokens: most tokens of the reply.
      stops: strings that end it.
    """

    ids: array[int]
    max_tokens: int
    stops: tuple[str, ...]


def ask(
    engine: Engine,
    tokenizer: Tokenizer,
    questions: Sequence[EncodedQuestion],
    *,
    thinking_mode: str | None,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """Answers all questions, as many at a time as the engine has slots.

    Args:
      engine: runs the model.
      tokenizer: of the same model.
      questions: none longer with its reply than a slot has room for.
      thinking_mode: of the chat format that they are in; None for plain continuation.
      sampling: how to sample; question number i uses the seed plus i.
      stop_ids: tokens that end a reply; the model's end-of-sentence token when None.
      progress: called with (tokens done, tokens in all): prompts count once they are read, and a reply that ends early
        as if it had not.

    Returns:
      The answers, in the questions' order.

    Raises:
      ValueError: a question that the engine can never serve.
    """
    asked: dict[int, EncodedQuestion] = {}  # by the request's number
    samples: dict[int, Sample] = {}  # likewise, and in the questions' order
    for index, question in enumerate(questions):
        own = dataclasses.replace(sampling, seed=(sampling.seed + index) % 2**32)
        request = Request(question.ids, question.max_tokens, own, stop_ids)
        number = engine.submit(request)
        asked[number] = question
        samples[number] = Sample(Reply(tokenizer, question.stops, thinking_mode), request.stops(engine.config))
    total = sum(len(question.ids) + question.max_tokens for question in questions)
    done = 0
    for event in engine.run():
        question, sample = asked[event.request], samples[event.request]
        done += 1 if sample.events else 1 + len(question.ids)
        sample.push(event)
        if sample.cut:
            engine.cancel(event.request)
        if sample.finish:
            done += question.max_tokens - len(sample.events)
        if progress is not None:
            progress(done, total)
    return [_answer(sample) for sample in samples.values()]


def _answer(sample: Sample) -> Answer:
    text = sample.reply.text
    finish = "stop string" if sample.reply.stopped else sample.finish or ""
    return Answer(text.get("content", ""), text.get("reasoning", ""), len(sample.events), finish)
