"""How a set's questions become prompts, and how much room they and their replies take."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from v4_jax.chat import MODES, EffortProfile, Mode
from v4_jax.infer.evaluation.asking import Answer, EncodedQuestion
from v4_jax.infer.evaluation.grading import length_bin
from v4_jax.infer.evaluation.questions import Question
from v4_jax.infer.evaluation.tasks import TASKS
from v4_jax.infer.prompts import chat_prompt, plain_ids
from v4_jax.tokenizer import Tokenizer

_SPARE, _THOUGHT = 32, 32768  # tokens of a reply beside the answer: of politeness, and of reasoning


class Form(NamedTuple):
    """How questions become prompts.

    Attributes:
      tokenizer: the model's.
      mode: how a chat is answered; None to continue plain text.
      profile: what the model takes its reasoning efforts for.
      bos: plain text begins with the begin-of-sentence token.
    """

    tokenizer: Tokenizer
    mode: Mode | None
    profile: EffortProfile
    bos: bool

    @property
    def thinking_mode(self) -> str | None:
        """The chat encoding's; None for plain text."""
        return None if self.mode is None else MODES[self.mode].thinking_mode

    def ids(self, question: Question) -> list[int]:
        """The prompt's tokens.

        Raises:
          ValueError: a plain text is to be asked in a chat, or the chat format cannot express a message.
        """
        if self.mode is None:
            text, _ = question.plain()
            return plain_ids(self.tokenizer, text) if self.bos else self.tokenizer.encode(text)
        if question.text:
            raise ValueError("its questions are texts to continue; expected --raw")
        return chat_prompt(self.tokenizer, question.messages, self.mode, profile=self.profile).ids

    def answer_tokens(self, question: Question) -> int:
        """Tokens of the longest right answer."""
        return max(len(self.tokenizer.encode(answer)) for answer in question.answers)

    def length(self, task: str, line: dict[str, Any]) -> int:
        """Tokens of a line's prompt and answer."""
        question = TASKS[task].read(line)
        return len(self.ids(question)) + self.answer_tokens(question)

    def stops(self, question: Question) -> tuple[str, ...]:
        """Strings that end the reply."""
        return () if self.mode else question.plain()[1]

    def said(self, answer: Answer) -> str:
        """What is graded; the space that follows a plain text is not the answer's."""
        return answer.text if self.mode else answer.text.strip()


class Asked(NamedTuple):
    """A question that fits.

    Attributes:
      question: what is asked.
      encoded: the same in the model's tokens.
      length: what its score is grouped by.
    """

    question: Question
    encoded: EncodedQuestion
    length: int


def fitting(
    questions: Sequence[Question], form: Form, longest: int, max_tokens: int | None
) -> tuple[list[Asked], list[dict[str, Any]]]:
    """The questions that leave room for their answer, as prompts, and those that do not.

    Raises:
      ValueError: none fits, or one has no prompt.
    """
    answers = [form.answer_tokens(question) for question in questions]
    if max_tokens is None:
        max_tokens = 2 * max(answers) + _SPARE + (_THOUGHT if form.thinking_mode == "thinking" else 0)
    asked, skipped = [], []
    for question, answer in zip(questions, answers, strict=True):
        ids = array("i", form.ids(question))
        if len(ids) + answer > longest:
            skipped.append({"id": question.id, "tokens": len(ids) + answer})
            continue
        encoded = EncodedQuestion(ids, min(max_tokens, longest - len(ids)), form.stops(question))
        asked.append(Asked(question, encoded, question.length or length_bin(len(ids) + answer)))
    if not asked:
        shortest = min(one["tokens"] for one in skipped)
        raise ValueError(
            f"none of {len(skipped)} questions fits in {longest:,} tokens; the shortest takes {shortest:,}"
        )
    return asked, skipped
