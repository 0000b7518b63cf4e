"""Evaluation at length: questions over long contexts from JSON lines, what a model answers, and how right that is.

Three kinds of sets. *Needles* ask for one of many records that a text tells, by length and depth. *MRCR* (multi-round
co-reference resolution, in the format that OpenAI publishes) asks for one of several answers to the same request in a
long conversation. *Questions* are asked of documents, as in CorpusQA. The length of a question is that of its prompt
and answer together, in the model's tokens, as MRCR counts.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import string
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from v4_jax.infer.chunks import Progress
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import GREEDY, Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.text import Reply, Sample
from v4_jax.tokenizer import Tokenizer

TaskName = Literal["needle", "mrcr", "questions"]
Message = dict[str, str]

_ROLES = ("system", "user", "assistant")
_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}


class SetError(ValueError):
    """A line that is no question of its set; the sentence says which and why."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, and what would be right.

    Attributes:
      messages: a chat that ends with the user; empty where `text` is to be continued.
      text: a text that ends where the answer is due; "" where there are messages.
      answers: each of them is right.
      prefix: what the answer must begin with (MRCR).
      series: what scores are grouped by besides the length: the needle's depth, the number of needles.
      length: tokens, where the set says so; else they are counted.
      id: the line's "id", or its number.
    """

    messages: tuple[Message, ...]
    text: str
    answers: tuple[str, ...]
    prefix: str = ""
    series: float | None = None
    length: int | None = None
    id: Any = None

    def plain(self) -> tuple[str, tuple[str, ...]]:
        """The question as a text to continue, and the strings that end the continuation."""
        if self.text:
            return self.text, (" ", "\n")
        lines = [f"{_SPEAKERS[message['role']]}: {message['content']}" for message in self.messages]
        return "\n\n".join([*lines, "Assistant:"]), ("\n\nUser:",)


class Task(NamedTuple):
    """A kind of set.

    Attributes:
      read: a question from a line's object; raises ValueError.
      grade: the scores, 0 to 1, of a question's answer.
      metrics: their names, the leading one first.
      series: what scores are grouped by besides the length; "" for nothing.
      fields: what a line has, for the reader.
    """

    read: Callable[[dict[str, Any]], Question]
    grade: Callable[[Question, str], dict[str, float]]
    metrics: tuple[str, ...]
    series: str
    fields: str


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_set(name: TaskName, lines: Iterable[str]) -> list[Question]:
    """Reads and checks a whole set, so that a bad line shows before hours of work, not after.

    Args:
      name: which kind it is.
      lines: JSON lines; empty ones are skipped.

    Raises:
      SetError: a line that is no question, or there is none.
    """
    task, questions = TASKS[name], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError(f"it is a {type(content).__name__}")
            question = task.read(content)
        except json.JSONDecodeError as error:
            raise SetError(f"line {number} is not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise SetError(f"line {number} is nested too deeply to be read") from None
        except ValueError as error:
            raise SetError(f"line {number} is no question: {error}; expected {task.fields}") from None
        questions.append(dataclasses.replace(question, id=content.get("id", number)))
    if not questions:
        raise SetError(f"there are no questions; expected lines with {task.fields}")
    return questions


def _read_needle(line: dict[str, Any]) -> Question:
    depth = _number(line, "depth", float)
    if not 0 <= depth <= 1:
        raise ValueError(f'"depth" is {depth:g}')
    if ("text" in line) == ("prompt" in line):
        raise ValueError('it has both "text" and "prompt"' if "text" in line else 'it has neither "text" nor "prompt"')
    messages = _messages(line["prompt"]) if "prompt" in line else ()
    text = _text(line, "text") if "text" in line else ""
    return Question(messages, text, (_text(line, "answer"),), series=depth, length=_length(line))


def _read_mrcr(line: dict[str, Any]) -> Question:
    """As the data set's card has it; there "prompt" is a string that holds the messages as JSON."""
    prompt = _field(line, "prompt")
    if isinstance(prompt, str):
        try:
            prompt = json.loads(prompt)
        except json.JSONDecodeError as error:
            raise ValueError(f'"prompt" is not JSON ({error.msg} at column {error.colno})') from None
    needles = _number(line, "n_needles", int)
    if needles < 1:
        raise ValueError(f'"n_needles" is {needles}')
    prefix = _text(line, "random_string_to_prepend")
    return Question(_messages(prompt), "", (_text(line, "answer"),), prefix, float(needles))


def _read_question(line: dict[str, Any]) -> Question:
    if ("context" in line) == ("documents" in line):
        both = "context" in line
        raise ValueError(f'it has {"both" if both else "neither"} "context" {"and" if both else "nor"} "documents"')
    if ("answer" in line) == ("answers" in line):
        both = "answer" in line
        raise ValueError(f'it has {"both" if both else "neither"} "answer" {"and" if both else "nor"} "answers"')
    documents = line["documents"] if "documents" in line else [_text(line, "context")]
    answers = line["answers"] if "answers" in line else [_text(line, "answer")]
    for key, values in (("documents", documents), ("answers", answers)):
        if not isinstance(values, list) or not values or not all(isinstance(x, str) and x.strip() for x in values):
            raise ValueError(f'"{key}" is no list of texts')
    if len(documents) > 1:
        documents = [f"Document {number}:\n{document}" for number, document in enumerate(documents, 1)]
    asked = f"Question: {_text(line, 'question')}\nReply with the answer alone."
    message = {"role": "user", "content": "\n\n".join([*documents, asked])}
    return Question((message,), "", tuple(answers), length=_length(line))


def _field(line: dict[str, Any], key: str) -> Any:
    if key not in line:
        raise ValueError(f'it has no "{key}"')
    return line[key]


def _text(line: dict[str, Any], key: str) -> str:
    value = _field(line, key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{key}" is {_shown(value)}')
    return value


def _number(line: dict[str, Any], key: str, kind: type[int] | type[float]) -> Any:
    value = _field(line, key)
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise ValueError(f'"{key}" is {_shown(value)}')
    return kind(value)


def _length(line: dict[str, Any]) -> int | None:
    if line.get("length") is None:
        return None
    length = _number(line, "length", int)
    if length < 1:
        raise ValueError(f'"length" is {length}')
    return length


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'"prompt" is {_shown(value)}')
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f'message {number} of "prompt" has no role out of {", ".join(_ROLES)}')
        if not isinstance(message.get("content"), str):
            raise ValueError(f'message {number} of "prompt" has no content')
    if value[-1]["role"] != "user":
        raise ValueError('"prompt" does not end with the user')
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."


# ---- grading ---------------------------------------------------------------------------------------------------------


def match_ratio(response: str, answer: str, prefix: str) -> float:
    """MRCR's grade, as the data set's card defines it: 0 without the prefix, else how much of the answer is matched."""
    if not response.startswith(prefix):
        return 0.0
    matcher = difflib.SequenceMatcher(None, response.removeprefix(prefix), answer.removeprefix(prefix))
    return float(matcher.ratio())


def words(text: str) -> list[str]:
    """A text's words as SQuAD compares them: in lower case, without punctuation and articles.

    A text that is nothing but articles keeps them: "A" can be an answer.
    """
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split() or kept.split()


def exact(response: str, answer: str) -> float:
    """Whether both are the same words."""
    return float(words(response) == words(answer))


def contains(response: str, answer: str) -> float:
    """Whether the answer's words stand in the response, next to each other: "4" is not in "42"."""
    said, due = words(response), words(answer)
    return float(bool(due) and any(said[i : i + len(due)] == due for i in range(len(said) - len(due) + 1)))


def f1(response: str, answer: str) -> float:
    """SQuAD's F1: the harmonic mean of how many words of one are in the other, each counted as often as it occurs."""
    said, due = words(response), words(answer)
    if not said or not due:
        return float(said == due)
    shared = (Counter(said) & Counter(due)).total()
    return 2 * shared / (len(said) + len(due))


def _grade_needle(question: Question, response: str) -> dict[str, float]:
    return {"found": max(contains(response, answer) for answer in question.answers)}


def _grade_mrcr(question: Question, response: str) -> dict[str, float]:
    return {"match ratio": max(match_ratio(response, answer, question.prefix) for answer in question.answers)}


def _grade_question(question: Question, response: str) -> dict[str, float]:
    graders = {"exact match": exact, "contained": contains, "F1": f1}
    return {name: max(grade(response, answer) for answer in question.answers) for name, grade in graders.items()}


TASKS: dict[str, Task] = {
    "needle": Task(
        _read_needle,
        _grade_needle,
        ("found",),
        "depth",
        'either "text" or "prompt" (messages), "answer" (a text), "depth" (0 to 1) and perhaps "length" (tokens)',
    ),
    "mrcr": Task(
        _read_mrcr,
        _grade_mrcr,
        ("match ratio",),
        "needles",
        '"prompt" (messages, as a list or in a string), "answer" and "random_string_to_prepend" (texts) and '
        '"n_needles" (a positive number)',
    ),
    "questions": Task(
        _read_question,
        _grade_question,
        ("exact match", "contained", "F1"),
        "",
        'either "context" (a text) or "documents" (a list of texts), "question" (a text), either "answer" (a text) or '
        '"answers" (a list of texts) and perhaps "length" (tokens)',
    ),
}


# ---- asking ----------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a model replied.

    Attributes:
      text: the answer, without the reasoning.
      reasoning: what it thought before.
      tokens: generated ones, a final stop token included.
      finish: "stop" (a stop token), "stop string" or "length" (it was cut).
    """

    text: str
    reasoning: str
    tokens: int
    finish: str


class Prompt(NamedTuple):
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
    prompts: Sequence[Prompt],
    *,
    thinking_mode: str | None,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """Answers all prompts, as many at a time as the engine has slots.

    Args:
      engine: runs the model.
      tokenizer: of the same model.
      prompts: none longer with its reply than a slot has room for.
      thinking_mode: the chat prompts'; None for plain continuation.
      sampling: how to sample; prompt number i uses the seed plus i.
      stop_ids: tokens that end a reply; the model's end-of-sentence token when None.
      progress: called with (tokens done, tokens in all): prompts count once they are read, and a reply that ends early
        as if it had not.

    Raises:
      ValueError: a prompt that the engine can never serve.
    """
    samples: dict[int, tuple[Prompt, Sample]] = {}  # in the prompts' order
    for index, prompt in enumerate(prompts):
        own = dataclasses.replace(sampling, seed=(sampling.seed + index) % 2**32)
        request = Request(prompt.ids, prompt.max_tokens, own, stop_ids)
        sample = Sample(Reply(tokenizer, prompt.stops, thinking_mode), request.stops(engine.config))
        samples[engine.submit(request)] = prompt, sample
    total, done = sum(len(prompt.ids) + prompt.max_tokens for prompt in prompts), 0
    for event in engine.run():
        prompt, sample = samples[event.request]
        done += 1 if sample.events else 1 + len(prompt.ids)
        sample.push(event)
        if sample.cut:
            engine.cancel(event.request)
        if sample.finish:
            done += prompt.max_tokens - len(sample.events)
        if progress is not None:
            progress(done, total)
    return [_answer(sample) for _, sample in samples.values()]


def _answer(sample: Sample) -> Answer:
    text, finish = sample.reply.text, "stop string" if sample.reply.stopped else sample.finish or ""
    return Answer(text.get("content", ""), text.get("reasoning", ""), len(sample.events), finish)


# ---- grouping --------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """A graded answer: its place in the table and its scores by metric."""

    length: int
    series: float | None
    scores: dict[str, float]


class Cell(NamedTuple):
    """A mean over the answers of one length and series.

    Attributes:
      metric: which score.
      length: tokens at most; None for all lengths.
      series: depth or number of needles; None for all.
      questions: how many it is the mean of.
      mean: of their scores.
      low: with 95% confidence; see `interval`.
      high: the other end.
    """

    metric: str
    length: int | None
    series: float | None
    questions: int
    mean: float
    low: float
    high: float


def length_bin(tokens: int) -> int:
    """The power of two that a length is counted under: the smallest that is no less."""
    return 1 << max(tokens - 1, 0).bit_length()


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """Where the mean of more such scores would be, with 95% confidence.

    Of scores that are all 0 or 1, and of a single one, it is Wilson's interval, which says something even where all are
    the same; of others the normal one, mean +- 1.96 standard errors. Never beyond [0, 1].
    """
    z, n = 1.959964, len(scores)
    mean = math.fsum(scores) / n
    if n == 1 or all(score in (0, 1) for score in scores):
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    else:
        centre = mean
        half = z * math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (n - 1) / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def table(results: Sequence[Result], metrics: Sequence[str]) -> list[Cell]:
    """The cells that have answers, by metric, series and length in their order, means over all of an axis last."""
    found = []
    lengths: list[int | None] = [*sorted({result.length for result in results}), None]
    series: list[float | None] = [*sorted({result.series for result in results if result.series is not None}), None]
    for metric in metrics:
        for one in series:
            for length in lengths:
                scores = [
                    result.scores[metric]
                    for result in results
                    if (length is None or result.length == length) and (one is None or result.series == one)
                ]
                if scores:
                    mean = math.fsum(scores) / len(scores)
                    found.append(Cell(metric, length, one, len(scores), mean, *interval(scores)))
    return found
