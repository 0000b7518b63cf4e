"""The engine of a command that serves many requests: its options, and how much its cache takes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax

from v4_jax.cache.entries import ENTRY_RATIOS
from v4_jax.commands.shared.console import CommandError, bad_input, say, working
from v4_jax.commands.shared.devices import enough_threads, names_mesh, place
from v4_jax.commands.shared.models import ModelDirectory, cache_format
from v4_jax.commands.shared.options import (
    CacheFormat,
    Count,
    Draft,
    Dtype,
    Flag,
    OptionalCount,
    OptionalFile,
    OptionalSize,
    OptionalText,
    Size,
    SizeOrZero,
    WindowsKept,
)
from v4_jax.commands.shared.sizes import format_size
from v4_jax.infer.checks import check_precision
from v4_jax.infer.engine.drafters import choose_drafter
from v4_jax.infer.engine.page_table import pages_within
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.engine.speculative import Acceptance
from v4_jax.infer.prefix_cache.cache import PrefixCacheOptions
from v4_jax.policy import PolicyName
from v4_jax.sharding.axes import Preset

DEFAULT_SLOTS = 8


@dataclasses.dataclass(frozen=True)
class PrefixOptions:
    """What is kept of prompts and answers for later prompts that begin alike.

    Attributes:
      prefix_memory: Bytes of the host's memory to keep the cache of earlier texts in, so that prompts that begin as
        they did are read from where they differ on.
      prefix_windows: From where on a text can be gone on with: full, any multiple of 128 tokens; a number of tokens,
        its multiples, in less room; none, in an eighth of the room, but some tokens for each layer are read again.
      prefix_directory: Where to keep it across restarts, besides.
      prefix_disk: Bytes of that directory.
    """

    prefix_memory: SizeOrZero = 0
    prefix_windows: WindowsKept = "full"
    prefix_directory: OptionalFile = None
    prefix_disk: Size = 64 << 30

    def resolve(self) -> PrefixCacheOptions | None:
        """The same for the engine; None if nothing is kept.

        Raises:
          CommandError: tokens that are no multiple of 128, or a file in place of the directory.
        """
        if not self.prefix_memory and self.prefix_directory is None:
            return None
        if self.prefix_directory is not None and self.prefix_directory.is_file():
            raise CommandError(
                f"--prefix-directory {self.prefix_directory} is a file; expected a directory, or none yet"
            )
        with bad_input("--prefix-windows: "):
            return PrefixCacheOptions(self.prefix_memory, self.prefix_windows, self.prefix_directory, self.prefix_disk)


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How requests are served.

    Attributes:
      slots: Answers that are generated at the same time. Default: 8.
      memory: Bytes of each device for the cache, such as 8G. What slots do not need makes pages of 128 tokens, of which
        an answer takes as many as its prompt and its longest continuation fill. Default: pages for all slots at their
        longest.
      dtype: How weights are held: as released, or expanded.
      policy: Precision of the computation; released is bfloat16 with the release's rounding of keys and values.
      cache_dtype: Number format of the cache; auto is the policy's.
      prefill_chunk: Prompt tokens read between two steps of generation; with a mesh, rounded up to what splits evenly.
      draft: What guesses tokens ahead in every step: none; mtp:N, N tokens, up to 4, by the multi-token-prediction
        block; dspark; or auto, what the model has. The answers are those of none, sooner.
      verify_all: Check every draft of dspark. Otherwise, while several answers are under way, only those are checked
        that are worth their place by its own confidence, and the last bits of an answer depend on its company.
      prefix: What is kept of prompts and answers.
      mesh: How to spread the model over all devices: sizes of data, seq, expert and tensor, such as seq=4,expert=2;
        one, for one device; or auto, the best that fits, which is the default.
      preset: Which mesh axes split what; long-context splits long prompts over all axes but data.
    """

    slots: OptionalCount = None
    memory: OptionalSize = None
    dtype: Dtype = "native"
    policy: PolicyName = "bfloat16"
    cache_dtype: CacheFormat = "auto"
    prefill_chunk: Count = 512
    draft: Draft = "none"
    verify_all: Flag = False
    prefix: PrefixOptions = PrefixOptions()
    mesh: OptionalText = None
    preset: Preset = "long-context"

    def check(self, directory: ModelDirectory) -> None:
        """Checks what can be known before anything is loaded.

        Raises:
          CommandError: precision or draft that do not go with the model, or settings of the prefix cache.
        """
        self.prefix.resolve()
        with bad_input():
            check_precision(directory.config, self.policy, cache_format(self.cache_dtype, self.policy))
            choose_drafter(directory.config, self.draft)

    def build(self, directory: ModelDirectory, length: int, most: int, kind: Callable[..., Engine] = Engine) -> Engine:
        """Settles mesh and slots, says what the cache takes, reads the weights and compiles.

        Args:
          directory: the model.
          length: tokens that a slot has room for.
          most: slots that could be of use, where nothing else says how many.
          kind: makes the engine.

        Raises:
          CommandError: no such mesh can be made, the cache does not fit, or the weights are damaged.
        """
        config, cache = directory.config, cache_format(self.cache_dtype, self.policy)
        # Any number of rows that is a multiple of the devices splits over them; how many there are is settled after it.
        if names_mesh(self.mesh):
            enough_threads()
        rows = self.slots or (jax.device_count() if names_mesh(self.mesh) else min(most, DEFAULT_SLOTS))
        spot = place(config, self.mesh, self.preset, batch=rows, dtype=self.dtype, context=length, cache=cache)
        slots = self.slots or -(-min(most, DEFAULT_SLOTS) // spot.row_shards) * spot.row_shards
        pages = slots * spot.pages(length)
        if self.memory is not None:
            with bad_input():
                pages = pages_within(config, slots, length, cache, self.memory, spot)
        sizes = spot.cache_shapes(config, slots, length, cache, pages=pages).nbytes()
        say(describe_cache(slots, length, pages, spot.page, sizes))
        params = directory.load(self.dtype, spot)
        with bad_input():
            engine = kind(
                config,
                params,
                slots=slots,
                max_length=length,
                pages=pages,
                policy=self.policy,
                cache_dtype=cache,
                prefill_chunk=self.prefill_chunk,
                draft=self.draft,
                verify_all=self.verify_all,
                prefix_cache=self.prefix.resolve(),
                place=spot,
            )
        compile_engine(engine)
        return engine


def compile_engine(engine: Engine) -> float:
    """Compiles its programs, and says so meanwhile. Returns the seconds that it took."""
    started = time.perf_counter()
    with working("compiling"):
        engine.compile()
    return time.perf_counter() - started


def describe_cache(slots: int, length: int, pages: int, page: int, sizes: dict[str, int]) -> str:
    """One line: slots and pages, and bytes by role; per token where they grow with the length."""
    grows = [f"{role} {size / pages / page:.1f}" for role, size in sizes.items() if role in ENTRY_RATIOS]
    stays = [f"{role} {size // slots:,}" for role, size in sizes.items() if role not in ENTRY_RATIOS]
    return (
        f"cache: {slots} slots of up to {format_size(length)} tokens, {pages:,} pages of {page} tokens, "
        f"{sum(sizes.values()):,} bytes; bytes a token: {', '.join(grows) or 'none'}; bytes a slot: {', '.join(stays)}"
    )


def describe_drafts(acceptance: Sequence[Acceptance]) -> str:
    """One line: how often drafts were right, by depth; "" if there were none."""
    rates = [f"{one.accepted / one.offered:.0%}" for one in acceptance if one.offered]
    return f"drafts accepted by depth: {', '.join(rates)}" if rates else ""
