"""`v4-jax plot`: what training runs reported of their steps, as curves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from rich.table import Table

from v4_jax.commands.shared.console import CommandError, bad_input, check_output, needs, say, show
from v4_jax.commands.shared.options import OptionalFile, OptionalText
from v4_jax.files import complete
from v4_jax.train.evaluation import SCORE
from v4_jax.train.metrics import METRICS, read_metrics

Runs = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")
]

# What a panel shows together. The first is the large one; metrics that are in none get one of their own when asked for.
_PANELS = (
    ("loss", "mtp_loss"),
    ("reward",),
    ("score",),
    ("learning_rate",),
    ("gradient_norm",),
    ("update_rms_muon", "update_rms_adamw"),
    ("expert_load_excess", "expert_load_excess_max"),
    ("tokens_per_second",),
)
_STYLES = ("-", "--", ":")
_COLUMNS = 3  # small panels in a row
_FEW = 3  # points that need a mark to be seen


class Run(NamedTuple):
    """What is known of a run.

    Attributes:
      name: of its directory, or the path where two have the same.
      metrics: from `read_metrics`.
    """

    name: str
    metrics: dict[str, np.ndarray]

    @property
    def names(self) -> list[str]:
        """The metrics that it has values of."""
        values = self.metrics.items()
        return [name for name, value in values if name not in ("step", "time") and not np.isnan(value).all()]

    @property
    def tokens(self) -> np.ndarray:
        """[lines] tokens seen after each line, whose own "tokens" stand for the steps since the line before too."""
        steps = np.diff(self.metrics["step"], prepend=0)
        return np.cumsum(np.nan_to_num(self.metrics["tokens"]) * steps)


def plot(runs: Runs, /, *, out: OptionalFile = None, metrics: OptionalText = None) -> None:
    """Draws the metrics of one or several training runs as curves over the tokens seen, and prints where they stand.

    The losses share the large panel; learning rate, gradient norm, update sizes, expert load and speed have small ones.
    A run may still be going.

    Examples:
      v4-jax plot my-run
      v4-jax plot my-run another-run --out comparison.png
      v4-jax plot my-run --metrics loss,gradient_norm,balance

    Args:
      runs: Directories made by train.
      out: The PNG file to write. Default: metrics.png in the first run.
      metrics: Which metrics to draw, separated by commas. Default: those named above, as far as the runs have them.
    """
    if not runs:
        raise CommandError("plot: there is no run; expected at least one directory made by train")
    target = runs[0] / "metrics.png" if out is None else out
    found = _read(runs)
    chosen = _panels(found, metrics)
    if target.suffix.lower() != ".png" or target.is_dir():
        raise CommandError(f"--out is {target}; expected the name of a .png file")
    check_output(target)
    picture = io.BytesIO()
    draw(found, chosen).savefig(picture, format="png", dpi=120)
    with bad_input(), complete(target) as working:
        working.write_bytes(picture.getbuffer())
    show(_table(found))
    say(f"wrote {target}")


def _read(paths: Sequence[Path]) -> list[Run]:
    for path in paths:
        if not path.is_dir():
            raise CommandError(f"there is no directory {path}; expected a training run")
        if not (path / METRICS).is_file():
            raise CommandError(f"{path} has no {METRICS}; expected a training run")
    names = [path.resolve().name for path in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        with bad_input():
            run = Run(name if names.count(name) == 1 else str(path), read_metrics(path / METRICS))
        if not run.names:
            raise CommandError(f"{path / METRICS} holds no metrics yet; expected at least one line")
        runs.append(run)
    return runs


def _panels(runs: Sequence[Run], wanted: str | None) -> list[tuple[str, ...]]:
    """The panels that have something to show, each with its metrics.

    Raises:
      CommandError: a metric was asked for that no run has, or none is left.
    """
    there = list(dict.fromkeys(name for run in runs for name in run.names))
    if wanted is None:
        names, panels = there, list(_PANELS)
    else:
        names = [name.strip() for name in wanted.split(",")]
        if unknown := [name for name in names if name not in there]:
            raise CommandError(f"--metrics: no run has {unknown[0]!r}; expected some of {', '.join(there)}")
        known = {name for panel in _PANELS for name in panel}
        panels = [*_PANELS, *((name,) for name in dict.fromkeys(names) if name not in known)]
    chosen = [tuple(name for name in panel if name in names) for panel in panels]
    if not any(chosen):
        raise CommandError(f"the runs have none of the usual metrics; choose with --metrics among {', '.join(there)}")
    return [panel for panel in chosen if panel]


def draw(runs: Sequence[Run], panels: Sequence[tuple[str, ...]]) -> Any:
    """A figure with the first panel large and the others below; a `matplotlib.figure.Figure`.

    Args:
      runs: one colour each.
      panels: metrics of each, one line style each.

    Raises:
      CommandError: matplotlib is not installed.
    """
    with needs("train"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter

    rows = -(-(len(panels) - 1) // _COLUMNS)
    figure = Figure(figsize=(12, 5 + 2.5 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, _COLUMNS, height_ratios=[2.2, *[1] * rows])
    by_tokens = all("tokens" in run.names for run in runs)
    for number, names in enumerate(panels):
        place = grid[0, :] if number == 0 else grid[1 + (number - 1) // _COLUMNS, (number - 1) % _COLUMNS]
        axes = figure.add_subplot(place)
        for colour, run in enumerate(runs):
            x = run.tokens if by_tokens else run.metrics["step"]
            for name, style in zip(names, _STYLES, strict=False):
                if name not in run.names:
                    continue
                # Colours are named in the large panel, line styles in each; "_" keeps a line out of the legend.
                words = (run.name if number == 0 and len(runs) > 1 else "", name if len(names) > 1 else "")
                label = " ".join(filter(None, words)) if number == 0 or colour == 0 else "_"
                values = run.metrics[name]
                # Few lines have a score: what lies between them is no gap, as a loss that is not finite is.
                at = ~np.isnan(values) if name.startswith(SCORE) else np.full(len(x), True)
                marker = "." if len(x) <= _FEW or not at.all() else ""
                axes.plot(x[at], values[at], f"C{colour}{style}", marker=marker, linewidth=1.2, label=label)
        axes.set_title(" and ".join(names).replace("_", " "), fontsize=10)
        axes.set_xlabel("tokens" if by_tokens else "step", fontsize=8)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(names) > 1 or (len(runs) > 1 and number == 0):
            for text in axes.legend(frameon=False, fontsize=8).get_texts():
                text.set_parse_math(False)  # a directory's name may hold dollar signs
    return figure


def _table(runs: Sequence[Run]) -> Table:
    """Where each run stands."""
    table = Table(title="Runs", title_justify="left")
    for number, column in enumerate(("run", "step", "tokens", "last loss", "lowest loss")):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for run in runs:
        loss = run.metrics["loss"] if "loss" in run.names else None
        tokens = f"{run.tokens[-1]:,.0f}" if "tokens" in run.names else ""
        losses = ("", "") if loss is None else (f"{loss[-1]:.4f}", f"{np.nanmin(loss):.4f}")
        table.add_row(run.name, f"{run.metrics['step'][-1]:,}", tokens, *losses)
    return table
