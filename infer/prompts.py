"""What a model reads, in its tokens: a plain text to continue, or a chat in the release's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from v4_jax import chat
from v4_jax.tokenizer import Tokenizer

Mode = Literal["non-think", "low", "high", "max"]


class ChatMode(NamedTuple):
    """How a chat is answered, in the words of the chat encoding (`v4_jax.chat.encode`).

    Attributes:
      thinking_mode: "chat", or "thinking" to reason before the answer.
      reasoning_effort: how much; None for no reasoning.
    """

    thinking_mode: str
    reasoning_effort: str | None


# How the release answers a chat.
MODES: dict[Mode, ChatMode] = {
    "non-think": ChatMode("chat", None),
    "low": ChatMode("thinking", "low"),
    "high": ChatMode("thinking", "high"),
    "max": ChatMode("thinking", "max"),
}


class Prompt(NamedTuple):
    """What the model reads.

    Attributes:
      ids: token ids.
      thinking_mode: of the chat format that they are in; None for plain text.
      opening: tokens that the answer begins with, after any reasoning.
    """

    ids: list[int]
    thinking_mode: str | None = None
    opening: Sequence[int] = ()


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text to continue, which begin with the begin-of-sentence token in any case."""
    ids = tokenizer.encode(text)
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    mode: Mode,
    *,
    profile: chat.EffortProfile = "preview",
    opening: Sequence[int] = (),
    **options: Any,
) -> Prompt:
    """A chat to answer.

    Args:
      tokenizer: the model's.
      messages: the last one is to be answered.
      mode: how.
      profile: what the model takes its efforts for.
      opening: tokens that the answer begins with, after any reasoning.
      options: "tools" and "response_format", as in `v4_jax.chat.encode`.

    Raises:
      ValueError: the chat format cannot express a message.
    """
    thinking_mode, effort = MODES[mode]
    how = {"thinking_mode": thinking_mode, "reasoning_effort": effort, "effort_profile": profile}
    text = chat.encode(messages, **how, **options)  # type: ignore[arg-type]
    return Prompt(tokenizer.encode(text), thinking_mode, opening)
