"""The kinds of sets that can be asked: how a line is read, how an answer is graded, and what the table has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from v4_jax.infer.evaluation.grading import grade_mrcr, grade_needle, grade_question
from v4_jax.infer.evaluation.questions import Question, read_chat, read_mrcr, read_needle, read_question

TaskName = Literal["needle", "mrcr", "questions", "chats"]


class SetError(ValueError):
    """A line that is no question of its set; the sentence says which and why."""


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


TASKS: dict[str, Task] = {
    "needle": Task(
        read_needle,
        grade_needle,
        ("found",),
        "depth",
        'either "text" or "prompt" (messages), "answer" (a text), "depth" (0 to 1) and perhaps "length" (tokens)',
    ),
    "mrcr": Task(
        read_mrcr,
        grade_mrcr,
        ("match ratio",),
        "needles",
        '"prompt" (messages, as a list or in a string), "answer" and "random_string_to_prepend" (texts) and '
        '"n_needles" (a positive number)',
    ),
    "questions": Task(
        read_question,
        grade_question,
        ("exact match", "contained", "F1"),
        "",
        'either "context" (a text) or "documents" (a list of texts), "question" (a text), either "answer" (a text) or '
        '"answers" (a list of texts) and perhaps "length" (tokens)',
    ),
    "chats": Task(
        read_chat,
        grade_question,
        ("exact match", "contained", "F1"),
        "",
        '"messages" (of which the assistant\'s last turn is left out), perhaps "answer" (a text) or "answers" (a list '
        'of texts) in its place, and perhaps "length" (tokens)',
    ),
}


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
