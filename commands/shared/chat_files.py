"""Conversations in files: a list of messages, or an object with "messages" and what else the encoding takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from v4_jax.commands.shared.console import CommandError, bad_input, read_json
from v4_jax.files import complete

_OPTIONS = ("tools", "response_format")


def read_chat(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """The messages of a file, and the options of the encoding that it sets.

    Raises:
      CommandError: it cannot be read, or holds something else.
    """
    content = read_json(path)
    options: dict[str, Any] = {}
    if isinstance(content, dict):
        if unknown := sorted(set(content) - {"messages", *_OPTIONS}):
            raise CommandError(f'{path} has the keys {unknown}; expected "messages", "tools" and "response_format"')
        options = {key: content[key] for key in _OPTIONS if key in content}
        content = content.get("messages")
    if not isinstance(content, list) or not all(isinstance(message, dict) for message in content):
        raise CommandError(f"{path} does not hold a list of messages; expected objects with a role and a content")
    for number, message in enumerate(content, 1):
        if message.get("role") == "user" and not message.get("content"):
            raise CommandError(f"{path}: message {number} of the user has no content; expected text")
    return content, options


def write_chat(path: Path, messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Writes what `read_chat` reads.

    Raises:
      CommandError: it cannot be written.
    """
    with bad_input(), complete(path) as working:
        text = json.dumps({"messages": messages, **options}, ensure_ascii=False, indent=2)
        working.write_text(text + "\n", encoding="utf-8")
