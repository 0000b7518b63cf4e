"""Supervised fine-tuning: the objective of pretraining, on what the assistant says and on nothing else.

What that is comes from the chat encoding (`v4_jax.chat.encode_pieces`), which writes the text: no text is searched. An
answer is learnt in the text in which the model will be asked for it. In thinking mode without tools the encoding
leaves out the reasoning before the last question, so that a conversation of several questions is several texts: one
up to each answer, in which only what no earlier one had is learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from v4_jax.chat import MODES, EffortProfile, Mode, Piece, encode_pieces


class Span(NamedTuple):
    """A part of a text that is learnt, or that is not.

    Attributes:
      text: not empty.
      trained: whether the model is to write it.
    """

    text: str
    trained: bool


@dataclasses.dataclass(frozen=True)
class Conversations:
    """How conversations become texts.

    Attributes:
      mode: of those that name none; None for "high" where an answer has reasoning, and "non-think" elsewhere.
      profile: what the model takes its efforts for.
    """

    mode: Mode | None = None
    profile: EffortProfile = "preview"

    def texts(self, conversation: Mapping[str, Any]) -> list[list[Span]]:
        """The texts of a conversation, each as spans of which neighbours differ in `trained`.

        Args:
          conversation: `messages` in OpenAI's form, as `v4_jax.chat.encode` takes them, of which an assistant message
            with `weight` 0 is read and not learnt; perhaps `tools`, `response_format` and `mode`. Other fields say
            nothing.

        Raises:
          ValueError: the chat format cannot express it, or there is nothing to learn in it.
        """
        messages = conversation.get("messages")
        if not isinstance(messages, list):
            raise ValueError(f"messages is {messages!r:.40}; expected a list of messages")
        answers = [i for i, message in enumerate(messages) if _role(message) == "assistant"]
        weights = [_weight(messages[i], i) for i in answers]
        if not any(weights):
            weighted = " with a weight other than 0" if weights else ""
            raise ValueError(f"there is no assistant message{weighted}; expected one to learn")
        thinking_mode, effort = MODES[self.mode_of(conversation, [messages[i] for i in answers])]

        found: list[tuple[int, str, list[Piece]]] = []  # the first answer to learn in a text, the text, its pieces
        learnt = 0
        for end in _ends(messages, answers, thinking_mode == "thinking" and not conversation.get("tools")):
            pieces = encode_pieces(
                messages[: end + 1],
                thinking_mode=thinking_mode,
                reasoning_effort=effort,
                effort_profile=self.profile,
                tools=conversation.get("tools"),
                response_format=conversation.get("response_format"),
            )
            text, first = "".join(piece.text for piece in pieces), learnt
            if found and text.startswith(found[-1][1]):  # the same up to here: one text is enough for both
                first = found.pop()[0]
            found.append((first, text, pieces))
            learnt = sum(piece.role == "assistant" for piece in pieces)
        texts = [_spans(pieces, [i >= first and w for i, w in enumerate(weights)]) for first, _, pieces in found]
        return [spans for spans in texts if any(span.trained for span in spans)]

    def mode_of(self, conversation: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> Mode:
        """How a conversation is answered, of which these answers are known.

        Raises:
          ValueError: there is no such mode.
        """
        mode = conversation.get("mode") or self.mode
        if mode is None:
            return "high" if any(answer.get("reasoning_content") for answer in answers) else "non-think"
        if mode not in tuple(MODES):
            raise ValueError(f"mode is {mode!r}; legal modes are {', '.join(map(repr, MODES))}")
        return mode


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _weight(message: Mapping[str, Any], place: int) -> bool:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"message {place} has weight {weight!r}; legal weights are 0 and 1")
    return weight != 0


def _ends(messages: Sequence[Any], answers: Sequence[int], forgets: bool) -> list[int]:
    """Answers up to which a text may differ from that of the whole: none but the last, once all reasoning stays."""
    if not forgets:
        return [answers[-1]]
    with_tools = (i for i, message in enumerate(messages) if isinstance(message, Mapping) and message.get("tools"))
    stays = next(with_tools, len(messages))
    return [i for i in answers if i < stays or i == answers[-1]]


def _spans(pieces: Sequence[Piece], learnt: Sequence[bool]) -> list[Span]:
    """Joins pieces; `learnt` is of each answer."""
    flags, spans = iter(learnt), list[Span]()
    for role, text in pieces:
        trained = role == "assistant" and next(flags)
        if spans and spans[-1].trained == trained:
            spans[-1] = Span(spans[-1].text + text, trained)
        elif text:
            spans.append(Span(text, trained))
    return spans
