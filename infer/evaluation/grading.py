"""How right answers are: grades by MRCR's and SQuAD's definitions, and their means by length with 95% intervals."""

from __future__ import annotations

import difflib
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from v4_jax.infer.evaluation.questions import Question

# ---- grades of an answer ---------------------------------------------------------------------------------------------


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


def grade_needle(question: Question, response: str) -> dict[str, float]:
    """Whether the response has the needle's value."""
    return {"found": max(contains(response, answer) for answer in question.answers)}


def grade_mrcr(question: Question, response: str) -> dict[str, float]:
    """How much of the expected answer the response repeats; see `match_ratio`."""
    return {"match ratio": max(match_ratio(response, answer, question.prefix) for answer in question.answers)}


def grade_question(question: Question, response: str) -> dict[str, float]:
    """The response against the right answer that it is closest to, by each of the three grades."""
    graders = {"exact match": exact, "contained": contains, "F1": f1}
    return {name: max(grade(response, answer) for answer in question.answers) for name, grade in graders.items()}


# ---- means over many answers -----------------------------------------------------------------------------------------


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
