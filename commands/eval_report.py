"""Scores of an evaluation as they are shown and kept: a table, a picture, and a file with everything."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from v4_jax.commands.info_report import make_table
from v4_jax.commands.shared.console import CommandError, bad_input
from v4_jax.commands.shared.sizes import format_size
from v4_jax.files import complete
from v4_jax.infer.evaluation.grading import Cell
from v4_jax.infer.evaluation.tasks import TASKS, TaskName

RESULTS, PICTURE = "results.json", "results.png"


def scores_table(task: TaskName, cells: Sequence[Cell]) -> Table:
    """Lengths to the right; downwards depths, numbers of needles or metrics, and how many questions there were."""
    metrics, series = TASKS[task].metrics, TASKS[task].series
    lengths = list(dict.fromkeys(cell.length for cell in cells))
    shown = make_table(
        f"{task}: {metrics[0]}, %" if series else f"{task}, %",
        *(series, *("all" if length is None else format_size(length) for length in lengths)),
        caption="length in tokens; 95% intervals",
    )
    rows: dict[tuple[str, float | None], dict[int | None, Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.metric, cell.series), {})[cell.length] = cell
    for number, ((metric, one), row) in enumerate(rows.items(), 1):
        label = metric if not series else "all" if one is None else f"{one:g}"
        shown.add_row(label, *(_percent(row.get(length)) for length in lengths), end_section=number == len(rows))
    counts = rows[metrics[0], None]
    shown.add_row("questions", *(str(counts[length].questions) for length in lengths))
    return shown


def _percent(cell: Cell | None) -> str:
    return "" if cell is None else f"{100 * cell.mean:.1f} ({100 * cell.low:.0f}-{100 * cell.high:.0f})"


def draw(task: TaskName, cells: Sequence[Cell]) -> Any:
    """A `matplotlib.figure.Figure`: needles as a grid of depth and length, others as curves over the length."""
    from matplotlib.figure import Figure

    shown = [(cell, cell.length) for cell in cells if cell.length is not None]
    lengths = sorted({length for _, length in shown})
    placed = [(cell, lengths.index(length)) for cell, length in shown]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    (_grid if task == "needle" else _curves)(axes, task, placed)
    axes.set_xticks(range(len(lengths)), [format_size(length) for length in lengths])
    axes.set_xlabel("tokens of prompt and answer")
    axes.set_title(f"{task} ({max(cell.questions for cell in cells)} asked)")
    return figure


def _grid(axes: Any, task: TaskName, placed: Sequence[tuple[Cell, int]]) -> None:
    depths = sorted({cell.series for cell, _ in placed if cell.series is not None})
    grid = [[math.nan] * (1 + max(x for _, x in placed)) for _ in depths]
    for cell, x in placed:
        if cell.series is not None:
            y = depths.index(cell.series)
            grid[y][x] = cell.mean
            colour = "black" if cell.mean > 0.6 else "white"
            axes.text(x, y, f"{cell.mean:.0%}", ha="center", va="center", color=colour)
    image = axes.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label=TASKS[task].metrics[0])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_ylabel("depth of the needle")


def _curves(axes: Any, task: TaskName, placed: Sequence[tuple[Cell, int]]) -> None:
    metrics, series = TASKS[task].metrics, TASKS[task].series
    curves: dict[str, list[tuple[Cell, int]]] = {}
    for cell, x in placed:
        if not series or cell.series is not None:
            curves.setdefault(cell.metric if not series else f"{cell.series:g} {series}", []).append((cell, x))
    for number, (label, curve) in enumerate(curves.items()):
        aside = 0.03 * (number - (len(curves) - 1) / 2)  # so that no curve's bars hide another's
        # Rounding may put a mean a hair outside of its own interval, which a bar does not allow.
        down, up = zip(
            *((max(cell.mean - cell.low, 0), max(cell.high - cell.mean, 0)) for cell, _ in curve), strict=True
        )
        places, means = [x + aside for _, x in curve], [cell.mean for cell, _ in curve]
        axes.errorbar(places, means, yerr=[down, up], marker="o", capsize=3, linewidth=1.5, label=label)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel(metrics[0] if series else "score")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def check_directory(output: Path) -> None:
    """Refuses a directory for results that could not be made or written, before any work.

    Raises:
      CommandError: it could not; the sentence says why.
    """
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output {output} is a file; expected a directory, which is made if need be")
    parent = output if output.is_dir() else output.absolute().parent
    if not parent.is_dir():
        raise CommandError(f"there is no directory {parent} to make {output.name} in")
    if not os.access(parent, os.W_OK):
        raise CommandError(f"--output {output} cannot be written: {parent} allows no new files")


def write_results(output: Path, results: dict[str, Any], figure: Any) -> None:
    """Writes everything and the picture into a directory; each file appears when it is complete.

    Raises:
      CommandError: it cannot be written.
    """
    text = json.dumps(results, ensure_ascii=False, indent=1) + "\n"
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    with bad_input():
        output.mkdir(exist_ok=True)
        for name, content in ((RESULTS, text.encode()), (PICTURE, picture.getvalue())):
            with complete(output / name) as unfinished:
                unfinished.write_bytes(content)
