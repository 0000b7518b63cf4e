"""`v4-jax info`: what a model is and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import tyro

from v4_jax.chat import EffortProfile, read_profile
from v4_jax.checkpoint import local, open_checkpoint, run_of, url_of
from v4_jax.checkpoint.converted import MANIFEST
from v4_jax.checkpoint.released import INDEX, SINGLE
from v4_jax.checkpoint.trained import steps
from v4_jax.commands import info_report as card
from v4_jax.commands.shared.console import CommandError, bad_input, say, show
from v4_jax.commands.shared.contexts import check_length
from v4_jax.commands.shared.hints import of_model
from v4_jax.commands.shared.options import JsonFlag, OptionalSize
from v4_jax.commands.shared.sizes import parse_size
from v4_jax.config import Config

PRESETS = {
    "flash": Config.flash,
    "pro": Config.pro,
    "flash-0731": Config.flash_0731,
    "pro-0813": Config.pro_0813,
    "tiny": Config.tiny,
}

OFFICIAL = ("flash-0731", "pro-0813")  # of the presets, those whose efforts are the official ones

_DEFAULT_CONTEXT = parse_size("1M")

Subject = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL", help_behavior_hint="")]


def info(model: Subject, *, context: OptionalSize = None, as_json: JsonFlag = False) -> None:
    """Prints a model's card: layers, parameters, FLOPs per token and cache, and how they compare with DeepSeek-V3.2.

    Of a directory with weights, every tensor's header is checked; the weights themselves are not read.

    Examples:
      v4-jax info flash --context 1M
      v4-jax info DeepSeek-V4-Pro --json

    Args:
      model: A directory with a config.json, or flash, pro, flash-0731, pro-0813 or tiny.
      context: Tokens in the sequence, such as 131072, 128K or 1M. Default: 1M, or the model's most if that is less.
      as_json: Write the numbers as one JSON object.
    """
    config, path = config_of(model), Path(model)
    if weights := holds_weights(path):
        with bad_input(), open_checkpoint(path):  # which accounts for all tensors
            pass
    longest = config.max_position_embeddings
    context = min(_DEFAULT_CONTEXT, longest) if context is None else context
    check_length(config, context)
    profile = profile_of(model)
    if as_json:
        print(json.dumps(card.as_json(config, context, profile), indent=2))
    else:
        show(card.render(config, context, profile))
    if path.is_dir() and not weights:
        say(f"{model} has a config.json and no weights: nothing else was checked")


def holds_weights(path: Path) -> bool:
    """Whether there is a model with weights, or something that says it is one."""
    run = run_of(path)
    if run is not None:
        return bool(steps(run))  # none: a run that has saved nothing yet
    marks = (MANIFEST, INDEX, SINGLE)
    return bool(url_of(path)) or any((path / mark).exists() for mark in marks) or any(path.glob("*.safetensors"))


def config_of(model: str) -> Config:
    """The configuration of a directory or a preset.

    Raises:
      CommandError: there is neither of that name.
    """
    with bad_input():
        path = local(run_of(model) or Path(model))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CommandError(f"{path} has no config.json; expected the directory of a model")
        with bad_input(f"{path / 'config.json'}: "):
            return Config.from_hf(path)
    if model in PRESETS:
        return PRESETS[model]()
    raise CommandError(
        f"there is no directory {model}, nor a preset of that name; the presets are {', '.join(PRESETS)}"
        f"{of_model(Path(model))}"
    )


def profile_of(model: str) -> EffortProfile | None:
    """What a directory or a preset takes its reasoning efforts for; None if nothing says so.

    Raises:
      CommandError: the directory's encoding cannot be read.
    """
    with bad_input():
        path = local(run_of(model) or Path(model))
    if path.is_dir():
        with bad_input():
            return read_profile(path)
    return "official" if model in OFFICIAL else "preview"
