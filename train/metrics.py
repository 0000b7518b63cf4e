"""What a run reports of its steps: `RUN/metrics.jsonl`, TensorBoard, and a line for the person at the terminal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from v4_jax.files import complete
from v4_jax.sharding.chips import chip_of
from v4_jax.train.evaluation import EVALUATION_SECONDS, SCORE
from v4_jax.train.trackers import Tracker

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

_STEP, _TIME = "step", "time"

# What the terminal shows, in this order: metric, its short name, its format.
_SHOWN = (
    ("loss", "loss", ".3f"),
    ("reward", "reward", ".3f"),
    (SCORE, "score", ".3f"),
    ("mtp_loss", "mtp", ".3f"),
    ("indexer_loss", "indexer", ".3f"),
    ("balance", "balance", ".3g"),
    ("accepted_length", "accepts", ".2f"),
    ("gradient_norm", "grad", ".3g"),
    ("learning_rate", "lr", ".1e"),
)


class MetricsError(ValueError):
    """Metrics that cannot be read; the sentence says where and why."""


class Metrics:
    """Writes the metrics of a run, one line of JSON for each step that is logged, whole the moment it is written.

    A run that goes on writes to the same file, after `rewind`: no step is in it twice. In a run of several processes
    one of them has this.

    Args:
      run: the run's directory, which exists.
      tensorboard: whether to write events for TensorBoard too.
      trackers: services that are told of every step, too, and finished with the run.

    Raises:
      MetricsError: a file of an earlier part of the run is damaged.
      ImportError: tensorboardX is wanted and not installed.
    """

    def __init__(self, run: Path, *, tensorboard: bool = True, trackers: Sequence[Tracker] = ()) -> None:
        self._path, self._folder = run / METRICS, run / TENSORBOARD
        self._tensorboard, self._trackers = tensorboard, trackers
        if tensorboard:
            import tensorboardX  # noqa: F401 (a run without it ends here, not at its first line)
        self._file: Any = None
        self._events: Any = None
        self._purge: int | None = None
        self._last = -1
        self.rewind(None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes a step.

        Args:
          step: counted from 1, and after those that are there already.
          metrics: finite or not; what is not finite becomes null.

        Raises:
          ValueError: the step is not after the last one.
        """
        if step <= self._last:
            raise ValueError(f"step {step} follows step {self._last}, expected a later one")
        now, values = time.time(), {name: float(value) for name, value in metrics.items()}
        legal = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self._file.write(json.dumps({_STEP: step, _TIME: round(now, 3), **legal}) + "\n")
        self._file.flush()
        self._last = step
        if self._tensorboard:
            self._events = self._events or self._writer()
            for name, value in values.items():
                self._events.add_scalar(name, value, step, walltime=now)
        for tracker in self._trackers:
            tracker.write(step, values)

    def rewind(self, step: int | None) -> None:
        """Forgets what was noted after a step, because the run goes on from there.

        Args:
          step: the last to keep; None keeps all whole lines.

        Raises:
          MetricsError: the file is damaged before its last line.
        """
        self.close()
        lines = list(_lines(self._path)) if self._path.exists() else []
        kept = [line for line in lines if step is None or line[_STEP] <= step]
        with complete(self._path) as working, working.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        self._last = max((line[_STEP] for line in kept), default=-1)
        self._file = self._path.open("a", encoding="utf-8")
        self._purge = self._purge if step is None else step + 1

    def close(self) -> None:
        """Finishes the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        self._file = self._events = None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        for tracker in self._trackers:
            tracker.close()

    def _writer(self) -> Any:
        """A new file of events, which hides those of the steps that are taken again."""
        from tensorboardX import SummaryWriter

        # Files are named by the second; two of the same second would overwrite each other.
        suffix = f".{time.time_ns()}"
        return SummaryWriter(str(self._folder), purge_step=self._purge, filename_suffix=suffix, flush_secs=10)


def read_metrics(path: str | Path) -> dict[str, np.ndarray]:
    """Reads `metrics.jsonl`, that of a run still going included: a last line that is cut is left out.

    Returns:
      "step" [lines] int64, and [lines] float64 of each metric, NaN where a line has none or it was not finite.

    Raises:
      MetricsError: a line is not a step's metrics.
      OSError: the file cannot be read.
    """
    lines = list(_lines(Path(path)))
    names = list(dict.fromkeys(name for line in lines for name in line))
    missing = dict.fromkeys(names)
    columns = {name: np.array([(missing | line)[name] for line in lines], np.float64) for name in names}
    return columns | {_STEP: np.array([line[_STEP] for line in lines], np.int64)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file that are whole."""
    *whole, rest = path.read_bytes().split(b"\n")
    del rest  # "", or a line that is still being written
    for number, line in enumerate(whole, 1):
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if not _legal(content):
            raise MetricsError(
                f"{path}: line {number} is {line[:60].decode(errors='replace')!r}, expected a JSON object of "
                f'numbers with an integer "{_STEP}"'
            )
        yield content


def _legal(content: Any) -> bool:
    if not isinstance(content, dict) or type(content.get(_STEP)) is not int:
        return False
    return all(value is None or isinstance(value, int | float) for value in content.values())


def throughput(flops: int, tokens: float, seconds: float, devices: Sequence[Any]) -> dict[str, float]:
    """How fast a step was.

    Args:
      flops: that a token needs, as `v4_jax.costs` says of whole rows; documents shorter than a row need less.
      tokens: of the step, over all devices.
      seconds: that it took.
      devices: all that took part, as in `jax.devices()`.

    Returns:
      "tokens_per_second", "flops_per_second", and, of devices whose peak in bfloat16 is known, "flops_share" of it.
    """
    rate = tokens / seconds
    found = {"tokens_per_second": rate, "flops_per_second": flops * rate}
    chips = [chip_of(device.device_kind) for device in devices]
    peak = sum(chip.per_device().flops for chip in chips if chip)
    return found | ({"flops_share": flops * rate / peak} if peak and all(chips) else {})


def line(step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """A step's metrics for the terminal, those that are there.

    The time that is left follows from "tokens" of the step and "tokens_per_second".

    Args:
      step: the step, counted from 1.
      steps: how many there are to be.
      metrics: as given to `Metrics.write`.
    """
    parts = [f"step {step:>{len(f'{steps:,}')},}/{steps:,}"]
    parts += [
        f"{short} {metrics[name]:{form}}{_of_sets(name, metrics)}" for name, short, form in _SHOWN if name in metrics
    ]
    if rate := metrics.get("tokens_per_second"):
        parts.append(f"{rate:,.0f} tok/s")
    if flops := metrics.get("flops_per_second"):
        share = f" ({metrics['flops_share']:.0%} of peak)" if "flops_share" in metrics else ""
        parts.append(f"{flops:.1e} FLOP/s".replace("e+", "e") + share)
    if rate and (tokens := metrics.get("tokens")):
        parts.append(f"eta {duration((steps - step) * tokens / rate)}")
    return "  ".join(parts)


def _of_sets(name: str, metrics: Mapping[str, float]) -> str:
    """Behind the score that counts those of the sets, where there are several."""
    prefix = f"{SCORE}_"
    each = [f"{key.removeprefix(prefix)} {value:.3f}" for key, value in metrics.items() if key.startswith(prefix)]
    return f" ({', '.join(each)})" if name == SCORE and len(each) > 1 else ""


def duration(seconds: float) -> str:
    """A time in its two largest units: 45s, 3m12s, 2h05m, 4d03h."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    if hours:
        return f"{hours}h{minute:02}m"
    return f"{minutes}m{second:02}s" if minutes else f"{second}s"


class Report:
    """A run's log: every so many steps to its metrics and to the terminal, with the throughput since the last time.

    Args:
      metrics: where lines go; None for a process that writes none.
      steps: how many there are to be.
      every: steps between lines.
      length: tokens of a row, by step counted from 0.
      flops: FLOPs of a token, by the length of its row.
      say: shows a line at the terminal.

    Attributes:
      step: the last step that was taken.
    """

    def __init__(
        self,
        metrics: Metrics | None,
        *,
        steps: int,
        every: int,
        length: Callable[[int], int],
        flops: Callable[[int], int],
        say: Callable[[str], None],
    ) -> None:
        self._metrics, self._steps, self._every = metrics, steps, every
        self._length, self._flops, self._say = length, flops, say
        self.step, self._tokens, self._since = 0, 0.0, -1.0

    def write(self, step: int, metrics: Mapping[str, float], over_at: float | None = None) -> None:
        """Takes note of a step, counted from 1, that was over at a time of `time.monotonic`; by default now."""
        self.step = step
        now, found = time.monotonic() if over_at is None else over_at, dict(metrics)
        self._tokens += found["tokens"]
        first, last = self._since < 0, step == self._steps
        if not (first or last or step % self._every == 0 or SCORE in found):
            return
        if not first:  # whose time is that of compilation
            seconds = now - self._since
            found |= throughput(self._flops(self._length(step - 1)), self._tokens, seconds, jax.devices())
        self._since, self._tokens = now + found.get(EVALUATION_SECONDS, 0.0), 0.0
        if self._metrics is not None:
            self._metrics.write(step, found)
        self._say(line(step, self._steps, found))

    def rewind(self, step: int) -> None:
        """Forgets what was noted after a step, which will be taken again."""
        self.step, self._tokens, self._since = step, 0.0, -1.0
        if self._metrics is not None:
            self._metrics.rewind(step)
