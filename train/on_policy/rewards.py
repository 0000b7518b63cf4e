"""Rewards: how good an answer is, by rules, by a function of one's own, or by another model that judges it.

What is looked at is what follows the reasoning; an answer that never ends its reasoning says nothing.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from v4_jax.chat.protocol import THINK_CLOSE
from v4_jax.json_text import read_json
from v4_jax.train.on_policy.rollouts import Prompt, RolloutError
from v4_jax.train.section import Section

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


class Reply(NamedTuple):
    """An answer as it is judged.

    Attributes:
      prompt: what was asked.
      text: what was said after the reasoning; "" where an answer says nothing.
      whole: all that was said.
    """

    prompt: Prompt
    text: str
    whole: str

    @classmethod
    def of(cls, prompt: Prompt, said: str, thinks: bool) -> Reply:
        """A reply.

        Args:
          prompt: what was asked.
          said: all that was said.
          thinks: whether the prompt opened a reasoning, which has to be closed.
        """
        _, closed, text = said.rpartition(THINK_CLOSE)
        return cls(prompt, text.strip() if closed or not thinks else "", said)


class _Reward(Section):
    weight: float = 1.0
    """What it counts; below 0 it is a penalty."""

    def score(self, replies: Sequence[Reply]) -> list[float]:
        """Of each reply a number, 0 to 1 of rules.

        Raises:
          RolloutError: a line lacks what the reward compares with, or nothing can judge it.
        """
        return [float(self._of(reply)) for reply in replies]

    def _of(self, reply: Reply) -> float:
        raise NotImplementedError


class _Compared(_Reward):
    field: str = "answer"
    """The field of the prompt's line to compare with; without one, the answer that its conversation ends with."""

    def wanted(self, prompt: Prompt) -> Any:
        """What the line has to compare with."""
        found = prompt.fields.get(self.field, prompt.reference)
        if found is None:
            raise RolloutError(f"{prompt.where} has no field {self.field!r}, which the reward {self.kind} needs")  # type: ignore[attr-defined]
        return found


class ExactMatch(_Compared):
    """1 for the text of the line's field."""

    kind: Literal["exact"]
    """"exact": the answer is the field's text."""
    ignore_case: bool = False
    """Whether capital and small letters are the same."""

    def _of(self, reply: Reply) -> float:
        wanted, found = str(self.wanted(reply.prompt)).strip(), reply.text
        return found.casefold() == wanted.casefold() if self.ignore_case else found == wanted


class Numeric(_Compared):
    """1 for an answer whose last number is that of the line's field."""

    kind: Literal["numeric"]
    """"numeric": the answer's last number is the field's."""
    tolerance: NonNegativeFloat = 1e-6
    """How far it may be off, as a share of the field's number, or of 1 where that is smaller."""

    def _of(self, reply: Reply) -> float:
        wanted, found = last_number(str(self.wanted(reply.prompt))), last_number(reply.text)
        if wanted is None:
            raise RolloutError(f"{reply.prompt.where} has no number in its field {self.field!r}")
        return found is not None and abs(found - wanted) <= self.tolerance * max(1.0, abs(wanted))


class Regex(_Compared):
    """1 for an answer in which a pattern is found."""

    kind: Literal["regex"]
    """"regex": a pattern is found in the answer."""
    pattern: str | None = None
    """A regular expression of Python's; without one, the field's text is one."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"it is no regular expression: {error}") from None
        return pattern

    def _of(self, reply: Reply) -> float:
        pattern = str(self.wanted(reply.prompt)) if self.pattern is None else self.pattern
        try:
            return re.search(pattern, reply.text) is not None and bool(reply.text)
        except re.error as error:
            raise RolloutError(f"{reply.prompt.where} has no regular expression in {self.field!r}: {error}") from None


class JsonSchema(_Compared):
    """1 for JSON that a schema allows."""

    kind: Literal["json_schema"]
    """"json_schema": the answer is JSON that a schema allows."""
    json_schema: dict[str, Any] | None = None
    """The schema; without one, the field holds it."""

    def _of(self, reply: Reply) -> float:
        import jsonschema

        schema = self.wanted(reply.prompt) if self.json_schema is None else self.json_schema
        try:
            value = read_json(reply.text.encode())
        except ValueError:  # a student may write anything, thousands of brackets, too
            return 0.0
        try:
            return jsonschema.validators.validator_for(schema)(schema).is_valid(value)
        except (jsonschema.exceptions.SchemaError, TypeError, AttributeError) as error:
            raise RolloutError(f"{reply.prompt.where} has no JSON schema in {self.field!r}: {error!s:.200}") from None


class PythonFunction(_Reward):
    """What a function of one's own says."""

    kind: Literal["python"]
    """"python": a function of one's own."""
    function: str
    """Its module, installed or where the command runs, and name, as in my_rewards.brevity: it takes the answer's text,
    without its reasoning, and the line's fields, and returns a number."""

    @field_validator("function")
    @classmethod
    def _imports(cls, function: str) -> str:
        _imported(function)
        return function

    def _of(self, reply: Reply) -> float:
        try:
            found = float(_imported(self.function)(reply.text, dict(reply.prompt.fields)))
        except Exception as error:  # whatever it raises
            raise RolloutError(
                f"{self.function} fails on an answer to {reply.prompt.where}: {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(found):
            raise RolloutError(f"{self.function} returns {found} for an answer to {reply.prompt.where}")
        return found


@functools.cache
def _imported(function: str) -> Callable[..., Any]:
    module, _, name = function.rpartition(".")
    sys.path.append(os.getcwd())  # last: nothing there gets in the way of what is installed
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"there is no such function: {error}") from None
    finally:
        sys.path.pop()
    if not callable(found):
        raise ValueError(f"it is a {type(found).__name__}; expected a function")
    return found


class HttpJudge(_Reward):
    """What another model says, over HTTP in OpenAI's form."""

    kind: Literal["judge"]
    """"judge": another model's, over HTTP."""
    url: str
    """Its API, as in http://localhost:8000/v1."""
    model: str
    """The model's name there."""
    prompt: str
    """What it is asked. {answer}, {text} (with reasoning), {reference} and the line's fields, such as {question}, are
    filled in. The last number of its reply counts."""
    scale: PositiveFloat = 1.0
    """What its highest mark is: numbers are divided by it, and kept between 0 and 1."""
    key: str | None = None
    """An environment variable that holds its key."""
    retries: NonNegativeInt = 5
    """How often a question is asked again that has no good reply, after twice the wait each time."""
    wait: NonNegativeFloat = 1.0
    """Seconds before the first time."""
    timeout: PositiveFloat = 120.0
    """Seconds that a reply may take."""
    parallel: PositiveInt = 16
    """Questions that are asked at the same time."""

    def score(self, replies: Sequence[Reply]) -> list[float]:
        """As for the others: several are asked at once."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self._of, replies))

    def _of(self, reply: Reply) -> float:
        fields = {**reply.prompt.fields, "answer": reply.text, "text": reply.whole, "reference": reply.prompt.reference}
        asked = re.sub(r"\{(\w+)\}", lambda match: str(fields.get(match[1], match[0])), self.prompt)
        body = {"model": self.model, "messages": [{"role": "user", "content": asked}], "temperature": 0}
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if self.key is not None:
            request.add_header("Authorization", f"Bearer {os.environ.get(self.key, '')}")
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as found:
                    content = json.load(found)["choices"][0]["message"]["content"]
                mark = last_number(str(content))
                if mark is not None:
                    return min(1.0, max(0.0, mark / self.scale))
                problem = f"its reply has no number: {content!r:.80}"
            # HTTPError and URLError are OSErrors; a reply that is cut short is none.
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                problem = f"{type(error).__name__}: {error!s:.200}"
        raise RolloutError(f"the judge at {self.url} gives no mark, after {self.retries + 1} times: {problem}")


def last_number(text: str) -> float | None:
    """The last number that is written in a text; None without any. Commas between digits are none of it."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


Reward = Annotated[
    ExactMatch | Numeric | Regex | JsonSchema | PythonFunction | HttpJudge,
    Field(discriminator="kind"),
]
