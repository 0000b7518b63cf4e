"""Made-up sets for `tasks`, whose answers are known because the texts were written around them.

They need no download, any length can be had, and no model has seen them in training. What is made is lines of the
formats that are read, so that a set can be looked at, kept, and asked again. A line depends on the seed, its own
length, series and number, and on nothing else in the set.
"""

from __future__ import annotations

import contextlib
import json
import string
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from v4_jax.infer.evaluation import recall

Line = dict[str, Any]
Count = Callable[[Line], int]

_CHARACTERS = 4  # of a token, to begin with
_STEPS = 12  # tries to meet a length in tokens by choosing one in characters
_CLOSE = 0.98  # of the length: near enough to stop trying

_SENTENCES = (
    "Beyond the {} lay the {}, and the {} was quiet.",
    "Nobody saw the {} that stood between the {} and the {}.",
    "In the evening the {} came down to the {} and left by the {}.",
    "The {} was older than the {}, but not as old as the {}.",
    "They carried the {} past the {} and rested near the {}.",
    "When the {} had gone, the {} and the {} remained.",
)
_FORMATS = ("poem", "short story", "riddle", "letter", "speech", "song", "news article", "blog post", "short essay")
_PLACES = ("Aldermoor", "Brindle Bay", "Castlewick", "Dunmere", "Elmstead", "Fernhollow", "Greywater", "Harrowgate")
_KINDS = ("Freight", "Foods", "Motors", "Textiles", "Tools", "Mining", "Paper", "Energy")


def needles(
    lengths: Sequence[int], depths: Sequence[float], *, samples: int, told: int, seed: int, plain: bool, count: Count
) -> Iterator[Line]:
    """Texts that tell many records and ask for one, by length and depth.

    Args:
      lengths: tokens of prompt and answer.
      depths: where the record stands: 0 at the text's beginning, 1 at its end.
      samples: questions of each length and depth.
      told: records of a text.
      seed: the same seed gives the same lines.
      plain: texts to continue, of `recall`; else chats, in sentences.
      count: tokens of a line's prompt and answer.

    Raises:
      ValueError: a length has no room for the records.
    """
    for length in lengths:
        for depth in depths:
            make = partial(_plain_needle if plain else _chat_needle, depth=depth, told=told)
            for sample in range(samples):
                key = (seed, length, round(depth * 1e6), sample)
                yield _fitted(make, key, length, count, f"{told} records") | {"length": length}


def conversations(
    lengths: Sequence[int], needles: Sequence[int], *, samples: int, seed: int, count: Count
) -> Iterator[Line]:
    """Conversations in MRCR's format, that make the same request several times and ask for one of the answers.

    Args:
      lengths: tokens of prompt and answer.
      needles: how often the request is made.
      samples: conversations of each length and number of needles.
      seed: the same seed gives the same lines.
      count: tokens of a line's prompt and answer.

    Raises:
      ValueError: a length has no room for the conversation.
    """
    for length in lengths:
        for number in needles:
            make = partial(_conversation, needles=number)
            for sample in range(samples):
                yield _fitted(make, (seed, length, number, sample), length, count, f"{number} needles")


def corpora(lengths: Sequence[int], *, samples: int, seed: int, count: Count) -> Iterator[Line]:
    """Reports on made-up companies, and questions that take all of them to answer: how many, which is the most, a sum.

    Args:
      lengths: tokens of prompt and answer.
      samples: questions of each length.
      seed: the same seed gives the same lines.
      count: tokens of a line's prompt and answer.

    Raises:
      ValueError: a length has no room for the reports.
    """
    for length in lengths:
        for sample in range(samples):
            make = partial(_corpus, kind=sample)
            yield _fitted(make, (seed, length, sample), length, count, "reports") | {"length": length}


def _fitted(make: Callable[..., Line], key: tuple[int, ...], length: int, count: Count, what: str) -> Line:
    """The line with the most tokens up to `length` that some attempts at its size in characters find."""
    size, best, most = _CHARACTERS * length, None, length // 2  # half of a length or less belongs to a shorter one
    with contextlib.suppress(ValueError):  # what has to stand in it does not fit
        for step in range(_STEPS):
            line = make(np.random.default_rng(key), size)
            tokens = count(line)
            if most < tokens <= length:
                best, most = line, tokens
            if most >= _CLOSE * length:
                break
            aim = length * (1 - step // 2 / 100)  # sentences are whole: just below may be out of reach
            size += round((aim - tokens) * size / tokens)
    if best is None:
        raise ValueError(f"{length} tokens have no room for {what}; expected a greater length")
    return best


def _plain_needle(rng: np.random.Generator, size: int, depth: float, told: int) -> Line:
    asked = recall.question(rng, size, depth, told=told)
    return {"text": asked.text, "answer": asked.record.value, "depth": depth}


def _chat_needle(rng: np.random.Generator, size: int, depth: float, told: int) -> Line:
    """Numbers of doors, each told by one sentence of many."""
    pairs = rng.choice(len(recall.WORDS) ** 2, told, replace=False)
    doors = [f"{recall.WORDS[i // len(recall.WORDS)]} {recall.WORDS[i % len(recall.WORDS)]}" for i in pairs]
    numbers = [str(number) for number in rng.integers(10**6, 10**7, told)]
    told_by = [f"The number of the {door} door is {number}." for door, number in zip(doors, numbers, strict=True)]
    begin = "Here is a text. Remember what it says of doors and their numbers.\n\n"
    end = f"\n\nWhat is the number of the {doors[0]} door? Reply with the number alone."
    room = size - len(begin) - len(end) - len(told_by[0]) - 1
    text = _prose(rng, room - sum(len(sentence) + 1 for sentence in told_by[1:]))
    ends = np.cumsum([0, *(len(sentence) + 1 for sentence in text)])
    places = [int(np.abs(ends - depth * ends[-1]).argmin()), *rng.integers(len(text) + 1, size=told - 1).tolist()]
    # From the back, so that places stay what they are.
    for place, index in sorted(zip(places, range(told), strict=True), reverse=True):
        text.insert(place, told_by[index])
    message = {"role": "user", "content": begin + " ".join(text) + end}
    return {"prompt": [message], "answer": numbers[0], "depth": depth}


def _conversation(rng: np.random.Generator, size: int, needles: int) -> Line:
    """A conversation of about `size` characters."""
    topics = rng.choice(recall.WORDS, 8, replace=False).tolist()
    requests = [(kind, topic) for kind in _FORMATS for topic in topics]
    wanted, *others = [requests[i] for i in rng.permutation(len(requests))]
    turns = max(2 * needles, size // 800)
    asked = [others[i] for i in rng.integers(len(others), size=turns)]
    places = sorted(rng.choice(turns, needles, replace=False).tolist())
    for place in places:
        asked[place] = wanted
    prefix = "".join(rng.choice(list(string.ascii_letters + string.digits), 10))
    which = int(rng.integers(needles))
    last = (
        f"Prepend {prefix} to the {_ordinal(which + 1)} (1 indexed) {wanted[0]} about the {wanted[1]}. "
        "Do not include any other text in your response."
    )
    users = [f"Write a {kind} about the {topic}" for kind, topic in asked]
    room = size - sum(map(len, users)) - len(last)
    messages = []
    for user, (_, topic) in zip(users, asked, strict=True):
        reply = " ".join(_prose(rng, room // turns, topic))
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    answer = prefix + messages[2 * places[which] + 1]["content"]
    messages.append({"role": "user", "content": last})
    return {
        "prompt": json.dumps(messages),
        "answer": answer,
        "random_string_to_prepend": prefix,
        "n_needles": needles,
        "desired_msg_index": 2 * places[which] + 1,
        "total_messages": len(messages),
        "n_chars": sum(len(message["content"]) for message in messages),
    }


def _corpus(rng: np.random.Generator, size: int, kind: int) -> Line:
    """Reports of about `size` characters together, and a question of the kind whose number is given."""
    pairs = len(recall.WORDS) * len(_KINDS)
    firms = min(max(4, size // 400), pairs)
    chosen = rng.choice(pairs, firms, replace=False)
    names = [f"{recall.WORDS[i // len(_KINDS)].capitalize()} {_KINDS[i % len(_KINDS)]}" for i in chosen]
    places = [_PLACES[i] for i in rng.integers(len(_PLACES), size=firms)]
    people = rng.choice(np.arange(100, 100 + 40 * firms), firms, replace=False).tolist()  # all different
    told = [
        f"{name} has its seat in {place}. The company employs {number} people."
        for name, place, number in zip(names, places, people, strict=True)
    ]
    room = (size - sum(map(len, told))) // firms
    documents = [f"{sentence} {' '.join(_prose(rng, room))}".rstrip() for sentence in told]
    place = places[int(rng.integers(firms))]
    there = [number for number, where in zip(people, places, strict=True) if where == place]
    question, answer = (
        (f"How many of the companies have their seat in {place}?", str(len(there))),
        ("Which company employs the most people?", names[people.index(max(people))]),
        (f"How many people do the companies with a seat in {place} employ together?", str(sum(there))),
    )[kind % 3]
    return {"documents": documents, "question": question, "answer": answer}


def _prose(rng: np.random.Generator, size: int, about: str = "") -> list[str]:
    """Sentences of `size` characters together at most, but at least one; each names `about`, if that is given."""
    if size < 0:
        raise ValueError(f"{size} characters are too few")
    sentences: list[str] = []
    left = size
    while left > 0 or not sentences:
        names = [recall.WORDS[i] for i in rng.integers(len(recall.WORDS), size=3)]
        if about:
            names[int(rng.integers(3))] = about
        sentence = _SENTENCES[int(rng.integers(len(_SENTENCES)))].format(*names)
        if sentences and len(sentence) > left:
            break
        sentences.append(sentence)
        left -= len(sentence) + 1
    return sentences


def _ordinal(number: int) -> str:
    teen = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
