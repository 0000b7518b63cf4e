"""Key-value recall: made-up texts that tell many records and ask for some of them far later.

    tree fox QZ47 river KB03 moon ... KB03 pond ... QZ

A record is a key of capital letters and a value of digits. Told again, it asks: who has read it before knows the value
once the key has passed, and nobody else does. So the accuracy on values that come again measures recall, by distance,
from nothing at all (`1 / values`) to everything. One character is one token of the byte tokenizer.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_FILLER = """
ash bay bell bird boat book bread brook cat cave clay cloud coal corn dark dawn deer door drum dust east farm fern
field fire fish fog fox frost gate glass gold grass hall hand hawk hill horn house ice iron ivy jar kite lake lamp
leaf light lily maple mill mist moon moss nest night oak oar ocean owl path pearl pine plum pond rain reed ring river
road rock roof root rose rust sail salt sand seed shell shore silk sky smoke snow song star stem stone storm sun swan
thorn tide tree vale wall wave well west wind wing wolf wood wool
"""
WORDS = _FILLER.split()

# Words by the characters that they take with a space, and the small rooms that some of them fill exactly.
_BY_SIZE = {size: [f"{word} " for word in WORDS if len(word) + 1 == size] for size in (4, 5, 6)}
_FILLED = {size for size in range(4, 31) if size != 7}

DIGITS = 2
VALUES = 10**DIGITS


class Record(NamedTuple):
    """What is told.

    Attributes:
      key: capital letters.
      value: digits.
    """

    key: str
    value: str

    def __str__(self) -> str:
        return f"{self.key}{self.value} "


class RecallQuestion(NamedTuple):
    """A text that ends where a value is due.

    Attributes:
      text: ends with a key.
      record: the one that is asked for.
      distance: characters from the record's value to the place where it is due.
    """

    text: str
    record: Record
    distance: int


def records(rng: np.random.Generator, count: int, letters: int) -> list[Record]:
    """Different keys with random values.

    Raises:
      ValueError: there are fewer keys than records.
    """
    alphabet = len(string.ascii_uppercase)
    if count > alphabet**letters:
        raise ValueError(f"{count} records need more than the {alphabet**letters} keys of {letters} letters")
    numbers = rng.choice(alphabet**letters, count, replace=False)
    keys = ["".join(string.ascii_uppercase[n // alphabet**i % alphabet] for i in range(letters)) for n in numbers]
    return [Record(key, f"{rng.integers(VALUES):0{DIGITS}}") for key in keys]


def lesson(rng: np.random.Generator, length: int, *, told: int, asked: int, letters: int = 2) -> str:
    """A text to learn from: records between words, told once in the first place and then again at random.

    Args:
      rng: what is drawn from.
      length: characters.
      told: records.
      asked: times that one is told again, each any of those told before.
      letters: of a key.
    """
    known = records(rng, told, letters)
    again = set((rng.permutation(told + asked - 1)[:asked] + 1).tolist())  # the first place is never one of them
    items, count = [], 0
    for place in range(told + asked):
        if place in again:
            items.append(str(known[rng.integers(count)]))
        else:
            items.append(str(known[count]))
            count += 1
    return _between(rng, items, length)


def question(rng: np.random.Generator, length: int, depth: float, *, told: int, letters: int = 2) -> RecallQuestion:
    """A text that asks, at its end, for one record of many.

    Args:
      rng: what is drawn from.
      length: characters.
      depth: where the record stands: 0 at the text's beginning, 1 right before the question.
      told: records, at random places apart from that one.
      letters: of a key.
    """
    wanted, *others = records(rng, told, letters)
    room = length - len(wanted.key) - len(str(wanted))
    before = round(depth * room)
    earlier = int(rng.binomial(len(others), before / room)) if room else 0
    head = _between(rng, [str(record) for record in others[:earlier]], before)
    tail = _between(rng, [str(record) for record in others[earlier:]], room - before)
    text = head + str(wanted) + tail + wanted.key
    return RecallQuestion(text, wanted, len(text) - len(head) - len(wanted.key))


def _between(rng: np.random.Generator, items: Sequence[str], length: int) -> str:
    """Items in their order at random places of a text of words, `length` characters."""
    room = length - sum(map(len, items))
    if room < 0:
        raise ValueError(f"{len(items)} records take {length - room} characters; expected at most {length}")
    words = _words(rng, room)
    # Gaps end at the end of a word, so that none is torn.
    ends = np.flatnonzero(np.frombuffer(words.encode(), np.uint8) == ord(" ")) + 1
    ends = np.concatenate([[0], ends])
    places = np.sort(rng.choice(ends, len(items)))
    pieces, last = [], 0
    for item, place in zip(items, places, strict=True):
        pieces += [words[last:place], item]
        last = place
    return "".join([*pieces, words[last:]])


def _words(rng: np.random.Generator, length: int) -> str:
    """Random words, each with a space after it, `length` characters together; spaces where no words fit."""
    left, pieces = length, []
    for i in rng.integers(len(WORDS), size=length // min(_BY_SIZE)):
        if left < 2 * sum(_BY_SIZE):
            break
        pieces.append(f"{WORDS[i]} ")
        left -= len(pieces[-1])
    while sizes := [size for size in _BY_SIZE if left == size or left - size in _FILLED]:
        fitting = _BY_SIZE[rng.choice(sizes)]
        pieces.append(fitting[rng.integers(len(fitting))])
        left -= len(pieces[-1])
    return "".join(pieces) + " " * left
