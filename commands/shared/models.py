"""A model directory as the verbs use it: what it is at once, its weights when everything else is known to be right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from v4_jax.cache.cache import CacheDtype
from v4_jax.chat import MODES, PROFILES, EffortProfile, Mode, effort_prefix, read_profile
from v4_jax.chat.efforts import ENCODING
from v4_jax.checkpoint import Checkpoint, load, open_checkpoint, run_of, url_of
from v4_jax.commands.shared.console import CommandError, bad_input, say, watched
from v4_jax.commands.shared.hints import of_model
from v4_jax.commands.shared.options import CacheFormat, Dtype, Profile
from v4_jax.config import Config
from v4_jax.json_files import read_object, shown
from v4_jax.placement import Place
from v4_jax.policy import PolicyName
from v4_jax.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """A released or converted directory, or a training run.

    Attributes:
      path: the directory; of a run's step, the run's; of one elsewhere, copies of all but its shards.
      checkpoint: its tensors, accounted for but not read.
    """

    path: Path
    checkpoint: Checkpoint

    @classmethod
    def open(cls, path: Path) -> ModelDirectory:
        """Opens a directory.

        Raises:
          CommandError: there is none, or it holds no model.
        """
        expected = "expected a directory that holds a released or converted model, or a training run"
        url = url_of(path)
        if path.exists() and not path.is_dir():
            raise CommandError(f"{path} is a file; {expected}")
        if url is None and not path.exists():
            unfinished = path.absolute().with_name(f".{path.name}.partial")
            hint = f" (its conversion is unfinished: {unfinished})" if unfinished.exists() else ""
            raise CommandError(f"there is no directory {path}{hint}; {expected}{of_model(path)}")
        with bad_input():
            checkpoint = open_checkpoint(path)
        for note in checkpoint.notes:
            say(f"note: {checkpoint.label}: {note}")
        return cls((checkpoint.directory if url else run_of(path)) or path, checkpoint)

    @property
    def config(self) -> Config:
        """The architecture of what the directory holds."""
        return self.checkpoint.config

    def tokenizer(self) -> Tokenizer:
        """The directory's tokenizer.

        Raises:
          CommandError: it has none that fits.
        """
        with bad_input():
            return load_tokenizer(self.path, self.config.vocab_size)

    def effort_profile(self, chosen: Profile = "auto", mode: Mode | None = None) -> EffortProfile:
        """What the model takes its reasoning efforts for: as chosen, or for "auto" as its own encoding says.

        Args:
          chosen: the option.
          mode: the only one that chats are answered in; None if requests may ask for others.

        Raises:
          CommandError: the encoding cannot be read.
        """
        if chosen != "auto":
            return chosen
        with bad_input():
            found = read_profile(self.path)
        effort = "max" if mode is None else MODES[mode].reasoning_effort
        matters = len({effort_prefix(effort, profile) for profile in PROFILES}) > 1
        if found is None and self.config.dspark_stages and matters:
            say(
                f"note: {self.path} has no {ENCODING}, and a model with DSpark stages may be of either generation: its "
                "reasoning efforts are taken for those of the preview; --effort-profile official says otherwise"
            )
        return found or "preview"

    def generation_defaults(self) -> GenerationDefaults:
        """What `generation_config.json` says; the release's defaults without one.

        Raises:
          CommandError: it cannot be read.
        """
        path = self.path / "generation_config.json"
        with bad_input():
            content = read_object(path, CommandError) if path.exists() else {}
        named = self.checkpoint.hf_config.get("eos_token_id")
        return GenerationDefaults.of(path, content, self.config, named if isinstance(named, list) else [])

    def load(self, dtype: Dtype, place: Place = Place()) -> Any:  # noqa: B008 (frozen)
        """Reads the weights, of which each process reads what its own devices hold.

        Raises:
          CommandError: they are damaged.
        """
        source = self.checkpoint
        already = source.bytes_read
        with bad_input(), watched(f"loading {self.path.name}", lambda: source.bytes_read - already, source.nbytes):
            return load(source, dtype=dtype, mesh=place.mesh, rules=place.rules)[1]


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """How a model is meant to be sampled.

    Attributes:
      temperature: 0 where sampling is off.
      top_p: see `v4_jax.infer.engine.sampling.Sampling`.
      top_k: the same.
      min_p: the same.
      stop_ids: tokens that end a text.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, path: Path, content: dict[str, Any], config: Config, stops: Sequence[Any] = ()) -> GenerationDefaults:
        """Reads a parsed `generation_config.json`; keys that do not concern sampling are left alone.

        Args:
          path: the file, for messages.
          content: what it holds.
          config: the architecture.
          stops: tokens that `config.json` lists as ends of a text, besides.
        """

        def number(key: str, default: float, most: float) -> float:
            value = content.get(key)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise CommandError(f"{path} has {key} {shown(value)}, expected a number from 0 to {most:g}")
            return value

        sampled = content.get("do_sample")
        if sampled is not None and not isinstance(sampled, bool):
            raise CommandError(f"{path} has do_sample {shown(sampled)}, expected true or false")
        temperature = 0.0 if sampled is False else number("temperature", 1.0, 100)
        found = content.get("eos_token_id")
        found = config.eos_token_id if found is None else found
        ends = [*(found if isinstance(found, list) else [found]), *stops]
        if not all(type(end) is int and 0 <= end < config.vocab_size for end in ends):
            raise CommandError(
                f"{path} has eos_token_id {shown(ends)}, expected a token id or a list of them, each below "
                f"{config.vocab_size}"
            )
        top_p, top_k, min_p = number("top_p", 1.0, 1), number("top_k", 0, 1 << 31), number("min_p", 0.0, 1)
        return cls(temperature, top_p, int(top_k), min_p, tuple(dict.fromkeys(ends)))


def cache_format(chosen: CacheFormat, policy: PolicyName) -> CacheDtype:
    """The cache's number format: as chosen, or for "auto" the one that loses nothing of what the policy computes."""
    return cast(CacheDtype, policy if chosen == "auto" else chosen)
