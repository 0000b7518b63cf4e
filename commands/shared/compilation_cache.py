"""Compiled programs are kept from one command to the next, where jax keeps them: its persistent compilation cache."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import jax

from v4_jax.commands.shared.console import say
from v4_jax.commands.shared.options import file_reader, plain

DIRECTORY, THRESHOLD = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
OFF = "off"

# Seconds of compilation from which on a program is kept. jax's default, 1, leaves out some that every command needs,
# which are half a second of a small model's seven when all else is there. What is below takes no time that is felt.
_WORTH_KEEPING = 0.1

CompilationCache = Annotated[Path | None, file_reader("DIR|off"), plain]
HELP = (
    f"Where compiled programs are kept for later commands, or off. Default: {DIRECTORY} of the environment, or "
    "v4_jax/programs in the user's cache directory (XDG_CACHE_HOME, or ~/.cache)."
)


def keep_programs(chosen: Path | None) -> None:
    """Settles where compiled programs are kept, before the first is compiled; says in one line where that cannot be.

    What the environment, or a program that this runs in, has told jax already is left as it is, unless the option says
    otherwise.

    Args:
      chosen: the option; None if it was not given.
    """
    if str(chosen) == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    told = jax.config.values
    if chosen is None and not told["jax_enable_compilation_cache"]:
        return
    if chosen is None and told["jax_compilation_cache_dir"] is not None and DIRECTORY not in os.environ:
        return
    try:
        directory = str(chosen or os.environ.get(DIRECTORY, default_directory(os.environ)))
        if directory and "://" not in directory:
            _check(Path(directory))
    except (OSError, RuntimeError) as error:
        jax.config.update("jax_enable_compilation_cache", False)
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        say(f"note: compiled programs are not kept ({reason}); --compilation-cache names another directory")
        return
    jax.config.update("jax_compilation_cache_dir", directory)
    if THRESHOLD not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)


def user_directory(environment: Mapping[str, str]) -> Path:
    """What this program keeps for a user, by the XDG base directory specification, which has relative paths ignored.

    Raises:
      RuntimeError: nothing says where the user's home is.
    """
    base = Path(environment.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "v4_jax"


def default_directory(environment: Mapping[str, str]) -> Path:
    """Where compiled programs are kept, if nothing says otherwise; errors as of `user_directory`."""
    return user_directory(environment) / "programs" / _machine()


def _machine() -> str:
    """What programs for a processor depend on: machines of several kinds may share a home directory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _check(directory: Path) -> None:
    """Makes a directory, and checks that files can be made in it.

    Raises:
      OSError: they cannot.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied", str(directory))
