"""Reasoning efforts of both generations of releases, and how a directory tells which it is of."""

import hashlib

import pytest

from v4_jax import chat
from v4_jax.chat import PROFILES, REASONING_EFFORTS, effort_prefix, protocol, read_profile
from v4_jax.chat.efforts import ENCODING
from v4_jax.chat.protocol import BOS

ASK = [{"role": "user", "content": "question"}]


@pytest.mark.parametrize(
    ("text", "size", "digest"),
    [
        (protocol.REASONING_EFFORT_MAX, 476, "f7a24f3b3050d4a8"),
        (
            protocol.REASONING_EFFORT_OFFICIAL_MAX,
            528,
            "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c",
        ),
    ],
)
def test_the_published_instructions(text, size, digest):
    assert len(text.encode()) == size and hashlib.sha256(text.encode()).hexdigest().startswith(digest)


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ("preview", {"max": protocol.REASONING_EFFORT_MAX}),
        ("official", {"high": protocol.REASONING_EFFORT_MAX, "max": protocol.REASONING_EFFORT_OFFICIAL_MAX}),
    ],
)
@pytest.mark.parametrize("effort", REASONING_EFFORTS)
def test_only_the_prefix_differs(profile, expected, effort):
    """After BOS and before the first message, in thinking mode, where there is no context."""
    prefix, options = expected.get(effort, ""), {"reasoning_effort": effort, "effort_profile": profile}
    assert effort_prefix(effort, profile) == prefix
    plain = chat.encode(ASK, thinking_mode="thinking")
    assert chat.encode(ASK, thinking_mode="thinking", **options) == BOS + prefix + plain.removeprefix(BOS)
    assert chat.encode(ASK, **options) == chat.encode(ASK)
    context = dict(context=[*ASK, {"role": "assistant", "content": "answer"}], thinking_mode="thinking")
    assert chat.encode(ASK, **context, **options) == chat.encode(ASK, **context)


def bundled(directory, text):
    (directory / ENCODING).parent.mkdir()
    (directory / ENCODING).write_text(text, encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("text", "profile"),
    [
        ('REASONING_EFFORT_MAX = (\n    "Reasoning Effort: ..."\n)\n', "preview"),
        ('REASONING_EFFORT_PROMPTS = {"high": "...", "max": "..."}\n', "official"),
        ("REASONING_EFFORT_PROMPTS: dict[str, str] = {}\n", "official"),
        ('REASONING_EFFORT_MAX = "old"\nREASONING_EFFORT_PROMPTS = {"max": REASONING_EFFORT_MAX}\n', "official"),
        ('# REASONING_EFFORT_PROMPTS = {}\nREASONING_EFFORT_MAX = "..."\n', "preview"),
        ("def f():\n    return REASONING_EFFORT_PROMPTS == 1\n", None),
        ("raise SystemExit\n", None),
    ],
)
def test_the_encoding_tells(tmp_path, text, profile):
    assert read_profile(bundled(tmp_path, text)) == profile


def test_the_encoding_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    text = f"open({str(trace)!r}, 'w').close()\nREASONING_EFFORT_PROMPTS = {{}}\n\xe9\x00("
    assert read_profile(bundled(tmp_path, text)) == "official" and not trace.exists()


def test_no_encoding_says_nothing(tmp_path):
    assert read_profile(tmp_path) is None and PROFILES == ("preview", "official")
