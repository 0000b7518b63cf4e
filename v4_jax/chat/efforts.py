"""Reasoning efforts: what each puts in front of a conversation, which two generations of releases see differently.

The preview releases know an instruction for "max" alone. The official ones (Flash-0731, Pro-0813) give that text to
"high", and "max" one of its own. `config.json` cannot tell the two apart, but the release's own encoding can.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from v4_jax.chat import protocol

EffortProfile = Literal["preview", "official"]
PROFILES: tuple[EffortProfile, ...] = ("preview", "official")

# None is an effort too: reasoning of which nothing is said.
REASONING_EFFORTS = (None, "low", "high", "max")

Mode = Literal["non-think", "low", "high", "max"]


class ChatMode(NamedTuple):
    """How a chat is answered, in the words of `v4_jax.chat.encode`.

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

_PREFIXES: dict[EffortProfile, dict[str, str]] = {
    "preview": {"max": protocol.REASONING_EFFORT_MAX},
    "official": {"high": protocol.REASONING_EFFORT_MAX, "max": protocol.REASONING_EFFORT_OFFICIAL_MAX},
}

ENCODING = Path("encoding", "encoding_dsv4.py")  # in a release's directory
# What such a module defines, at its outermost level.
_DEFINED: dict[str, EffortProfile] = {"REASONING_EFFORT_PROMPTS": "official", "REASONING_EFFORT_MAX": "preview"}


def effort_prefix(effort: str | None, profile: EffortProfile) -> str:
    """The instruction that follows BOS in thinking mode; "" for none.

    Raises:
      ValueError: an effort or a profile that there is not.
    """
    if effort not in REASONING_EFFORTS:
        raise ValueError(f"unknown reasoning_effort {effort!r}; legal efforts are {protocol.legal(REASONING_EFFORTS)}")
    if profile not in PROFILES:
        raise ValueError(f"unknown effort_profile {profile!r}; legal profiles are {protocol.legal(PROFILES)}")
    return "" if effort is None else _PREFIXES[profile].get(effort, "")


def read_profile(directory: Path) -> EffortProfile | None:
    """What a model's directory says about its efforts, by its encoding, which is read as text and never run.

    Returns:
      None if the directory has no encoding, or one that defines neither kind of efforts.

    Raises:
      OSError: the encoding cannot be read.
    """
    file = directory / ENCODING
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    for name, profile in _DEFINED.items():
        if re.search(rf"^{name}\s*(:[^=\n]*)?=", text, re.MULTILINE):
            return profile
    return None
