"""How answers are graded, and how scores are grouped."""

import math
import statistics

import pytest

from v4_jax.infer.evaluation.grading import (
    Cell,
    Result,
    contains,
    exact,
    f1,
    interval,
    length_bin,
    match_ratio,
    table,
    words,
)
from v4_jax.infer.evaluation.tasks import TASKS, read_set

# ---- graders ---------------------------------------------------------------------------------------------------------


def test_match_ratio():
    """2 x matched / both lengths, of what follows the prefix; nothing without it, were the rest perfect."""
    assert match_ratio("k3Zone two", "k3Zone two", "k3Z") == 1
    assert match_ratio("one two", "k3Zone two", "k3Z") == 0
    assert match_ratio(" k3Zone two", "k3Zone two", "k3Z") == 0
    # "bcd" is matched of "abcd" and "bcde", whose lengths are 4: 2 * 3 / 8
    assert match_ratio("Pabcd", "Pbcde", "P") == 0.75
    assert match_ratio("P", "Pbcde", "P") == 0


def test_words():
    assert words("The  Quick, (brown) fox!") == ["quick", "brown", "fox"]
    assert words("A") == ["a"] and words("the an") == ["the", "an"] and words(" .") == []
    assert words("another theme") == ["another", "theme"]


@pytest.mark.parametrize(
    ("response", "answer", "same", "inside", "overlap"),
    [
        ("The Iron Lark.", "iron lark", 1, 1, 1),
        ("It is Iron Lark", "Iron Lark", 0, 1, 2 * 2 / (4 + 2)),
        ("42", "4", 0, 0, 0),
        ("iron of lark", "iron lark", 0, 0, 2 * 2 / (3 + 2)),
        ("lark lark iron", "lark iron iron", 0, 0, 2 * 2 / 6),
        ("", "4", 0, 0, 0),
        ("B", "A", 0, 0, 0),
    ],
)
def test_answers_to_questions(response, answer, same, inside, overlap):
    assert (exact(response, answer), contains(response, answer)) == (same, inside)
    assert f1(response, answer) == pytest.approx(overlap)


def test_the_best_of_several_answers_counts():
    (question,) = read_set("questions", ['{"context": "x", "question": "y", "answers": ["twelve", "12"]}'])
    assert TASKS["questions"].grade(question, "12") == {"exact match": 1, "contained": 1, "F1": 1}


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_interval():
    """Wilson's of 8 in 10 is known: 0.4902 to 0.9433. Of none it does not end at 0; of ratios it is the normal one."""
    assert interval([1] * 8 + [0] * 2) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = interval([0] * 8)
    assert low == 0 and 0.3 < high < 0.35
    scores = [0.2, 0.4, 0.9]
    half = 1.96 * statistics.stdev(scores) / math.sqrt(3)
    assert interval(scores) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)
    low, high = interval([0.6])
    assert low < 0.2 and high > 0.9


def test_length_bins():
    assert [length_bin(n) for n in (1, 2, 3, 4095, 4096, 4097, 2**20)] == [1, 2, 4, 4096, 4096, 8192, 2**20]


def test_table():
    results = [
        Result(4096, 0.5, {"found": 1.0}),
        Result(8192, 0.5, {"found": 0.0}),
        Result(4096, 0.0, {"found": 1.0}),
        Result(4096, 0.0, {"found": 0.0}),
    ]
    cells = table(results, ["found"])
    assert [(cell.series, cell.length, cell.questions, cell.mean) for cell in cells] == [
        (0.0, 4096, 2, 0.5),
        (0.0, None, 2, 0.5),
        (0.5, 4096, 1, 1.0),
        (0.5, 8192, 1, 0.0),
        (0.5, None, 2, 0.5),
        (None, 4096, 3, 2 / 3),
        (None, 8192, 1, 0.0),
        (None, None, 4, 0.5),
    ]
    assert cells[-1] == Cell("found", None, None, 4, 0.5, *interval([1, 0, 1, 0]))
    plain = table([Result(4096, None, {"a": 1.0, "b": 0.0})], ["a", "b"])
    assert [(cell.metric, cell.length, cell.mean) for cell in plain] == [
        ("a", 4096, 1.0),
        ("a", None, 1.0),
        ("b", 4096, 0.0),
        ("b", None, 0.0),
    ]
