"""Sets that are read or made up, how answers are graded, and how scores are grouped."""

import json
import math
import re
import statistics

import pytest

from v4_jax.infer.evaluation import synthetic
from v4_jax.infer.evaluation.evaluation import (
    TASKS,
    Cell,
    Result,
    SetError,
    contains,
    exact,
    f1,
    interval,
    length_bin,
    match_ratio,
    read_set,
    table,
    words,
)

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


# ---- reading ---------------------------------------------------------------------------------------------------------

ASK = [{"role": "user", "content": "Write a poem about tapirs"}, {"role": "assistant", "content": "Tapir!"}]
ASK += [{"role": "user", "content": "Prepend x1 to the 1st (1 indexed) poem about tapirs."}]
MRCR = {"prompt": json.dumps(ASK), "answer": "x1Tapir!", "random_string_to_prepend": "x1", "n_needles": 2}
MRCR |= {"desired_msg_index": 1, "total_messages": 3, "n_chars": 100, "date_added": "04-12-2025"}
QUESTION = {"documents": ["One.", "Two."], "question": "Which?", "answer": "Two", "id": "q7", "length": 131072}
NEEDLE = {"text": "AB12 fox AB", "answer": "12", "depth": 0}


def test_published_format():
    """The prompt is JSON in a string; a list will do as well. More fields than are needed do no harm."""
    lines = [json.dumps(MRCR), "", json.dumps(MRCR | {"prompt": ASK})]
    one, two = read_set("mrcr", lines)
    assert (one.id, two.id) == (1, 3) and one.messages == two.messages == tuple(ASK)
    assert (one.answers, one.prefix, one.series, one.length) == (("x1Tapir!",), "x1", 2, None)
    text, stops = one.plain()
    assert text.startswith("User: Write a poem about tapirs\n\nAssistant: Tapir!\n\nUser: Prepend")
    assert text.endswith("\n\nAssistant:") and stops == ("\n\nUser:",)


def test_question_sets():
    (question,) = read_set("questions", [json.dumps(QUESTION)])
    assert (question.id, question.length, question.answers) == ("q7", 131072, ("Two",))
    (message,) = question.messages
    assert message["content"].startswith("Document 1:\nOne.\n\nDocument 2:\nTwo.\n\nQuestion: Which?\n")
    (question,) = read_set("questions", ['{"context": "One.", "question": "Which?", "answers": ["a", "b"], "id": 5}'])
    assert question.messages[0]["content"].startswith("One.\n\nQuestion") and question.id == 5


@pytest.mark.parametrize(
    ("task", "change", "sentence"),
    [
        ("mrcr", {"prompt": "[{"}, '"prompt" is not JSON'),
        ("mrcr", {"prompt": []}, r'"prompt" is \[\]'),
        ("mrcr", {"prompt": [*ASK[:1], {"role": "model"}]}, 'message 2 of "prompt" has no role out of system, user'),
        ("mrcr", {"prompt": ASK[:2]}, '"prompt" does not end with the user'),
        ("mrcr", {"n_needles": "2"}, '"n_needles" is "2"'),
        ("mrcr", {"n_needles": 0}, '"n_needles" is 0'),
        ("mrcr", {"random_string_to_prepend": None}, '"random_string_to_prepend" is null'),
        ("questions", {"context": "x"}, 'it has both "context" and "documents"'),
        ("questions", {"documents": "x"}, '"documents" is no list of texts'),
        ("questions", {"answers": ["x"]}, 'it has both "answer" and "answers"'),
        ("questions", {"answer": " "}, '"answer" is " "'),
        ("questions", {"length": "128K"}, '"length" is "128K"'),
        ("needle", {"depth": 2}, '"depth" is 2'),
        ("needle", {"prompt": ASK}, 'it has both "text" and "prompt"'),
        ("needle", {"answer": 12}, '"answer" is 12'),
    ],
)
def test_lines_that_are_no_questions(task, change, sentence):
    good = {"mrcr": MRCR, "questions": QUESTION, "needle": NEEDLE}[task]
    with pytest.raises(SetError, match=rf"^line 2 is no question: {sentence}.*; expected "):
        read_set(task, [json.dumps(good), json.dumps(good | change)])


@pytest.mark.parametrize("task", TASKS)
def test_fields_that_are_missing(task):
    good = {"mrcr": MRCR, "questions": QUESTION, "needle": NEEDLE}[task]
    read_set(task, [json.dumps(good)])
    for field in {"prompt", "n_needles", "random_string_to_prepend", "text", "depth", "documents", "question"} & {
        *good
    }:
        with pytest.raises(SetError, match=f'^line 1 is no question: .*"{field}"'):
            read_set(task, [json.dumps({key: value for key, value in good.items() if key != field})])
    with pytest.raises(SetError, match="line 1 is not JSON"):
        read_set(task, ['{"answer":'])
    with pytest.raises(SetError, match="line 1 is no question: it is a list"):
        read_set(task, ["[]"])
    with pytest.raises(SetError, match="there are no questions; expected lines with"):
        read_set(task, ["", " "])


# ---- sets that are made up: an oracle that only reads finds the answers ----------------------------------------------


def count(task):
    """Characters for tokens."""

    def of(line):
        question = TASKS[task].read(line)
        return len(question.plain()[0]) + len(question.answers[0])

    return of


def made(task, make, lengths, *arguments, **named):
    """Lines and questions, after checking their lengths."""
    lines = list(make(lengths, *arguments, count=count(task), **named))
    sizes = [count(task)(line) for line in lines]
    each = len(lines) // len(lengths)
    for i, length in enumerate(lengths):
        assert all(0.85 * length < size <= length for size in sizes[i * each : (i + 1) * each])
    return lines, read_set(task, map(json.dumps, lines))


def right(task, question, answer, wrong):
    """Whether the oracle's answer gets everything, and another one does not."""
    grade = TASKS[task].grade
    return all(value == 1 for value in grade(question, answer).values()) and grade(question, wrong)[
        TASKS[task].metrics[0]
    ] < (0.9 if task == "mrcr" else 1)


@pytest.mark.parametrize("plain", [True, False])
def test_needles_can_be_found(plain):
    lengths, depths = (2048, 8192), (0.0, 0.4, 1.0)
    given = dict(samples=3, told=12, seed=1, plain=plain)
    lines, questions = made("needle", synthetic.needles, lengths, depths, **given)
    assert [(line["length"], line["depth"]) for line in lines] == [
        (length, depth) for length in lengths for depth in depths for _ in range(3)
    ]
    for line, question in zip(lines, questions, strict=True):
        if plain:
            text, key = line["text"], line["text"].split()[-1]
            told = dict(re.findall(r"\b([A-Z]{2})(\d\d) ", text))
        else:
            text = line["prompt"][0]["content"]
            told = dict(re.findall(r"The number of the (\w+ \w+) door is (\d{7})\.", text))
            key = re.search(r"What is the number of the (.*) door\?", text)[1]
        assert len(told) == 12 and right("needle", question, told[key], "x".join(told.values()))
        assert text.index(key) / len(text) == pytest.approx(line["depth"], abs=0.35 if len(text) < 2048 else 0.15)


def test_conversations_can_be_searched():
    _, questions = made("mrcr", synthetic.conversations, (4096, 16384), (2, 8), samples=3, seed=1)
    for question in questions:
        *before, last = [message["content"] for message in question.messages]
        prefix, which, wanted = re.fullmatch(
            r"Prepend (\w{10}) to the (\d)\w\w \(1 indexed\) (.*)\. Do .*", last
        ).groups()
        answers = [reply for ask, reply in zip(before[::2], before[1::2], strict=True) if ask == f"Write a {wanted}"]
        assert len(answers) == question.series and len(set(answers)) == len(answers)
        chosen = answers.pop(int(which) - 1)
        assert right("mrcr", question, prefix + chosen, prefix + answers[0])
    lines, _ = made("mrcr", synthetic.conversations, (4096,), (4,), samples=2, seed=2)
    for line in lines:
        messages = json.loads(line["prompt"])
        assert len(messages) == line["total_messages"] and sum(len(m["content"]) for m in messages) == line["n_chars"]
        asked = messages[line["desired_msg_index"]]["content"]
        assert line["random_string_to_prepend"] + asked == line["answer"]


def test_reports_can_be_summed_up():
    lines, questions = made("questions", synthetic.corpora, (4096, 16384), samples=6, seed=1)
    for line, question in zip(lines, questions, strict=True):
        told = r"(\w+ \w+) has its seat in (\w+(?: \w+)?)\. The company employs (\d+) people\."
        firms = [re.match(told, document).groups() for document in line["documents"]]
        place = re.search(r"in (\w+(?: \w+)?)(?:\?| employ)", line["question"])
        people = [int(number) for _, where, number in firms if place and where == place[1]]
        if line["question"].startswith("How many of"):
            answer = str(len(people))
        elif place:
            answer = str(sum(people))
        else:
            answer = max(firms, key=lambda firm: int(firm[2]))[0]
        assert right("questions", question, answer, answer + "0")
    assert len({line["question"].split(" in ")[0] for line in lines}) == 3


def test_lines_do_not_depend_on_others():
    make = lambda lengths, depths, samples, seed=3: {  # noqa: E731
        (line["length"], line["depth"], line["text"])
        for line in synthetic.needles(
            lengths, depths, samples=samples, told=5, seed=seed, plain=True, count=count("needle")
        )
    }
    all_ = make((512, 1024), (0.0, 0.5), 3)
    assert len(all_) == 12 and make((1024,), (0.5,), 2) < all_ and not make((1024,), (0.5,), 2, seed=4) & all_


def test_no_room():
    arguments = dict(samples=1, seed=0)
    with pytest.raises(ValueError, match="64 tokens have no room for 24 records; expected a greater length"):
        list(synthetic.needles((64,), (0.5,), told=24, plain=True, count=count("needle"), **arguments))
    with pytest.raises(ValueError, match="256 tokens have no room for 8 needles"):
        list(synthetic.conversations((256,), (8,), count=count("mrcr"), **arguments))
    with pytest.raises(ValueError, match="128 tokens have no room for reports"):
        list(synthetic.corpora((128,), count=count("questions"), **arguments))
