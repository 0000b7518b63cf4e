"""What a model reads, in its tokens: a plain text to continue, or a chat in the release's format."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from v4_jax import chat
from v4_jax.chat import MODES, Mode
from v4_jax.infer.conversation import check_tools, read_messages
from v4_jax.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """What the model reads.

    Attributes:
      ids: token ids.
      thinking_mode: what the model goes on with, in the chat format's words: "thinking" with its reasoning, "chat" with
        its answer; None for plain text.
      opening: tokens that the answer begins with, after any reasoning.
      begun: whether its first token was put in front of what was given.
    """

    ids: list[int]
    thinking_mode: str | None = None
    opening: Sequence[int] = ()
    begun: bool = False


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text to continue, which begin with the begin-of-sentence token in any case."""
    ids = tokenizer.encode(text)
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def plain_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """A text to continue."""
    begun = not text.startswith(tokenizer.decode([tokenizer.bos_id]))
    return Prompt(plain_ids(tokenizer, text), begun=begun)


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    mode: Mode,
    *,
    profile: chat.EffortProfile = "preview",
    opening: Sequence[int] = (),
    continues: bool | None = None,
    **options: Any,
) -> Prompt:
    """A chat to answer; one whose last message is the assistant's, to continue.

    Args:
      tokenizer: the model's.
      messages: as a client sends them; see `v4_jax.infer.conversation`.
      mode: how.
      profile: what the model takes its efforts for.
      opening: tokens that the answer begins with, after any reasoning.
      continues: whether the last message is to be continued; None if it is the assistant's.
      options: "tools", "response_format" and "drop_thinking", as in `v4_jax.chat.encode`.

    Raises:
      ValueError: the chat format cannot express a message.
    """
    if not messages:
        raise ValueError("there are no messages; expected at least one")
    check_tools(options.get("tools"))
    read = read_messages(messages, continues=continues)
    thinking_mode, effort = MODES[mode]
    encode = functools.partial(
        chat.encode,
        thinking_mode=thinking_mode,
        reasoning_effort=effort,
        effort_profile=profile,
        **options,
    )
    last = read.pop() if read[-1].get("wo_eos") else None
    before = read or [{"role": "system", "content": ""}]
    text = encode(before)
    if before[-1]["role"] == "system":
        text += chat.open_answer(thinking_mode == "thinking")
    if last is not None:  # whose reasoning is over
        text, thinking_mode = text + encode([last], context=before), "chat"
    return Prompt(tokenizer.encode(text), thinking_mode, opening)
