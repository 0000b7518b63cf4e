"""How long texts may get, in tokens."""

from __future__ import annotations

from v4_jax.chat import MODES, EffortProfile, Mode, effort_prefix
from v4_jax.commands.shared.console import CommandError, say
from v4_jax.commands.shared.sizes import format_size
from v4_jax.config import Config

DEFAULT_CONTEXT = 32768
DEFAULT_MAX_TOKENS = 512  # of a reply, where nothing says how long it may get
THINK_MAX_CONTEXT = 384 * 1024  # what the release advises for Think Max

_ROUND = 256


def check_length(config: Config, length: int, option: str = "--context") -> int:
    """A length that an option asks for, if the model goes so far.

    Raises:
      CommandError: it does not.
    """
    longest = config.max_position_embeddings
    if length > longest:
        raise CommandError(f"{option} {format_size(length)} is more than the model's {format_size(longest)} tokens")
    return length


def context_of(config: Config, asked: int | None) -> int:
    """The context that is asked for, or else 32K, or all of a model that has less.

    Raises:
      CommandError: the model has less than is asked for.
    """
    return min(DEFAULT_CONTEXT, config.max_position_embeddings) if asked is None else check_length(config, asked)


def check_mode(mode: Mode | None, context: int, profile: EffortProfile = "preview") -> None:
    """Warns of a context that is too short for all the reasoning that a mode's instruction asks for."""
    if mode is None or context >= THINK_MAX_CONTEXT or not effort_prefix(MODES[mode].reasoning_effort, profile):
        return
    say(
        f"warning: Think {mode.capitalize()} wants a context of at least {format_size(THINK_MAX_CONTEXT)} tokens, this "
        f"one has {format_size(context)}; reasoning may be cut short"
    )


def room(length: int, longest: int) -> int:
    """Room in a cache for texts of `length`, at most `longest`: rounded up so that similar ones share programs."""
    return min(longest, -(-length // _ROUND) * _ROUND)
