"""Questions, each from a line of a set: needles, MRCR, questions about documents, conversations to go on with.

*Needles* ask for one of many records that a text tells, by length and depth. *MRCR* (multi-round co-reference
resolution, in the format that OpenAI publishes) asks for one of several answers to the same request in a long
conversation. *Questions* are asked of documents, as in CorpusQA. *Chats* are the lines that training has, up to the
assistant's last turn. The length of a question is that of its prompt and answer together, in the model's tokens, as
MRCR counts.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

Message = dict[str, str]

_ROLES = ("system", "user", "assistant")
_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}


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


def read_needle(line: dict[str, Any]) -> Question:
    """A needle, from a line with "text" or "prompt", "answer" and "depth".

    Raises:
      ValueError: the line has something else.
    """
    depth = _number(line, "depth", float)
    if not 0 <= depth <= 1:
        raise ValueError(f'"depth" is {depth:g}')
    if ("text" in line) == ("prompt" in line):
        raise ValueError('it has both "text" and "prompt"' if "text" in line else 'it has neither "text" nor "prompt"')
    messages = _messages(line["prompt"]) if "prompt" in line else ()
    text = _text(line, "text") if "text" in line else ""
    return Question(messages, text, (_text(line, "answer"),), series=depth, length=_length(line))


def read_mrcr(line: dict[str, Any]) -> Question:
    """A question as the data set's card has it; there "prompt" is a string that holds the messages as JSON.

    Raises:
      ValueError: the line has something else.
    """
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


def read_question(line: dict[str, Any]) -> Question:
    """A question about one document or several, which stand before it in one message.

    Raises:
      ValueError: the line has something else.
    """
    if ("context" in line) == ("documents" in line):
        both = "context" in line
        raise ValueError(f'it has {"both" if both else "neither"} "context" {"and" if both else "nor"} "documents"')
    answers = _answers(line)
    documents = _texts(line["documents"], "documents") if "documents" in line else [_text(line, "context")]
    if len(documents) > 1:
        documents = [f"Document {number}:\n{document}" for number, document in enumerate(documents, 1)]
    asked = f"Question: {_text(line, 'question')}\nReply with the answer alone."
    message = {"role": "user", "content": "\n\n".join([*documents, asked])}
    return Question((message,), "", tuple(answers), length=_length(line))


def read_chat(line: dict[str, Any]) -> Question:
    """A conversation up to the assistant's last turn, as training has it: right is the line's answer, or that turn.

    Raises:
      ValueError: the line has something else.
    """
    messages = _field(line, "messages")
    end = len(messages) if isinstance(messages, list) else 0
    while end and isinstance(messages[end - 1], dict) and messages[end - 1].get("role") == "assistant":
        end -= 1
    if "answer" in line or "answers" in line or end == 0 or end == len(messages):
        answers = _answers(line)
    else:
        answers = [_text(messages[-1], "content")]
    asked = messages[:end] if isinstance(messages, list) else messages
    return Question(_messages(asked, "messages"), "", tuple(answers), length=_length(line))


def _answers(line: dict[str, Any]) -> list[str]:
    if ("answer" in line) == ("answers" in line):
        both = "answer" in line
        raise ValueError(f'it has {"both" if both else "neither"} "answer" {"and" if both else "nor"} "answers"')
    return _texts(line["answers"], "answers") if "answers" in line else [_text(line, "answer")]


def _texts(values: Any, key: str) -> list[str]:
    if not isinstance(values, list) or not values or not all(isinstance(x, str) and x.strip() for x in values):
        raise ValueError(f'"{key}" is no list of texts')
    return values


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


def _messages(value: Any, key: str = "prompt") -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{key}" is {_shown(value)}')
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f'message {number} of "{key}" has no role out of {", ".join(_ROLES)}')
        if not isinstance(message.get("content"), str):
            raise ValueError(f'message {number} of "{key}" has no content')
    if value[-1]["role"] != "user":
        raise ValueError(f'"{key}" does not end with the user')
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."
