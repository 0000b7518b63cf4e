"""Sets that are made up: an oracle that only reads finds the answers."""

import json
import re

import pytest

from v4_jax.infer.evaluation import synthetic
from v4_jax.infer.evaluation.tasks import TASKS, read_set


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
